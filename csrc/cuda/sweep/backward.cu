// The backward sweep. Rows meet the keys of the rectangles as in the forward, with their gradients;
// keys meet its blocks of rows, for which sums stand where they keep the key for certain. The
// dense kernels add each row's and key's own base block.
#include "../common/launch.h"
#include "../dense/backward.cuh"
#include "rows.cuh"

namespace qflux::cuda {
namespace {

template <class T>
struct SweptParams : InteractBackwardParams<T> {
  Sweep<T> sweep;
};

// Which rows of a rectangle have geometry, and what keys want of them.
template <class T, bool kOwn>
struct FarRows : RowPass<T, HardThreshold<T>, kSweptValues<T, kOwn>> {
  using Base = RowPass<T, HardThreshold<T>, kSweptValues<T, kOwn>>;
  using Keys = KeyPass<T, HardThreshold<T>, kSweptValues<T, kOwn>>;
  using Slots = SweepTraits<T, kOwn>;
  using Base::Base, Base::b, Base::params, Base::kSums, Base::kColumns;
  static constexpr bool kOwnValues = kOwn;

  __device__ __forceinline__ bool has_geometry(int row, int column) const {
    const typename Base::Owner owner = Base::load(row, column);
    bool all = is_tame(owner.query.x) && is_tame(owner.query.y) && is_tame(owner.limit) &&
               is_tame(owner.grad_strength);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) all = all && is_tame(owner.grad[c]);
    return all;
  }
  __device__ __forceinline__ void keep(const Sweep<T>& sweep, int64_t at, int row,
                                       int column) const {
    if (!params.grad_keys && !params.grad_values) return;
    put_record<Slots::kRecord>(
        sweep.records + at * Slots::kRecord,
        [&](T(&record)[Slots::kRecord]) { Keys(params, b).fetch(row, column, record); });
  }
  // Sums of (g, g q) over the rows of each block and of the super-block, in the slots of values.
  // There is a barrier between them and keep().
  __device__ __forceinline__ void sum_records(const Sweep<T>& sweep,
                                              const SuperBlock<T>& super) const {
    if (!params.grad_keys && !params.grad_values) return;
    using Sums = Buffer<double, kSuperThreads>;
    QFLUX_SHARED(Sums, shared);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int first = super.first + warp * kRankBlock;
    const T* records =
        sweep.records +
        (super.sequence * params.pair.rows + super.where.row_begin + first) * Slots::kRecord;
    double sum = 0;
    for (int n = 0; n < kRankBlock; n += kWarp) {
      const int count = super.where.rows() - first - n;
      if (count <= 0) break;
      const unsigned bits = count >= kWarp ? kWholeWarp : (1u << count) - 1;
      sum = add_slots<Slots::kUsed, Slots::kSlots, Slots::kRecord, 0, 4, 3>(
          bits, records + n * Slots::kRecord, sum);
    }
    shared.at[threadIdx.x] = sum_over_lanes(sum, Slots::kSlots);
    double* to = sweep.sums + super.view * Slots::kSlots;
    if (lane < Slots::kSlots) to[warp * Slots::kSlots + lane] = shared.at[threadIdx.x];
    __syncthreads();
    if (warp > 0 || lane >= Slots::kSlots) return;
    double all = 0;
    for (int n = 0; n < kSuperBlocks; ++n) all += shared.at[n * kWarp + lane];
    to[kSuperBlocks * Slots::kSlots + lane] = all;
  }
  // `slots`: moments of the certain keys, `tested`: sums over the others.
  __device__ __forceinline__ void add(const Sweep<T>& sweep, int64_t sequence, int row,
                                      int /*column*/, const typename Base::Owner& owner,
                                      const double* slots, const double (&tested)[kSums]) const {
    double x = tested[0], y = tested[1];
    if (slots != nullptr) {
#pragma unroll
      for (int c = 0; c <= kColumns; ++c) {
        const double grad = c < kColumns ? owner.grad[c] : owner.grad_strength;
        x = multiply_add(grad, slots[3 * c + 1], x);
        y = multiply_add(grad, slots[3 * c + 2], y);
      }
    }
    double* query = sweep.query + 2 * (sequence * params.pair.rows + row);
    query[0] += x;
    query[1] += y;
  }
};

// Adds what a key gets from rows that all keep it: as a key, and as a value.
template <class T, bool kOwn, int kSums>
__device__ __forceinline__ void add_certain(
    const typename KeyPass<T, HardThreshold<T>, kSweptValues<T, kOwn>>::Owner& key,
    const double* slots, double (&sums)[kSums]) {
  constexpr int kColumns = SweepTraits<T, kOwn>::kColumns, kPoint = kOwn ? kColumns : 0;
  constexpr double kBias = HardThreshold<T>::kBias;
#pragma unroll
  for (int c = 0; c <= kColumns; ++c) {
    const double* m = slots + 3 * c;
    double v = 1;
    if (c < kColumns) v = kOwn ? key.value[c] : key.point[c];
    sums[kPoint] = multiply_add(v, m[1], sums[kPoint]);
    sums[kPoint + 1] = multiply_add(v, m[2], sums[kPoint + 1]);
    if (c < kColumns) sums[c] += kBias * m[0] + key.point[0] * m[1] + key.point[1] * m[2];
  }
}

constexpr int kKeyWarps = 4;
constexpr int kKeyThreads = kKeyWarps * kWarp;

// Adds to the keys of all rectangles of a level what they get from its rows: a lane to each key
// for the super-blocks, then a lane to each block of those that are not certain, then the whole
// warp for the pairs of a block.
template <class T, bool kOwn>
__global__ void __launch_bounds__(kKeyThreads, 2)
    meet_rows(InteractBackwardParams<T> params, Sweep<T> sweep, Level level, int tiles,
              int column) {
  using Keys = KeyPass<T, HardThreshold<T>, kSweptValues<T, kOwn>>;
  using Slots = SweepTraits<T, kOwn>;
  constexpr int kSums = Keys::kSums, kColumnSums = Keys::kColumnSums;
  struct Shared {
    typename Keys::Owner owner[kKeyThreads];
    WhiteKey white[kKeyThreads];
  };
  QFLUX_SHARED(Shared, shared);
  const PairParams<T>& p = params.pair;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t per_sequence = static_cast<int64_t>(level.rectangles) * tiles;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kKeyWarps;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * kKeyWarps + warp;
       work < p.batch() * per_sequence; work += stride) {
    const int64_t sequence = work / per_sequence;
    const BatchIndex b = p.index(sequence);
    const int index = static_cast<int>(work % per_sequence / tiles);
    const Rectangle where = rectangle(p.visibility(b), level, index);
    const int key = where.key_begin + static_cast<int>(work % tiles) * kWarp + lane;
    if (where.empty() || key - lane >= where.key_end) continue;
    const Keys pass(params, b);
    const bool inside = key < where.key_end;
    typename Keys::Owner own{};
    WhiteKey white{};
    if (inside) {
      const Whitening& whiten = sweep.whitenings[sequence * level.rectangles + index];
      own = pass.load(key, column);
      white = white_key(whiten, Point<T>{own.point[0], own.point[1]},
                        sweep.tame[sequence * p.keys + key] != 0);
    }
    __syncwarp();
    shared.owner[threadIdx.x] = own;
    shared.white[threadIdx.x] = white;
    __syncwarp();

    double total[kSums] = {};
#pragma unroll 1
    for (int super = 0; super * kSuperRows < where.rows(); ++super) {
      const int64_t view = sweep.view(level, sequence, index, super);
      const Certainty certainty =
          inside ? classify(sweep.views[view + kSuperBlocks], white) : Certainty::kNone;
      if (certainty == Certainty::kAll)
        add_certain<T, kOwn>(own, sweep.sums + (view + kSuperBlocks) * Slots::kSlots, total);
      unsigned open = __ballot_sync(kWholeWarp, certainty == Certainty::kTest);
#pragma unroll 1
      for (; open != 0; open &= open - 1) {
        const int turn = __ffs(open) - 1;
        const typename Keys::Owner& met = shared.owner[threadIdx.x - lane + turn];
        const int first = super * kSuperRows;
        Certainty of_block = Certainty::kNone;
        if (lane < kSuperBlocks && first + lane * kRankBlock < where.rows())
          of_block = classify(sweep.views[view + lane], shared.white[threadIdx.x - lane + turn]);
        double part[kSums] = {};
        if (of_block == Certainty::kAll)
          add_certain<T, kOwn>(met, sweep.sums + (view + lane) * Slots::kSlots, part);
        unsigned blocks = __ballot_sync(kWholeWarp, of_block == Certainty::kTest);
        T sums[kSums] = {};
#pragma unroll 1
        for (; blocks != 0; blocks &= blocks - 1) {
          const int begin = first + (__ffs(blocks) - 1) * kRankBlock + lane;
#pragma unroll 1
          for (int rank = begin; rank < lesser(begin + kRankBlock, where.rows()); rank += kWarp) {
            const T* from =
                sweep.records + (sequence * p.rows + where.row_begin + rank) * Slots::kRecord;
            T record[Slots::kRecord];
            read_record(from, record);
            pass.accumulate(met, record, true, sums);
          }
        }
#pragma unroll
        for (int c = 0; c < kSums; ++c) {
          const double all = sum_over_lanes(part[c] + sums[c]);
          if (lane == turn) total[c] += all;
        }
      }
    }
    if (!inside) continue;
    const int64_t at = sequence * p.keys + key;
    if constexpr (kOwn) {
#pragma unroll
      for (int c = 0; c < kColumnSums; ++c)
        if (column + c < p.value_dim) sweep.values[at * p.value_dim + column + c] += total[c];
    }
    sweep.key[2 * at] += total[kColumnSums];
    sweep.key[2 * at + 1] += total[kColumnSums + 1];
  }
}

