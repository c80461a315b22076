// The loop that every pass over pairs shares: owners, a few in the registers of each thread, gather
// sums over the sources they meet, which stream through shared memory. Forward and row pass own
// rows and stream keys; the key pass owns keys and streams rows. Each sum is written by the one
// thread that owns it and taken in a fixed order, so no atomics and the same bits on every run.
//
// A `Pass` is made from params and a BatchIndex, and says what is summed, by
//  - Scalar, Score, Params, Sizes (a TileTraits), Owner;
//  - kColumnSums and kSums: the sums of one chunk of value columns, then those over all columns;
//  - kLoopsColumns: a block walks all columns, instead of one block for each chunk of them;
//  - kShowsDropped: a source that an owner sees and drops must show where it is not finite;
//  - owners(params), sources(params), columns(params);
//  - valid(): owners inside the sequence, the ones behind are padding;
//  - range(owner): sources it meets; neither end decreases from one owner to the next;
//  - load(owner, column) into registers, fetch(source, column, record) into shared memory;
//  - accumulate<careful>(owner, record, visible, sums), which may take a record to be visible and,
//    with kShowsDropped, finite unless it is to be careful;
//  - store(owner, column, last, sums).
#pragma once

#include "pairs.cuh"
#include "tiles.cuh"

namespace qflux::cuda {

// How the blocks of a launch divide the work among themselves.
struct Schedule {
  int64_t batch;
  int owner_blocks, column_blocks;
  bool reversed;  // the last owners first: under a causal mask they meet the most
  // 1 << split_bits warps of a block share the same owners, each with its slice of the sources.
  int split_bits;
  // The sources are met in so many parts of so many, each by a block of its own. What it finds lies
  // in `partials` of the params until merge_parts adds it up.
  int parts = 1, part_sources = 0;
};

template <class Numbers, int kSize>
struct alignas(16) Buffer {
  Numbers at[kSize];
};

// Sources that any owner in [first, last) meets, and sources that all of them meet.
template <class Pass>
__device__ __forceinline__ Range met_by_any(const Pass& pass, int first, int last) {
  if (first >= last) return {0, 0};
  return {pass.range(first).begin, pass.range(last - 1).end};
}
template <class Pass>
__device__ __forceinline__ Range met_by_all(const Pass& pass, int first, int last) {
  if (first >= last) return {0, 0};
  return {pass.range(last - 1).begin, pass.range(first).end};
}

// Calls visit(r, n) for the owners of a thread, `kWarp` apart. Those past the end repeat the last
// one, and are not stored.
template <int kOwners, class Pass, class Visit>
__device__ __forceinline__ void for_each_owner(const Pass& pass, int first, const Visit& visit) {
  const int valid = pass.valid(), lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kOwners; ++r)
    if (valid > 0) visit(r, lesser(opaque(first) + lane + r * kWarp, valid - 1));
}

template <class Pass, int kOwners>
__device__ __forceinline__ void load_owners(const Pass& pass, int first, int column,
                                            typename Pass::Owner (&owner)[kOwners]) {
  for_each_owner<kOwners>(pass, first, [&](int r, int n) { owner[r] = pass.load(n, column); });
}
template <class Pass, int kOwners>
__device__ __forceinline__ void find_ranges(const Pass& pass, int first, Range (&met)[kOwners]) {
  for_each_owner<kOwners>(pass, first, [&](int r, int n) { met[r] = pass.range(n); });
}

// Adds the sources from <= j < to of a tile that starts at `start`; `kCareful` unless all owners
// see them.
template <bool kCareful, class Pass, int kOwners, int kSums>
__device__ __forceinline__ void add_sources(const Pass& pass,
                                            const typename Pass::Owner (&owner)[kOwners],
                                            const Range (&met)[kOwners],
                                            const typename Pass::Scalar* tile, int start, int from,
                                            int to, typename Pass::Scalar (&sums)[kOwners][kSums]) {
  constexpr int kWidth = Pass::Sizes::kWidth, kAtOnce = Pass::Sizes::kAtOnce;
  [[maybe_unused]] constexpr int kUnroll = kUnrollOf<typename Pass::Score, typename Pass::Sizes>;
#pragma unroll(kCareful ? 1 : kUnroll)
  for (int j = from; j < to; j += kAtOnce) {
    typename Pass::Scalar record[kAtOnce][kWidth];
    read_records(tile + (j - start) * kWidth, record);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
      for (int r = 0; r < kOwners; ++r)
        pass.template accumulate<kCareful>(
            owner[r], record[n], !kCareful || ((j + n >= met[r].begin) & (j + n < met[r].end)),
            sums[r]);
  }
}

