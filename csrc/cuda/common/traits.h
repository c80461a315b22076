// Sizes of the pair kernels, fixed at compile time, with their reasons.
#pragma once

#include <cstdint>

namespace qflux::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 4;  // a block of one warp per scheduler; several blocks share an SM
constexpr int kThreads = kWarp * kWarps;

// With fewer blocks than this the warps of a block share its owners and split what these meet:
// about two blocks for each SM of a large GPU.
constexpr int64_t kEnoughBlocks = 264;

// With fewer works than this the sources of each are divided among blocks of their own: twice what
// a large GPU holds at once, so that they end together although a causal mask makes them uneven.
constexpr int64_t kEnoughWorks = 1056;

// Positions are 32-bit inside a kernel, which saves registers; addresses are 64-bit everywhere.
constexpr int64_t kMaxLength = int64_t{1} << 30;

constexpr int64_t kSharedBytes = 48 * 1024;  // that a kernel may have without asking, everywhere

// Columns of values that are not the keys and as many as a model's cylinders usually have, and
// those of wider values.
constexpr int kNarrow = 4;
template <class T>
constexpr int kWide = sizeof(T) == 4 ? 8 : 4;

// `kValues`: columns of the values that are taken at a time, or 0: they are the keys.
// `kBlocksPerSm` blocks of four warps fit the registers of an SM: enough warps for a loop whose
// iterations hold many independent operations.
template <class T, int kValues>
struct Traits;

// With four owners one 16-byte read of two keys serves eight pairs; `kUnroll` iterations share the
// loop's own seven instructions.
template <>
struct Traits<float, 0> {
  static constexpr int kOwners = 4, kColumns = 2, kUnroll = 4, kBlocksPerSm = 4;
};
// A double fills two registers and its pipe is half as wide: two owners hide as much.
template <>
struct Traits<double, 0> {
  static constexpr int kOwners = 2, kColumns = 2, kUnroll = 4, kBlocksPerSm = 4;
};
// Eight columns make the recomputed weight a third of a pair's work; with their totals they leave
// registers for two owners.
template <>
struct Traits<float, 8> {
  static constexpr int kOwners = 2, kColumns = 8, kUnroll = 1, kBlocksPerSm = 3;
};
// Four columns leave them for four owners, which share the reads of a record, and for two
// iterations at a time. From 10.0 on the compiler needs a dozen more, and would spill them beside a
// third block.
template <>
struct Traits<float, 4> {
  static constexpr int kOwners = 4, kColumns = 4, kUnroll = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kBlocksPerSm = 2;
#else
  static constexpr int kBlocksPerSm = 3;
#endif
};
// Half as many columns of doubles, and one owner, leave registers for a fourth block.
template <>
struct Traits<double, 4> {
  static constexpr int kOwners = 1, kColumns = 4, kUnroll = 1, kBlocksPerSm = 4;
};

// Sources in shared memory, in records of `width` numbers.
template <class T, int kValues, int width, int blocks_per_sm = Traits<T, kValues>::kBlocksPerSm>
struct TileTraits : Traits<T, kValues> {
  static constexpr int kWidth = width, kBlocksPerSm = blocks_per_sm;
  static constexpr bool kSplits = true;  // warps of a block may share its owners
  // Records are read in 16-byte parts, two at once where one is not made of whole parts.
  static constexpr int kAtOnce = width * sizeof(T) % 16 == 0 ? 1 : 2;
  // Sources whose sums are taken in T from zero: few enough that their rounding stays far below
  // what a score's own rounding does, enough to make the compensated totals a few percent of the
  // work.
  static constexpr int kChunk = width == 2 ? 256 : 128;
  static constexpr int kTile = kWarps * kChunk;  // a chunk for each warp of a split

  static_assert(kAtOnce * width * sizeof(T) % 16 == 0, "records are read in 16-byte parts");
  static_assert(kChunk % kAtOnce == 0, "a chunk is read whole");
  static_assert(kTile * width * sizeof(T) <= kSharedBytes, "a tile must fit");
};

// Whether values of float32 from kTensorColumns columns on are summed by tensor cores, on a GPU
// that has them for bfloat16. They take so many columns at a time, or as many as kTensorWide.
constexpr bool kTensorCores = true;
constexpr int kTensorColumns = 16, kTensorWide = 32;

// A warp has two fragments of 16 rows, which share what is read of the values. Twice as many
// columns halve how often a weight is computed, and leave registers for two blocks.
template <>
struct Traits<float, kTensorColumns> {
  static constexpr int kOwners = 1, kColumns = kTensorColumns, kBlocksPerSm = 3;
};
template <>
struct Traits<float, kTensorWide> {
  static constexpr int kOwners = 1, kColumns = kTensorWide, kBlocksPerSm = 2;
};

// Keys in shared memory, in steps of a fragment's 16, and the parts of their values
// (fragments.cuh).
template <int kValues>
struct ProductSizes : Traits<float, kValues> {
  using Base = Traits<float, kValues>;
  static constexpr int kWidth = 2;
  // The sums of a tile start from zero: a tensor core cuts off what it cannot add, always towards
  // zero, which after eight steps is as much as the rounding of a float32 sum.
  static constexpr int kTile = 128, kChunk = kTile, kSteps = kTile / 16;
  static constexpr bool kSplits = false;                       // among the warps of a block
  static constexpr int kRows = kWarp * Base::kOwners / 8;      // of a thread
  static constexpr int kFragments = kRows / 2;                 // of rows
  static constexpr int kColumnFragments = Base::kColumns / 8;  // read in twos

  static_assert(kColumnFragments % 2 == 0, "two fragments are read at once");
};

// Without sums of columns, whose registers hold the gradients of the rows' contexts.
template <int kValues>
struct ProductRowSizes : ProductSizes<kValues> {
  static constexpr int kBlocksPerSm = 2;
  static_assert(kValues % 16 == 0, "columns are met in steps of a fragment");
};

// Steps in one launch, a block for each sequence (resident.cu).
//
// A thread owns two rows or keys at a time: one 16-byte read still serves four pairs, and a
// sequence divides into enough groups of 64 to balance the causal triangle over the warps.
constexpr int kResidentOwners = 2;
constexpr int kResidentGroup = kWarp * kResidentOwners;
// Sixteen warps may use 128 registers each; sequences up to 1024 take eight, so that two of them
// share an SM.
constexpr int kResidentWarps = 16;
constexpr int kResidentThreads = kWarp * kResidentWarps;

// A block for each SM of a large GPU. With fewer sequences, blocks of a part of one fill it better.
constexpr int64_t kResidentBatch = 128;
// The launches saved cost about as much as a block computes for 1024 tokens, whereas sequences that
// do not divide evenly among the SMs lose up to the time of one: beyond twice that, more than the
// launches. Up to here the largest tile, of records in the backward, is 48 KB in float32 and
// 96 KB in float64, which a block may have from compute capability 8.0 on.
constexpr int64_t kResidentLength = 2048;

// Two groups for each warp, of which one meets many under a causal mask and one few; short
// sequences rather spread over the four schedulers of an SM.
constexpr int resident_warps(int64_t length) {
  const int64_t groups = (length + kResidentGroup - 1) / kResidentGroup;
  const int64_t spread = groups < 4 ? groups : 4, paired = (groups + 1) / 2;
  const int64_t warps = paired < spread ? spread : paired;
  return static_cast<int>(warps < kResidentWarps ? warps : kResidentWarps);
}

}  // namespace qflux::cuda
