// What rows get from the keys of a rectangle, forward and backward.
#pragma once

#include "../common/gather.cuh"
#include "sweep.cuh"

namespace qflux::cuda {

// The keys of its base block that a row sees; none where all pairs are one rectangle.
__device__ __forceinline__ Range near_keys(int64_t base, const Visibility& v, int row) {
  if (!v.causal) return {0, 0};
  const int position = row + static_cast<int>(v.shift);
  const int begin = position > 0 ? position & -static_cast<int>(base) : 0;
  const int end = static_cast<int>(v.visible_keys(row));
  return {lesser(begin, end), end};
}

// What a thread block works on: a super-block of rows of one rectangle.
template <class T>
struct SuperBlock {
  int64_t sequence, view;  // its own view stands behind those of its blocks
  BatchIndex b;
  Rectangle where;
  int first;  // rank of its first row

  __device__ __forceinline__ SuperBlock(const PairParams<T>& p, const Sweep<T>& sweep,
                                        const Level& level, int64_t work) {
    const int64_t rest = work / level.supers;
    const int super = static_cast<int>(work % level.supers);
    const int index = static_cast<int>(rest % level.rectangles);
    sequence = rest / level.rectangles;
    b = p.index(sequence);
    view = sweep.view(level, sequence, index, super);
    where = rectangle(p.visibility(b), level, index);
    first = super * kSuperRows;
  }
  __device__ __forceinline__ bool empty() const { return where.empty() || first >= where.rows(); }
};

template <class T>
QFLUX_INLINE int64_t super_blocks(const PairParams<T>& p, const Level& level) {
  return p.batch() * level.rectangles * level.supers;
}

// The ops give a sweep what it computes in, so its kernels need no code for half precision, which
// takes registers that they do not have.
template <class T>
__device__ __forceinline__ void assume_same_storage([[maybe_unused]] const View<T>& view) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(view.storage == Storage::kSame);
#endif
}
template <class T>
__device__ __forceinline__ void assume_same_storage(const PairParams<T>& p) {
  assume_same_storage(p.states);
  assume_same_storage(p.key_points);
  assume_same_storage(p.values);
}
template <class T>
__device__ __forceinline__ void assume_same_storage(const InteractParams<T>& p) {
  assume_same_storage(p.pair);
}
template <class T>
__device__ __forceinline__ void assume_same_storage(const InteractBackwardParams<T>& p) {
  assume_same_storage(p.pair);
  assume_same_storage(p.grad_context);
  assume_same_storage(p.grad_strength);
}

// Views of all blocks and super-blocks of a level. `Pass` says which rows are without geometry,
// and whether keys want sums over rows: then their records of columns `column` on are kept.
template <class Pass>
__global__ void __launch_bounds__(kSuperThreads, 1)
    view_blocks(typename Pass::Params params, Sweep<typename Pass::Scalar> sweep, Level level,
                int column) {
  assume_same_storage(params);
  using T = typename Pass::Scalar;
  constexpr double kInfinity = HUGE_VAL;
  using Bounds = Buffer<double, kSuperBlocks * 4>;
  QFLUX_SHARED(Bounds, bounds);
  const PairParams<T>& p = params.pair;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t work = blockIdx.x; work < super_blocks(p, level); work += gridDim.x) {
    const SuperBlock<T> super(p, sweep, level, work);
    if (super.empty()) continue;
    const Frame frame = sweep.frames[work / level.supers];
    const Pass pass(params, super.b);
    double first = kInfinity, last = -kInfinity, low = kInfinity, high = -kInfinity;
#pragma unroll 1
    for (int r = 0; r < kLaneRows; ++r) {
      const int rank = super.first + warp * kRankBlock + r * kWarp + lane;
      if (rank >= super.where.rows()) continue;
      const int64_t at = super.sequence * p.rows + super.where.row_begin + rank;
      const int row = row_of(sweep.order[at]);
      RowView view{0, -kInfinity, kInfinity};
      if (pass.has_geometry(row, column)) {
        const Point<T> q = query<typename Pass::Score>(p, super.b, row);
        view = view_row(frame, q.x, q.y, pass.limit(row));
      }
      const bool sees = view.low > -kInfinity && view.high < kInfinity;
      const double angle = sees ? view.angle : 0.0;
      first = angle < first ? angle : first;
      last = angle > last ? angle : last;
      low = sees ? (view.low < low ? view.low : low) : -kInfinity;
      high = sees ? (view.high > high ? view.high : high) : kInfinity;
      pass.keep(sweep, at, row, column);
    }
    first = least_of_lanes(first), last = -least_of_lanes(-last);
    low = least_of_lanes(low), high = -least_of_lanes(-high);
    if (lane == 0) {
      sweep.views[super.view + warp] = common_view(first, last, low, high);
      double* own = bounds.at + 4 * warp;
      own[0] = first, own[1] = last, own[2] = low, own[3] = high;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int n = 1; n < kSuperBlocks; ++n) {
        const double* other = bounds.at + 4 * n;
        first = other[0] < first ? other[0] : first;
        last = other[1] > last ? other[1] : last;
        low = other[2] < low ? other[2] : low;
        high = other[3] > high ? other[3] : high;
      }
      sweep.views[super.view + kSuperBlocks] = common_view(first, last, low, high);
    }
    pass.sum_records(sweep, super);
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ WhiteKey white_key(const Whitening& whiten, Point<T> key, bool tame) {
  WhiteKey z = whiten(key.x, key.y);
  if (!tame) z.slack = HUGE_VAL - HUGE_VAL;  // NaN
  return z;
}