// Rows against the keys of their own base block; the gradients of both.
template <class T, bool kOwn>
struct NearRows : RowPass<T, HardThreshold<T>, kSweptValues<T, kOwn>> {
  using Base = RowPass<T, HardThreshold<T>, kSweptValues<T, kOwn>>;
  using Params = SweptParams<T>;
  using Base::b, Base::params, Base::kSums;
  const Sweep<T>& sweep;

  __device__ __forceinline__ NearRows(const Params& p, BatchIndex sequence)
      : Base(p, sequence), sweep(p.sweep) {}
  QFLUX_INLINE static int64_t sources(const Params& p) { return p.pair.causal ? p.sweep.base : 0; }
  __device__ __forceinline__ Range range(int row) const {
    return near_keys(sweep.base, Base::visibility(), row);
  }
  __device__ __forceinline__ void store(int row, int column, bool last,
                                        const T (&sums)[kSums]) const {
    const double* far = sweep.query + 2 * (params.pair.flat(b) * params.pair.rows + row);
    Base::store(row, column, last,
                {static_cast<T>(sums[0] + far[0]), static_cast<T>(sums[1] + far[1])});
  }
};

// Keys against the rows of their own base block; the gradients of both.
template <class T, bool kOwn>
struct NearKeys : KeyPass<T, HardThreshold<T>, kSweptValues<T, kOwn>> {
  using Base = KeyPass<T, HardThreshold<T>, kSweptValues<T, kOwn>>;
  using Params = SweptParams<T>;
  using Base::b, Base::params, Base::kColumnSums, Base::kSums;
  const Sweep<T>& sweep;

