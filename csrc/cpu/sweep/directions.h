// Where rows look, and what keys are to blocks of rows that look the same way.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../../math/rectangles.h"
#include "../../math/sweep.h"
#include "../isa/dense.h"
#include "../isa/sweep.h"
#include "../parallel.h"

namespace qflux::cpu {

// Rows of one group, sorted by direction, and how directions map to their ranks.
struct Directions {
  std::vector<int32_t> order;  // [rows]: the group's rows by rank
  std::vector<int32_t> offset, first;
  CellMap map() const { return {offset.data(), first.data(), static_cast<int32_t>(order.size())}; }
};

Directions sort_by_direction(const std::vector<int32_t>& list, const double* angle);

// What each key is to the blocks of a group's rows, and the number of tests that leaves.
struct Classes {
  Chunks chunks;  // of the keys
  int32_t blocks;
  std::unique_ptr<Span[]> spans;  // [keys]
  // [chunk][blocks + 1]: keys of a chunk that the rows of a block have to test
  std::vector<int32_t> tested;

  int64_t entries(int32_t block) const {
    int64_t sum = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
      sum += tested[chunk * (blocks + 1) + block];
    return sum;
  }
};

// The keys of a rectangle, in chunks few enough that bins of `bin_width` numbers for each chunk and
// block fit 64 MB.
template <class T>
Classes classify(const SweepLoops<T>& loops, const Sequence<T>& s, const Frame& frame, Interval h,
                 const CellMap& map, const Rectangle<>& where, int64_t bin_width);

}  // namespace qflux::cpu
