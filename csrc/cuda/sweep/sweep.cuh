// What the kernels of a sweep share: how rows and keys divide into rectangles, blocks and
// super-blocks, and what stands where in the scratch memory.
#pragma once

#include <cmath>

#include "../../math/rectangles.h"
#include "../../math/statistics.h"
#include "../../math/sweep.h"
#include "../common/pairs.cuh"
#include "../common/traits.h"
#include "sweep.h"

namespace qflux::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
// Rows in the order of their directions: kRankBlock to a block, a block to a warp, a super-block of
// so many to a thread block.
constexpr int kSuperBlocks = 16;
constexpr int kSuperThreads = kWarp * kSuperBlocks;
constexpr int kSuperRows = kSuperBlocks * kRankBlock;
constexpr int kLaneRows = kRankBlock / kWarp;

// Columns of values that a sweep takes at a time.
template <class T, bool kOwnValues>
constexpr int kSweptValues = kOwnValues ? kWide<T> : 0;

// What is summed for certain pairs: (v, v x, v y) for each of `kColumns` columns of the values and
// for v = 1, in a slot each. As many keys as fit the lanes of a warp are added at once.
template <class T, bool kOwnValues>
struct SweepTraits {
  static constexpr int kColumns = Traits<T, kSweptValues<T, kOwnValues>>::kColumns;
  static constexpr int kUsed = 3 * (kColumns + 1);
  static constexpr int kSlots = kUsed <= 16 ? 16 : 32;
  static constexpr int kAtOnce = kWarp / kSlots;
  static constexpr int kRecord = 4 + kColumns;  // of KeyPass
  static_assert(kUsed <= kSlots, "a slot is a lane");
};

// One level of a sweep over all sequences.
struct Level {
  int64_t size;            // keys of a rectangle; 0: all of them
  int rectangles, supers;  // of a sequence; of a rectangle
};

using Rectangle = qflux::Rectangle<int>;

__device__ __forceinline__ Rectangle rectangle(const Visibility& v, const Level& level, int index) {
  return level.size == 0 ? whole_rectangle<int>(v) : qflux::rectangle<int>(v, level.size, index);
}

// A directed row: the code of its direction above, its index below.
using Ranked = int64_t;
__device__ __forceinline__ int row_of(Ranked ranked) {
  return static_cast<int>(ranked & 0xffffffff);
}

// The scratch of one sweep.
template <class T>
struct Sweep {
  int64_t base, chunks;  // keys of a chunk, and chunks of a sequence
  // Sums over the rectangles, all of them in `zeroed`.
  double* zeroed;
  int64_t zeroed_count;
  double *context, *strength, *degree;  // forward: [batch][rows][value_dim], [batch][rows]
  double *query, *key, *values;  // backward: [batch][rows or keys][2], [batch][keys][value_dim]
  Ranked *order, *other_order;   // [batch][rows], sorted in segments
  uint8_t* tame;                 // [batch][keys]: whether a key has geometry
  Moments* moments;              // [batch][chunks]
  Frame* frames;                 // [batch][rectangles]
  Whitening* whitenings;         // beside each frame
  RowsView* views;               // [batch][rectangles][supers][kSuperBlocks + 1]
  double* sums;                  // beside each view: [kSlots], backward
  T* records;                    // [batch][rows][kRecord] by rank, backward

  __device__ __forceinline__ int64_t view(const Level& level, int64_t sequence, int rectangle,
                                          int super) const {
    return ((sequence * level.rectangles + rectangle) * level.supers + super) * (kSuperBlocks + 1);
  }
};

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class T>
Level level_of(const PairParams<T>& pair, int64_t size) {
  if (size == 0) return {0, 1, static_cast<int>(ceil_div(pair.rows, kSuperRows))};
  return {size, static_cast<int>(rectangle_count(pair.keys, size)),
          static_cast<int>(ceil_div(size < pair.rows ? size : pair.rows, kSuperRows))};
}

// Calls body(level) for each, ascending.
template <class T, class Body>
void for_each_level(const PairParams<T>& pair, int64_t base, const Body& body) {
  if (!pair.causal) return body(level_of(pair, 0));
  each_level(base, pair.keys, [&](int64_t size) { body(level_of(pair, size)); });
}