  __device__ __forceinline__ NearKeys(const Params& p, BatchIndex sequence)
      : Base(p, sequence), sweep(p.sweep) {}
  QFLUX_INLINE static int64_t sources(const Params& p) { return p.pair.causal ? p.sweep.base : 0; }
  __device__ __forceinline__ Range range(int key) const {
    const Visibility v = Base::visibility();
    if (!v.causal) return {0, 0};
    const int last = static_cast<int>(sweep.base) - 1;
    const int end = static_cast<int>(v.row_end);
    return {lesser(static_cast<int>(v.first_row(key)), end),
            lesser(greater((key | last) + 1 - static_cast<int>(v.shift), 0), end)};
  }
  __device__ __forceinline__ void store(int key, int column, bool last,
                                        const T (&sums)[kSums]) const {
    const int64_t at = params.pair.flat(b) * params.pair.keys + key;
    const int64_t value_dim = params.pair.value_dim;
    T both[kSums];
#pragma unroll
    for (int c = 0; c < kColumnSums; ++c)
      both[c] = column + c < value_dim
                    ? static_cast<T>(sums[c] + sweep.values[at * value_dim + column + c])
                    : T(0);
    both[kColumnSums] = static_cast<T>(sums[kColumnSums] + sweep.key[2 * at]);
    both[kColumnSums + 1] = static_cast<T>(sums[kColumnSums + 1] + sweep.key[2 * at + 1]);
    Base::store(key, column, last, both);
  }
};