// Adds to the rows of all rectangles of a level what they get from its keys. A thread block streams
// the keys of a rectangle past its super-block: most keys are certain for all its rows or none, and
// enter its moments or are forgotten; the others are listed, and each warp looks at the list again
// for its own rows, pair by pair where its block is not certain either.
template <class Pass>
__global__ void __launch_bounds__(kSuperThreads, 1)
    meet_keys(typename Pass::Params params, Sweep<typename Pass::Scalar> sweep, Level level,
              int column) {
  assume_same_storage(params);
  using T = typename Pass::Scalar;
  using Traits = SweepTraits<T, Pass::kOwnValues>;
  constexpr int kWidth = Pass::Sizes::kWidth, kSums = Pass::kSums, kTile = kSuperThreads;
  using Tile = Buffer<T, kTile * kWidth>;
  using List = Buffer<int, 2 * kTile>;
  using Counts = Buffer<int, kSuperBlocks>;
  using Slots = Buffer<double, kSuperThreads>;
  QFLUX_SHARED(Tile, tile);
  QFLUX_SHARED(List, list);
  QFLUX_SHARED(Counts, counts);
  QFLUX_SHARED(Slots, slots);
  const PairParams<T>& p = params.pair;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto add = [&](unsigned bits, int from, double sum) {
    constexpr int kValues = Pass::kOwnValues ? 2 : 0;
    return add_slots<Traits::kUsed, Traits::kSlots, kWidth, 0, kValues, -1>(
        bits, tile.at + from * kWidth, sum);
  };
  // What is listed: a key, or its complement where it has no geometry.
  const auto point_of = [](int entry) { return entry < 0 ? ~entry : entry; };

  for (int64_t work = blockIdx.x; work < super_blocks(p, level); work += gridDim.x) {
    const SuperBlock<T> super(p, sweep, level, work);
    if (super.empty()) continue;
    const Rectangle& where = super.where;
    // Read again where they are used: held, they would cost the registers of the pair loop.
    const Whitening& whiten = sweep.whitenings[work / level.supers];
    const RowsView* views = sweep.views + super.view;
    const Pass pass(params, super.b);
    const int first = super.first + warp * kRankBlock + lane;
    const bool no_rows = first - lane >= where.rows();
    const auto is_row = [&](int r) { return first + r * kWarp < where.rows(); };
    const Ranked* order = sweep.order + super.sequence * p.rows + where.row_begin;
    const auto for_each_row = [&](const auto& visit) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
        if (is_row(r)) visit(r, row_of(order[first + r * kWarp]));
    };
    const auto put = [&](int n, int key) {
      put_record<kWidth>(tile.at + n * kWidth,
                         [&](T(&record)[kWidth]) { pass.fetch(key, column, record); });
    };
    typename Pass::Owner owner[kLaneRows] = {};
    for_each_row([&](int r, int row) { owner[r] = pass.load(row, column); });

    double all_sum = 0, own_sum = 0, total[kLaneRows][kSums] = {};
    int listed = 0;
#pragma unroll 1
    for (int start = where.key_begin; start < where.key_end; start += kTile) {
      const int key = start + static_cast<int>(threadIdx.x);
      Certainty certainty = Certainty::kNone;
      bool tame = true;
      if (key < where.key_end) {
        tame = sweep.tame[super.sequence * p.keys + key] != 0;
        const Point<T> at = load_point(p.key_points, super.b, key);
        certainty = classify(views[kSuperBlocks], white_key(whiten, at, tame));
        if (certainty == Certainty::kAll) put(threadIdx.x, key);
      }
      const unsigned certain = __ballot_sync(kWholeWarp, certainty == Certainty::kAll);
      const unsigned tested = __ballot_sync(kWholeWarp, certainty == Certainty::kTest);
      __syncwarp();
      all_sum = add(certain, warp * kWarp, all_sum);
      if (lane == 0) counts.at[warp] = __popc(tested);
      __syncthreads();
      int place = listed + __popc(tested & ((1u << lane) - 1));
      for (int n = 0; n < kSuperBlocks; ++n) {
        place += n < warp ? counts.at[n] : 0;
        listed += counts.at[n];
      }
      if (certainty == Certainty::kTest) list.at[place] = tame ? key : ~key;
      __syncthreads();
      if (listed < kTile && start + kTile < where.key_end) continue;

#pragma unroll 1
      for (int chunk = 0; chunk < listed; chunk += kTile) {
        const int count = lesser(kTile, listed - chunk);
        if (static_cast<int>(threadIdx.x) < count)
          put(threadIdx.x, point_of(list.at[chunk + threadIdx.x]));
        __syncthreads();
        T sums[kLaneRows][kSums] = {};
#pragma unroll 1
        for (int group = 0; group < count; group += kWarp) {
          Certainty own = Certainty::kNone;
          if (group + lane < count && !no_rows) {
            const T* at = tile.at + (group + lane) * kWidth;
            const bool listed_tame = list.at[chunk + group + lane] >= 0;
            own = classify(views[warp], white_key(whiten, Point<T>{at[0], at[1]}, listed_tame));
          }
          own_sum = add(__ballot_sync(kWholeWarp, own == Certainty::kAll), group, own_sum);
          unsigned pairs = __ballot_sync(kWholeWarp, own == Certainty::kTest);
#pragma unroll 1
          for (; pairs != 0; pairs &= pairs - 1) {
            T record[kWidth];
            read_record(tile.at + (group + __ffs(pairs) - 1) * kWidth, record);
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r)
              pass.accumulate(owner[r], record, is_row(r), sums[r]);
          }
        }
#pragma unroll
        for (int n = 0; n < kLaneRows * kSums; ++n)
          total[n / kSums][n % kSums] += sums[n / kSums][n % kSums];
        __syncthreads();
      }
      listed = 0;
    }

    // The certain keys of the super-block and of the own block, slot by slot.
    slots.at[threadIdx.x] = sum_over_lanes(all_sum, Traits::kSlots);
    own_sum = sum_over_lanes(own_sum, Traits::kSlots);
    __syncthreads();
    for (int n = 0; n < kSuperBlocks; ++n) own_sum += slots.at[n * kWarp + lane];
    __syncthreads();
    slots.at[threadIdx.x] = own_sum;
    __syncwarp();
    // Rows without geometry have tested every pair, and must not meet sums of zero with a NaN.
    const bool certain = views[warp].high == views[warp].high;
    for_each_row([&](int r, int row) {
      pass.add(sweep, super.sequence, row, column, owner[r],
               certain ? slots.at + warp * kWarp : nullptr, total[r]);
    });
    __syncthreads();
  }
}

}  // namespace qflux::cuda
