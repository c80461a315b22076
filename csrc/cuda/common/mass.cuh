// Thresholds of rows whose weights sum to one, by Newton's steps (math/mass.h) in the precision of
// the states. A thread holds a few rows, as in gather.cuh, and meets their keys once in each step.
#pragma once

#include "../../math/mass.h"
#include "gather.cuh"

namespace qflux::cuda {

// A row on the way to its threshold.
template <class T>
struct MassRow {
  Point<T> query;
  T tau, rest;  // what tau loses when it is rounded
  T largest;    // of the row's pairs; -infinity if it has none
  T kept;       // pairs before the last step
  bool active;

  // Less one: a lower bound. Less more than one where rounding would leave nothing of it.
  __device__ __forceinline__ void begin(T largest_pair, bool has_pairs) {
    const T coarse = absolute(largest_pair) * mass_tolerance<T>();
    largest = largest_pair;
    tau = has_pairs ? largest - (T(1) < coarse ? coarse : T(1)) : T(0);
    rest = T(0);
    kept = static_cast<T>(INFINITY);
    active = has_pairs;
  }
  // A step from the mass of the pairs above tau and how many they are. A row that is done stays as
  // it is: how long others take must not show.
  __device__ __forceinline__ void step(const CompensatedSum<T>& mass, T above) {
    if (!active) return;
    const T excess = (mass.value - T(1)) + mass.error;
    const T by = excess / above, next = tau + by;
    // Where rounding is coarser than a weight a step may leave nothing above tau: then all of it is
    // the rest. What is undefined stays so.
    const bool moves = (next < largest) | (next != next);
    rest = moves ? by - (next - tau) : by;
    if (moves) tau = next;
    active = moves & (absolute(excess) > mass_tolerance<T>()) & (above < kept);
    kept = above;
  }
};

// What is found out about the pairs of rows in one walk over their keys. Each says, beyond what a
// pass of gather.cuh does, from which number a chunk starts and into what its result goes.
template <class T, class Score>
struct MassPass : OwnsRows<T, Score, InteractParams<T>> {
  using OwnsRows<T, Score, InteractParams<T>>::OwnsRows;
  using Sizes = TileTraits<T, 0, 2>;
  using Owner = MassRow<T>;

  __device__ __forceinline__ void fetch(int key, int /*column*/, T (&record)[2]) const {
    this->template fetch_key<0>(key, 0, record);
  }
  // A pair, less `limit`.
  static __device__ __forceinline__ T product(const MassRow<T>& row, const T (&record)[2],
                                              T limit) {
    return inner_product(row.query.x, row.query.y, record[0], record[1],
                         Score::make(limit, T(0), T(0)).bias());
  }
};

// One instruction each, which a comparison is not; a NaN is passed over.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// The largest pair.
template <class T, class Score>
struct Largest : MassPass<T, Score> {
  using MassPass<T, Score>::MassPass;
  static constexpr int kSums = 1;
  static constexpr bool kDropsChunks = false;

  static __device__ __forceinline__ T start() { return static_cast<T>(-INFINITY); }
  struct Total {
    T value = start();
    __device__ __forceinline__ void add(T part) { value = larger(value, part); }
    __device__ __forceinline__ void add(const Total& other) { add(other.value); }
  };
  template <bool kCareful>
  __device__ __forceinline__ void accumulate(const MassRow<T>& row, const T (&record)[2],
                                             bool visible, T (&sums)[kSums]) const {
    const T p = this->product(row, record, T(0));
    if (visible) sums[0] = larger(sums[0], p);
  }
};

// The mass of the pairs above tau and their number. `kFindsPoison`: what is not finite makes the
// mass NaN, wherever it lies.
template <class T, class Score, bool kFindsPoison>
struct Above : MassPass<T, Score> {
  using MassPass<T, Score>::MassPass;
  static constexpr int kSums = 2;
  // Tau only rises: where no row of a warp has a pair above it, none ever will.
  static constexpr bool kDropsChunks = true;
  using Total = CompensatedSum<T>;

  static __device__ __forceinline__ T start() { return T(0); }
  template <bool kCareful>
  __device__ __forceinline__ void accumulate(const MassRow<T>& row, const T (&record)[2],
                                             bool visible, T (&sums)[kSums]) const {
    const T p = this->product(row, record, row.tau);
    if constexpr (kFindsPoison)
      if (visible) sums[0] = multiply_add(p, T(0), sums[0]);
    if (!(visible & Score::make(row.tau, T(0), T(0)).kept(p))) return;
    sums[0] += p;
    sums[1] += T(1);
  }
};

// The rows of a thread, and which keys its warp meets.
template <class T, int kOwners>
struct MassRows {
  MassRow<T> row[kOwners] = {};
  Range met[kOwners] = {};
  int any, common;       // keys that some row of the warp sees, and those that all do
  uint64_t dropped = 0;  // of the first chunks that the warp meets, those without a pair left