// Takes the sums of a chunk into those that outlast it.
template <class T, int kOwners, int kSums>
__device__ __forceinline__ void add_to_totals(const T (&sums)[kOwners][kSums],
                                              CompensatedSum<T> (&total)[kOwners][kSums]) {
#pragma unroll
  for (int n = 0; n < kOwners * kSums; ++n)
    total[n / kSums][n % kSums].add(sums[n / kSums][n % kSums]);
}

// Stores the totals of a thread's owners where `stores`.
template <class Pass, int kOwners, int kSums>
__device__ __forceinline__ void store_owners(
    const Pass& pass, int first, int owners, int column, bool last, bool stores,
    const CompensatedSum<typename Pass::Scalar> (&total)[kOwners][kSums]) {
#pragma unroll
  for (int r = 0; r < kOwners; ++r) {
    const int n = opaque(first) + static_cast<int>(threadIdx.x) % kWarp + r * kWarp;
    typename Pass::Scalar sums[kSums];
#pragma unroll
    for (int c = 0; c < kSums; ++c) sums[c] = total[r][c].get();
    if (stores && n < owners) pass.store(n, column, last, sums);
  }
}

// Moves the totals of all slices into those of slice 0, in the order of the slices, as many at a
// time as have room in `shared`.
template <int kRoom, class T, int kOwners, int kSums>
__device__ __forceinline__ void merge_slices(int split, int slice, int group, T* shared,
                                             CompensatedSum<T> (&total)[kOwners][kSums]) {
  constexpr int kAll = kOwners * kSums, kAtOnce = lesser(kAll, kRoom / kThreads);
  const int lane = threadIdx.x % kWarp, peers = kThreads / split;
  T* mine = shared + group * kWarp + lane;
  for (int other = 1; other < split; ++other) {
#pragma unroll
    for (int from = 0; from < kAll; from += kAtOnce) {
      __syncthreads();
      if (slice == other) {
#pragma unroll
        for (int n = from; n < lesser(from + kAtOnce, kAll); ++n) {
          mine[2 * (n - from) * peers] = total[n / kSums][n % kSums].value;
          mine[(2 * (n - from) + 1) * peers] = total[n / kSums][n % kSums].error;
          total[n / kSums][n % kSums] = {};
        }
      }
      __syncthreads();
      if (slice == 0) {
#pragma unroll
        for (int n = from; n < lesser(from + kAtOnce, kAll); ++n)
          total[n / kSums][n % kSums].add(
              CompensatedSum<T>{mine[2 * (n - from) * peers], mine[(2 * (n - from) + 1) * peers]});
      }
    }
  }
}

// By how many warps a work turns. Works that share an SM are as far apart as it has SMs, which is
// often a multiple of kWarps, so the number is spread over all bits (Fibonacci hashing).
__device__ __forceinline__ unsigned turn_of(int64_t work) {
  static_assert(kWarps == 4, "two bits of the hash");
  return static_cast<uint32_t>(work) * 2654435769u >> 30;
}

// Whether all numbers of a record are finite.
template <class T, int kWidth>
__device__ __forceinline__ bool is_finite(const T (&record)[kWidth]) {
  T zero = 0;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) zero = multiply_add(record[c], T(0), zero);
  return zero == T(0);
}

// What a part of the sources gave to the sums of an owner at one step through the columns.
template <class T, int kSums>
struct Partials {
  T* data;  // [part][sequence][step][sum][value, error][owner]
  int64_t batch, steps, owners;

  __device__ __forceinline__ T* at(int part, int64_t sequence, int64_t step, int owner) const {
    return data + ((part * batch + sequence) * steps + step) * (2 * kSums * owners) + owner;
  }
  __device__ __forceinline__ void set(T* at, const CompensatedSum<T> (&sums)[kSums]) const {
#pragma unroll
    for (int n = 0; n < kSums; ++n) set(at, n, sums[n]);
  }
  __device__ __forceinline__ void set(T* at, int n, const CompensatedSum<T>& sum) const {
    at[2 * n * owners] = sum.value;
    at[(2 * n + 1) * owners] = sum.error;
  }
  __device__ __forceinline__ void add_to(CompensatedSum<T> (&sums)[kSums], const T* at) const {
#pragma unroll
    for (int n = 0; n < kSums; ++n) add_to(sums[n], at, n);
  }
  __device__ __forceinline__ void add_to(CompensatedSum<T>& sum, const T* at, int n) const {
    sum.add(CompensatedSum<T>{at[2 * n * owners], at[(2 * n + 1) * owners]});
  }
};

