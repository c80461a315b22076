// The loop that every pass over pairs shares: owners, a few in the registers of each thread, gather
// sums over the others they meet, which stream through shared memory. Forward and row pass own rows
// and stream keys; the key pass owns keys and streams rows. Each sum is written by the one thread
// that owns it and taken in a fixed order, so no atomics and the same bits on every run.
//
// A `Pass` says what is summed:
//   Scalar, Params, Sizes (TileTraits), Owner
//   kColumnSums, kSums     sums of one chunk of value columns come first, sums over all columns last
//   kLoopsColumns          one block walks all columns, instead of one block for each chunk of them
//   owners(params), columns(params)
//   valid()                owners inside the sequence; the ones behind are padding
//   range(owner)           others it meets; both ends never decrease from one owner to the next
//   load(owner, column)    its registers
//   fetch(other, column, record)
//   accumulate(owner, record, sums)
//   store(owner, column, last, sums)
#pragma once

#include "pairs.cuh"
#include "tiles.cuh"

namespace qflux::cuda {

struct Range {
  int64_t begin, end;
};

// How the blocks of a launch divide the work among themselves.
struct Schedule {
  int64_t batch, owner_blocks, column_blocks;
  bool reversed;  // the last owners first: under a causal mask they meet the most
  int split;      // warps of a block that share the same owners, each with its part of the others
};

template <class Numbers, int kSize>
struct alignas(16) Buffer {
  Numbers at[kSize];
};

__device__ __forceinline__ int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Others that any owner in [first, last) meets, and others that all of them meet.
template <class Pass>
__device__ __forceinline__ Range met_by_any(const Pass& pass, int64_t first, int64_t last) {
  if (first >= last) return {0, 0};
  return {pass.range(first).begin, pass.range(last - 1).end};
}
template <class Pass>
__device__ __forceinline__ Range met_by_all(const Pass& pass, int64_t first, int64_t last) {
  if (first >= last) return {0, 0};
  return {pass.range(last - 1).begin, pass.range(first).end};
}

// Adds the records from <= j < to of a tile; `begin` and `end` bound what each owner meets.
template <bool kMasked, class Pass, int kOwners, int kSums>
__device__ __forceinline__ void add_records(const Pass& pass,
                                            const typename Pass::Owner (&owner)[kOwners],
                                            const typename Pass::Scalar* tile, int from, int to,
                                            const int (&begin)[kOwners], const int (&end)[kOwners],
                                            typename Pass::Scalar (&sums)[kOwners][kSums]) {
  constexpr int kWidth = Pass::Sizes::kWidth;
#pragma unroll(kMasked ? 1 : Pass::Sizes::kUnroll)
  for (int j = from; j < to; j += 2) {
    typename Pass::Scalar record[2][kWidth];
    read_two<kWidth>(tile + j * kWidth, record);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < kOwners; ++r)
        if (!kMasked || (j + n >= begin[r] && j + n < end[r]))
          pass.accumulate(owner[r], record[n], sums[r]);
  }
}

// Moves the totals of all slices into those of slice 0, in the order of the slices.
template <class T, int kOwners, int kSums>
__device__ __forceinline__ void merge_slices(int split, int slice, int group, T* shared,
                                             Total<T> (&total)[kOwners][kSums]) {
  const int lane = threadIdx.x % kWarp, peers = kThreads / split;
  T* mine = shared + group * kWarp + lane;
  for (int other = 1; other < split; ++other) {
    __syncthreads();
    if (slice == other) {
#pragma unroll
      for (int n = 0; n < kOwners * kSums; ++n) {
        mine[2 * n * peers] = total[n / kSums][n % kSums].sum;
        mine[(2 * n + 1) * peers] = total[n / kSums][n % kSums].error;
        total[n / kSums][n % kSums] = {};
      }
    }
    __syncthreads();
    if (slice == 0) {
#pragma unroll
      for (int n = 0; n < kOwners * kSums; ++n)
        total[n / kSums][n % kSums].add(
            Total<T>{mine[2 * n * peers], mine[(2 * n + 1) * peers]});
    }
  }
}