  // Those from `first` on of a warp whose rows end before `last`.
  template <class Pass>
  __device__ __forceinline__ MassRows(const Pass& pass, int first, int last)
      : any(met_by_any(pass, first, last).end), common(met_by_all(pass, first, last).end) {
    for_each_owner<kOwners>(pass, first, [&](int r, int n) {
      met[r] = pass.range(n);
      row[r].query = query<typename Pass::Score>(pass.params.pair, pass.b, n);
    });
  }

  __device__ __forceinline__ bool active() const {
    bool any_row = false;
#pragma unroll
    for (int r = 0; r < kOwners; ++r) any_row |= row[r].active;
    return any_row;
  }

  // Adds those of `count` keys from `start` on in a tile that fall to a slice of `split`.
  template <class Pass>
  __device__ __forceinline__ void meet(const Pass& pass, const T* tile, int start, int count,
                                       int slice, int split,
                                       typename Pass::Total (&total)[kOwners][Pass::kSums]) {
    constexpr int kChunk = Pass::Sizes::kChunk;
    const int end = lesser(start + count, any);
#pragma unroll 1
    for (int chunk = start + slice * kChunk; chunk < end; chunk += split * kChunk) {
      const int number = chunk / (split * kChunk);
      const uint64_t bit = number < 64 ? uint64_t{1} << number : 0;
      if (Pass::kDropsChunks && dropped & bit) continue;
      T sums[kOwners][Pass::kSums];
#pragma unroll
      for (int n = 0; n < kOwners * Pass::kSums; ++n)
        sums[n / Pass::kSums][n % Pass::kSums] = Pass::start();
      if (chunk + kChunk <= lesser(start + count, common))
        add_sources<false>(pass, row, met, tile, start, chunk, chunk + kChunk, sums);
      else
        add_sources<true>(pass, row, met, tile, start, chunk, lesser(chunk + kChunk, end), sums);
#pragma unroll
      for (int n = 0; n < kOwners * Pass::kSums; ++n)
        total[n / Pass::kSums][n % Pass::kSums].add(sums[n / Pass::kSums][n % Pass::kSums]);
      if constexpr (Pass::kDropsChunks) {
        bool above = false;
#pragma unroll
        for (int r = 0; r < kOwners; ++r) above |= row[r].active & (sums[r][1] > T(0));
        if (__ballot_sync(kAllLanes, above) == 0) dropped |= bit;
      }
    }
  }

  // Finds the thresholds. walk(pass, total) adds up over all keys of the rows, and any(active) says
  // whether a row is active in any of the threads that walk together.
  template <class Score, class Walk, class Any>
  __device__ __forceinline__ void solve(const InteractParams<T>& params, BatchIndex b,
                                        const Walk& walk, const Any& any_active) {
    typename Largest<T, Score>::Total largest[kOwners][1] = {};
    walk(Largest<T, Score>(params, b), largest);
#pragma unroll
    for (int r = 0; r < kOwners; ++r) row[r].begin(largest[r][0].value, met[r].end > 0);
    const auto step = [&](const auto& pass) {
      CompensatedSum<T> total[kOwners][2] = {};
      walk(pass, total);
#pragma unroll
      for (int r = 0; r < kOwners; ++r) row[r].step(total[r][0], total[r][1].get());
    };
    step(Above<T, Score, true>(params, b));
#pragma unroll 1
    while (any_active(active())) step(Above<T, Score, false>(params, b));
  }

  // Stores them where `stores`, and zero for rows that see nothing.
  template <class Pass>
  __device__ __forceinline__ void store(const Pass& pass, int first, bool stores) const {
    const PairParams<T>& p = pass.params.pair;
    const View<T> rest = p.row_plane();
#pragma unroll
    for (int r = 0; r < kOwners; ++r) {
      const int n = first + static_cast<int>(threadIdx.x) % kWarp + r * kWarp;
      if (!stores || n >= p.rows) continue;
      const bool sees = pass.visibility().visible_keys(n) > 0;
      pass.params.threshold.at(pass.b, n) = sees ? row[r].tau : T(0);
      rest.at(pass.b, n) = sees ? row[r].rest : T(0);
    }
  }
};

}  // namespace qflux::cuda