template <class Pass>
QFLUX_INLINE int64_t column_steps(const typename Pass::Params& params) {
  return (Pass::columns(params) + Pass::Sizes::kColumns - 1) / Pass::Sizes::kColumns;
}
template <class Pass>
__device__ __forceinline__ Partials<typename Pass::Scalar, Pass::kSums> partials_of(
    const typename Pass::Params& params) {
  return {params.pair.partials, params.pair.batch(), column_steps<Pass>(params),
          Pass::owners(params)};
}

// `kDivided`: the schedule has more than one part.
template <class Pass, bool kDivided>
__global__ void __launch_bounds__(kThreads, Pass::Sizes::kBlocksPerSm)
    gather(typename Pass::Params params, Schedule schedule) {
  using T = typename Pass::Scalar;
  using Sizes = typename Pass::Sizes;
  constexpr int kOwners = Sizes::kOwners, kSums = Pass::kSums, kWidth = Sizes::kWidth;
  constexpr int kTile = Sizes::kTile, kChunk = Sizes::kChunk;
  using Tile = Buffer<T, kTile * kWidth>;
  QFLUX_SHARED(Tile, tile);

  const int split = 1 << schedule.split_bits;
  const int per_block = (kThreads * kOwners) >> schedule.split_bits;
  const int parts = kDivided ? schedule.parts : 1;
  const int64_t works = schedule.batch * schedule.owner_blocks * parts * schedule.column_blocks;

  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    // Owner blocks change slowest, so that the heaviest of all sequences start first.
    const int64_t rest = work / schedule.batch;
    const int order = static_cast<int>(rest / schedule.column_blocks / parts);
    const auto part = [&] { return static_cast<int>(rest / schedule.column_blocks % parts); };
    const int block = schedule.reversed ? schedule.owner_blocks - 1 - order : order;
    const BatchIndex b = params.pair.index(work % schedule.batch);
    const int outer = static_cast<int>(b.outer), inner = static_cast<int>(b.inner);
    // Addresses in a sequence are found anew where they are used, not held through the pair loop.
    const auto anew = [&] { return Pass(params, {opaque(outer), opaque(inner)}); };
    const Pass pass(params, {outer, inner});
    // A warp stays with its scheduler, and under a causal mask the last owners of a block meet the
    // most: which warp has them changes from one work to the next.
    const int warp = static_cast<int>((threadIdx.x / kWarp + turn_of(work)) % kWarps);
    const int slice = warp & (split - 1), group = warp >> schedule.split_bits;
    const int valid = pass.valid(), block_first = block * per_block;
    const int first = block_first + group * (kWarp * kOwners);
    const int last = lesser(first + kWarp * kOwners, valid);
    Range all = met_by_any(pass, block_first, lesser(block_first + per_block, valid));
    if constexpr (kDivided) {
      const int begin = part() * schedule.part_sources;
      all = {greater(all.begin, begin), lesser(all.end - begin, schedule.part_sources) + begin};
      if (all.begin >= all.end) continue;
    }
    const Range any = met_by_any(pass, first, last), common = met_by_all(pass, first, last);
    const int common_end = lesser(common.end, all.end);

    CompensatedSum<T> total[kOwners][kSums] = {};
    int column = static_cast<int>(rest % schedule.column_blocks) * Sizes::kColumns;
    const int column_end =
        Pass::kLoopsColumns ? static_cast<int>(Pass::columns(params)) : column + 1;
    do {
      typename Pass::Owner owner[kOwners] = {};
      load_owners(anew(), first, column, owner);
      for (int start = all.begin; start < all.end; start += kTile) {
        const int count = lesser(kTile, all.end - start);
        __syncthreads();
        const Pass source = anew();
        bool finite = true;
        stage<kWidth>(tile.at, count, kThreads, [&](int n, T(&record)[kWidth]) {
          source.fetch(start + n, column, record);
          if constexpr (Pass::kShowsDropped) finite &= is_finite(record);
        });
        if constexpr (Pass::kShowsDropped)
          finite = __syncthreads_and(finite);
        else
          __syncthreads();
        for (int chunk = start + slice * kChunk; chunk < start + count; chunk += split * kChunk) {
          const int chunk_end = lesser(chunk + kChunk, start + count);
          if (chunk_end <= any.begin || chunk >= any.end) continue;
          T sums[kOwners][kSums] = {};
          Range met[kOwners] = {};
          if (finite && chunk >= common.begin && chunk + kChunk <= common_end) {
            add_sources<false>(pass, owner, met, tile.at, start, chunk, chunk + kChunk, sums);
          } else {
            find_ranges(anew(), first, met);
            const int skipped = greater(any.begin - chunk, 0);
            add_sources<true>(pass, owner, met, tile.at, start,
                              chunk + skipped - skipped % Sizes::kAtOnce,
                              lesser(chunk_end, any.end), sums);
          }
          add_to_totals(sums, total);
        }
      }
      if (split > 1) merge_slices<kTile * kWidth>(split, slice, group, tile.at, total);
      const int owners = static_cast<int>(Pass::owners(params));
      if constexpr (kDivided) {
        const auto partials = partials_of<Pass>(params);
        T* const at = partials.at(part(), work % schedule.batch, column / Sizes::kColumns,
                                  opaque(first) + static_cast<int>(threadIdx.x) % kWarp);
#pragma unroll
        for (int r = 0; r < kOwners; ++r)
          if (slice == 0 && first + static_cast<int>(threadIdx.x) % kWarp + r * kWarp < owners)
            partials.set(at + r * kWarp, total[r]);
      } else {
        const bool is_last = column + Sizes::kColumns >= column_end;
        store_owners(anew(), first, owners, column, is_last, slice == 0, total);
      }
#pragma unroll
      for (int r = 0; r < kOwners; ++r)
#pragma unroll
        for (int c = 0; c < Pass::kColumnSums; ++c) total[r][c] = {};
      column += Sizes::kColumns;
    } while (Pass::kLoopsColumns && column < column_end);
  }
}