template <class T, bool kOwn>
void sweep(SweptParams<T>& params, Queue& queue) {
  using Far = FarRows<T, kOwn>;
  const PairParams<T>& pair = params.pair;
  const InteractBackwardParams<T>& plain = params;
  const bool row_pass = static_cast<bool>(params.grad_states);
  const bool key_pass = params.grad_keys || params.grad_values;
  sweep_levels(pair, params.threshold, params.sweep, queue, [&](const Level& level) {
    const Grid of_rows{super_blocks(pair, level), kSuperThreads};
    const int value_dim = static_cast<int>(Far::columns(plain));
    const int64_t keys = level.size && level.size < pair.keys ? level.size : pair.keys;
    const int tiles = static_cast<int>(ceil_div(keys, kWarp));
    const Grid of_keys{ceil_div(pair.batch() * level.rectangles * int64_t(tiles), kKeyWarps),
                       kKeyThreads};
    for (int column = 0; column < value_dim; column += Far::kColumns) {
      queue.launch(view_blocks<Far>, of_rows, plain, params.sweep, level, column);
      if (row_pass) queue.launch(meet_keys<Far>, of_rows, plain, params.sweep, level, column);
      if (key_pass)
        queue.launch(meet_rows<T, kOwn>, of_keys, plain, params.sweep, level, tiles, column);
    }
  });
  if (row_pass)
    queue.then([&](void* stream) {
      return launch_gather<NearRows<T, kOwn>, false>(params, pair.causal, stream);
    });
  if (key_pass)
    queue.then([&](void* stream) {
      return launch_gather<NearKeys<T, kOwn>, false>(params, false, stream);
    });
}

}  // namespace

template <class T>
const char* interact_backward_by(int64_t base, const InteractBackwardParams<T>& params,
                                 void* scratch, void* stream) {
  const PairParams<T>& pair = params.pair;
  if (pair.batch() == 0) return nullptr;
  if (scratch == nullptr || sweep_bytes_by(base, pair, true) == 0)
    return interact_backward(params, stream);
  Divider memory(scratch);
  SweptParams<T> swept{params, divide(pair, base, true, memory)};
  Queue queue(stream);
  pair.values ? sweep<T, true>(swept, queue) : sweep<T, false>(swept, queue);
  return queue.error();
}

template const char* interact_backward_by(int64_t, const InteractBackwardParams<float>&, void*,
                                          void*);
template const char* interact_backward_by(int64_t, const InteractBackwardParams<double>&, void*,
                                          void*);

}  // namespace qflux::cuda