// Divides memory of unknown place, or only measures it.
class Divider {
 public:
  explicit Divider(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class Number>
  Number* take(int64_t count) {
    Number* place = memory_ ? reinterpret_cast<Number*>(memory_ + used_) : nullptr;
    used_ = ceil_div(used_ + count * static_cast<int64_t>(sizeof(Number)), 256) * 256;
    return place;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

template <class T>
Sweep<T> divide(const PairParams<T>& pair, int64_t base, bool backward, Divider& memory) {
  Sweep<T> s{};
  const int64_t rows = pair.batch() * pair.rows, keys = pair.batch() * pair.keys;
  const int64_t value_dim = pair.values ? pair.value_dim : 2;
  const bool values = static_cast<bool>(pair.values);
  s.base = base;
  s.chunks = ceil_div(pair.keys, base);
  s.zeroed_count =
      backward ? 2 * rows + 2 * keys + (values ? keys * value_dim : 0) : rows * (value_dim + 2);
  s.zeroed = memory.take<double>(s.zeroed_count);
  if (backward) {
    s.query = s.zeroed;
    s.key = s.query + 2 * rows;
    s.values = s.key + 2 * keys;
  } else {
    s.context = s.zeroed;
    s.strength = s.context + rows * value_dim;
    s.degree = s.strength + rows;
  }
  s.order = memory.take<Ranked>(rows);
  s.other_order = memory.take<Ranked>(rows);
  s.tame = memory.take<uint8_t>(keys);
  s.moments = memory.take<Moments>(pair.batch() * s.chunks);
  int64_t rectangles = 0, supers = 0;
  for_each_level(pair, base, [&](const Level& level) {
    const int64_t here = int64_t(level.rectangles) * level.supers;
    rectangles = level.rectangles > rectangles ? level.rectangles : rectangles;
    supers = here > supers ? here : supers;
  });
  const int64_t views = pair.batch() * supers * (kSuperBlocks + 1);
  s.frames = memory.take<Frame>(pair.batch() * rectangles);
  s.whitenings = memory.take<Whitening>(pair.batch() * rectangles);
  s.views = memory.take<RowsView>(views);
  if (backward) {
    using Own = SweepTraits<T, true>;
    using Same = SweepTraits<T, false>;
    s.sums = memory.take<double>(views * (values ? Own::kSlots : Same::kSlots));
    s.records = memory.take<T>(rows * (values ? Own::kRecord : Same::kRecord));
  }
  return s;
}

// The sum over the lanes of a warp that are multiples of `from` apart, in every lane.
__device__ __forceinline__ double sum_over_lanes(double value, int from = 1) {
#pragma unroll
  for (int bits = from; bits < kWarp; bits *= 2) value += __shfl_xor_sync(kWholeWarp, value, bits);
  return value;
}
__device__ __forceinline__ double least_of_lanes(double value) {
#pragma unroll
  for (int bits = 1; bits < kWarp; bits *= 2) {
    const double other = __shfl_xor_sync(kWholeWarp, value, bits);
    value = other < value ? other : value;
  }
  return value;
}

// Adds (v, v x, v y) of records whose bits are set to the slots of a warp. `kPoint` and `kValues`
// say where in a record the point and the columns stand; `one` where the factor of the last column
// stands, or -1: it is 1.
template <int kUsed, int kSlots, int kWidth, int kPoint, int kValues, int kOne, class T>
__device__ __forceinline__ double add_slots(unsigned bits, const T* records, double sum) {
  constexpr int kAtOnce = kWarp / kSlots, kColumns = kUsed / 3 - 1;
  const int slot = threadIdx.x % kSlots, turn = threadIdx.x % kWarp / kSlots;
  if (slot >= kUsed || bits == 0) return sum;
  const int column = slot / 3, factor = slot % 3;
  const int left = column < kColumns ? kValues + column : kOne;
  const int right = factor > 0 ? kPoint + factor - 1 : -1;
#pragma unroll 1
  for (int n = turn; n < kWarp; n += kAtOnce) {
    if (!(bits >> n & 1)) continue;
    const T* record = records + n * kWidth;
    const double a = left < 0 ? 1.0 : static_cast<double>(record[left]);
    const double b = right < 0 ? 1.0 : static_cast<double>(record[right]);
    sum = multiply_add(a, b, sum);
  }
  return sum;
}

// Of order.cu. Sums of `sweep` at zero, keys looked through, and rows put in order one by
// one.
template <class T>
void prepare(const PairParams<T>& pair, const View<const T>& limits, const Sweep<T>& sweep,
             Queue& queue);
// Sorted segments of `width` rows become segments of twice that, in `sweep.order`.
template <class T>
void merge(const PairParams<T>& pair, Sweep<T>& sweep, int64_t width, Queue& queue);
// The frames of all rectangles of a level.
template <class T>
void find_frames(const PairParams<T>& pair, const Sweep<T>& sweep, const Level& level,
                 Queue& queue);

// Calls body(level) for each, with its rows in order and its frames found.
template <class T, class Body>
void sweep_levels(const PairParams<T>& pair, const View<const T>& limits, Sweep<T>& sweep,
                  Queue& queue, const Body& body) {
  prepare(pair, limits, sweep, queue);
  int64_t sorted = 1;
  for_each_level(pair, sweep.base, [&](const Level& level) {
    const int64_t wanted = level.size ? level.size : pair.rows;
    for (; sorted < wanted; sorted *= 2) merge(pair, sweep, sorted, queue);
    find_frames(pair, sweep, level, queue);
    body(level);
  });
}

}  // namespace qflux::cuda