constexpr int kMergeThreads = 128;

// Adds up the parts of each owner, in their order, and stores the sums.
template <class Pass>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(typename Pass::Params params, Schedule schedule) {
  using T = typename Pass::Scalar;
  constexpr int kSums = Pass::kSums, kColumns = Pass::Sizes::kColumns;
  const int per_block = (kThreads * Pass::Sizes::kOwners) >> schedule.split_bits;
  const auto partials = partials_of<Pass>(params);
  const int64_t works = schedule.batch * schedule.column_blocks * partials.owners;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x; work < works;
       work += static_cast<int64_t>(gridDim.x) * kMergeThreads) {
    const int64_t rest = work / partials.owners, sequence = rest % schedule.batch;
    const int owner = static_cast<int>(work % partials.owners);
    const Pass pass(params, params.pair.index(sequence));
    const int first = owner / per_block * per_block;
    // Those of the owner's block: it left nothing of other parts.
    const Range all = met_by_any(pass, first, lesser(first + per_block, pass.valid()));
    const int64_t begin = rest / schedule.batch,
                  end = Pass::kLoopsColumns ? partials.steps : begin + 1;
    for (int64_t step = begin; step < end; ++step) {
      CompensatedSum<T> total[kSums] = {};
      for (int part = all.begin / schedule.part_sources; part * schedule.part_sources < all.end;
           ++part)
        partials.add_to(total, partials.at(part, sequence, step, owner));
      T sums[kSums];
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums[n] = total[n].get();
      pass.store(owner, static_cast<int>(step) * kColumns, step + 1 == end, sums);
    }
  }
}

// What 32 bits cannot count: an error, or null.
template <class T>
const char* check_lengths(const PairParams<T>& pair, int64_t columns) {
  if (pair.rows > kMaxLength || pair.keys > kMaxLength || columns > kMaxLength)
    return "the dense CUDA kernels take up to 2^30 rows, keys and value columns";
  if (pair.outer > kMaxLength || pair.inner > kMaxLength)
    return "the dense CUDA kernels take up to 2^30 sequences of a batch dimension";
  return nullptr;
}

