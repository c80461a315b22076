// Sizes of the pair kernels, fixed at compile time, with their reasons.
#pragma once

#include <cstdint>

namespace qflux::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // a block of one warp per scheduler; several blocks share an SM
constexpr int kThreads = kWarp * kWarps;

// With fewer blocks than this the warps of a block share its owners and split what these meet:
// about two blocks for each SM of a large GPU.
constexpr int64_t kEnoughBlocks = 264;

constexpr int kSharedBytes = 48 * 1024;  // static shared memory of every architecture

// `kOwnValues`: values are not the keys, and are taken `kColumns` at a time.
template <class T, bool kOwnValues>
struct Traits;

// Four owners share one 16-byte read of two keys, so that reads take an eighth of the issue slots
// or less; sums over 256 others keep float32 errors far below the rounding of the totals.
template <>
struct Traits<float, false> {
  static constexpr int kOwners = 4, kColumns = 2, kChunk = 256, kUnroll = 4;
};
// A double fills two registers and its pipe is half as wide: two owners hide as much.
template <>
struct Traits<double, false> {
  static constexpr int kOwners = 2, kColumns = 2, kChunk = 256, kUnroll = 4;
};
// Eight columns make the recomputed weight a third of a pair's work; with their totals they leave
// registers for two owners. The chunk halves as the tile's records grow.
template <>
struct Traits<float, true> {
  static constexpr int kOwners = 2, kColumns = 8, kChunk = 128, kUnroll = 1;
};
template <>
struct Traits<double, true> {
  static constexpr int kOwners = 1, kColumns = 4, kChunk = 128, kUnroll = 1;
};

// Others in shared memory at once, in records of `width` numbers: a chunk for each warp of a split.
template <class T, bool kOwnValues, int width>
struct TileTraits : Traits<T, kOwnValues> {
  using Base = Traits<T, kOwnValues>;
  static constexpr int kWidth = width;
  static constexpr int kTile = kWarps * Base::kChunk;

  static_assert(2 * width * sizeof(T) % 16 == 0, "two records are read in 16-byte parts");
  static_assert(Base::kChunk % 2 == 0, "records are read in twos");
  static_assert(kTile * width * sizeof(T) <= kSharedBytes, "a tile must fit");
};

}  // namespace qflux::cuda