template <class Pass>
__global__ void __launch_bounds__(kThreads)
    gather(typename Pass::Params params, Schedule schedule) {
  using T = typename Pass::Scalar;
  using Sizes = typename Pass::Sizes;
  constexpr int kOwners = Sizes::kOwners, kSums = Pass::kSums, kWidth = Sizes::kWidth;
  constexpr int kTile = Sizes::kTile, kChunk = Sizes::kChunk;
  static_assert(kThreads / 2 * kOwners * kSums * 2 <= kTile * kWidth,
                "the slices of a split pass their totals through the tile");
  using Tile = Buffer<T, kTile * kWidth>;
  QFLUX_SHARED(Tile, tile);

  const int lane = threadIdx.x % kWarp, split = schedule.split;
  const int slice = threadIdx.x / kWarp % split, group = threadIdx.x / kWarp / split;
  const int64_t per_block = kThreads / split * kOwners;
  const int64_t columns = Pass::columns(params);
  const int64_t works = schedule.batch * schedule.owner_blocks * schedule.column_blocks;

  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    // Owner blocks change slowest, so that the heaviest of all sequences start first.
    const int64_t b = work % schedule.batch, rest = work / schedule.batch;
    const int64_t order = rest / schedule.column_blocks;
    const int64_t block = schedule.reversed ? schedule.owner_blocks - 1 - order : order;
    const Pass pass(params, b);
    const int64_t valid = pass.valid(), block_first = block * per_block;
    const int64_t first = block_first + group * (kWarp * kOwners);
    const int64_t last = lesser(first + kWarp * kOwners, valid);
    const Range all = met_by_any(pass, block_first, lesser(block_first + per_block, valid));
    const Range any = met_by_any(pass, first, last), common = met_by_all(pass, first, last);

    Total<T> total[kOwners][kSums] = {};
    int64_t column = rest % schedule.column_blocks * Sizes::kColumns;
    const int64_t column_end = Pass::kLoopsColumns ? columns : column + 1;
    for (; column < column_end; column += Sizes::kColumns) {
      typename Pass::Owner owner[kOwners] = {};
      int64_t index[kOwners];
#pragma unroll
      for (int r = 0; r < kOwners; ++r) {
        // Owners past the end repeat the last one, and are not stored.
        index[r] = lesser(first + lane + r * kWarp, valid - 1);
        if (valid > 0) owner[r] = pass.load(index[r], column);
      }
      for (int64_t start = all.begin; start < all.end; start += kTile) {
        const int count = static_cast<int>(lesser(kTile, all.end - start));
        __syncthreads();
        stage<kWidth>(tile.at, count,
                      [&](int n, T(&record)[kWidth]) { pass.fetch(start + n, column, record); });
        __syncthreads();
        for (int chunk = slice * kChunk; chunk < count; chunk += split * kChunk) {
          const int64_t from = start + chunk, to = lesser(from + kChunk, start + count);
          if (to <= any.begin || from >= any.end) continue;
          T sums[kOwners][kSums] = {};
          int begin[kOwners], end[kOwners];
          if (from >= common.begin && from + kChunk <= common.end) {
            add_records<false>(pass, owner, tile.at, chunk, chunk + kChunk, begin, end, sums);
          } else {
#pragma unroll
            for (int r = 0; r < kOwners; ++r) {
              const Range met = pass.range(index[r]);
              begin[r] = static_cast<int>(greater(met.begin - start, 0));
              end[r] = static_cast<int>(lesser(greater(met.end - start, 0), count));
            }
            const int skipped = static_cast<int>(greater(any.begin, from) - start);
            add_records<true>(pass, owner, tile.at, skipped - skipped % 2,
                              static_cast<int>(lesser(any.end, to) - start), begin, end, sums);
          }
#pragma unroll
          for (int n = 0; n < kOwners * kSums; ++n)
            total[n / kSums][n % kSums].add(sums[n / kSums][n % kSums]);
        }
      }
      if (split > 1) merge_slices(split, slice, group, tile.at, total);
      const bool is_last = column + Sizes::kColumns >= column_end;
#pragma unroll
      for (int r = 0; r < kOwners; ++r) {
        const int64_t n = first + lane + r * kWarp;
        T sums[kSums];
#pragma unroll
        for (int c = 0; c < kSums; ++c) sums[c] = total[r][c].get();
        if (slice == 0 && n < Pass::owners(params)) pass.store(n, column, is_last, sums);
#pragma unroll
        for (int c = 0; c < Pass::kColumnSums; ++c) total[r][c] = {};
      }
    }
  }
}

template <class Pass>
const char* launch_gather(const typename Pass::Params& params, bool reversed, void* stream) {
  using Sizes = typename Pass::Sizes;
  const int64_t owners = Pass::owners(params), columns = Pass::columns(params);
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  Schedule schedule{params.pair.batch, 0, 1, reversed, 1};
  if (!Pass::kLoopsColumns) schedule.column_blocks = blocks(columns, Sizes::kColumns);
  const int64_t copies = schedule.batch * schedule.column_blocks;
  const auto owner_blocks = [&](int split) {
    return blocks(owners, kThreads / split * Sizes::kOwners);
  };
  while (schedule.split < kWarps && owners > kThreads / schedule.split * Sizes::kOwners / 2 &&
         owner_blocks(schedule.split) * copies < kEnoughBlocks)
    schedule.split *= 2;
  schedule.owner_blocks = owner_blocks(schedule.split);
  return launch(gather<Pass>, schedule.owner_blocks * copies, kThreads, stream, params, schedule);
}

}  // namespace qflux::cuda