template <class Sizes>
Schedule schedule_of(int64_t batch, int owners, int64_t sources, int column_blocks, bool reversed) {
  Schedule schedule{batch, 0, column_blocks, reversed, 0};
  const auto blocks = [&] {
    const int per_block = (kThreads * Sizes::kOwners) >> schedule.split_bits;
    return (owners + per_block - 1) / per_block;
  };
  // A split pays where each slice finds chunks of its own.
  while (Sizes::kSplits && 1 << schedule.split_bits < kWarps &&
         sources > Sizes::kChunk << schedule.split_bits &&
         blocks() * batch * column_blocks < kEnoughBlocks)
    ++schedule.split_bits;
  schedule.owner_blocks = blocks();
  return schedule;
}

// Divides the sources of a schedule where it has too few works.
template <class Sizes>
void divide_sources(Schedule& schedule, int64_t sources) {
  const auto shares = [](int64_t all, int64_t size) { return (all + size - 1) / size; };
  const int64_t works = schedule.batch * schedule.owner_blocks * schedule.column_blocks;
  const int64_t tiles = shares(sources, Sizes::kTile);
  if (works == 0 || works >= kEnoughWorks || tiles < 2) return;
  const int64_t tiles_of_part = shares(tiles, shares(kEnoughWorks, works));
  schedule.part_sources = static_cast<int>(tiles_of_part * Sizes::kTile);
  schedule.parts = static_cast<int>(shares(tiles, tiles_of_part));
}

// Calls visit(values) with the number of columns that a pass takes at a time as values.kColumns.
template <int columns>
struct ValueColumns {
  static constexpr int kColumns = columns;
};
template <class T, class Visit>
const char* visit_values(const PairParams<T>& pair, const Visit& visit) {
  return pair.value_dim <= kNarrow ? visit(ValueColumns<kNarrow>())
                                   : visit(ValueColumns<kWide<T>>());
}

template <class Pass>
Schedule schedule_for(const typename Pass::Params& params, bool reversed, bool has_partials) {
  using Sizes = typename Pass::Sizes;
  const int64_t column_blocks = Pass::kLoopsColumns ? 1 : column_steps<Pass>(params);
  Schedule schedule =
      schedule_of<Sizes>(params.pair.batch(), static_cast<int>(Pass::owners(params)),
                         Pass::sources(params), static_cast<int>(column_blocks), reversed);
  if (has_partials) divide_sources<Sizes>(schedule, Pass::sources(params));
  return schedule;
}

// Of the partials of a pass.
template <class Pass>
int64_t partial_numbers(const typename Pass::Params& params) {
  const int64_t parts = schedule_for<Pass>(params, false, true).parts;
  return parts < 2 ? 0
                   : parts * params.pair.batch() * column_steps<Pass>(params) * 2 * Pass::kSums *
                         Pass::owners(params);
}

// The kernels of a pass: for all its sources, for a part of them, and to add up the parts, by so
// many threads for each owner.
template <class Pass>
struct GatherKernels {
  static constexpr int kMergers = 1;
  static auto whole() { return gather<Pass, false>; }
  static auto part() { return gather<Pass, true>; }
  static auto merge() { return merge_parts<Pass>; }
};

// `kMayDivide`: the sources are divided where there are partials and too few works.
template <class Pass, bool kMayDivide = true, class Kernels = GatherKernels<Pass>>
const char* launch_gather(const typename Pass::Params& params, bool reversed, void* stream) {
  if (const char* error = check_lengths(params.pair, Pass::columns(params))) return error;
  const bool divides = kMayDivide && params.pair.partials != nullptr;
  const Schedule schedule = schedule_for<Pass>(params, reversed, divides);
  const int64_t works = schedule.batch * schedule.column_blocks;
  const Grid grid{works * schedule.owner_blocks * schedule.parts, kThreads};
  if constexpr (kMayDivide) {
    if (schedule.parts > 1) {
      const int64_t merging = works * Pass::owners(params) * Kernels::kMergers;
      const Grid merge{(merging + kMergeThreads - 1) / kMergeThreads, kMergeThreads};
      Queue queue(stream);
      queue.launch(Kernels::part(), grid, params, schedule);
      queue.launch(Kernels::merge(), merge, params, schedule);
      return queue.error();
    }
  }
  return launch(Kernels::whole(), grid, stream, params, schedule);
}

}  // namespace qflux::cuda
