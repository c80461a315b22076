// How the rows of a rectangle are split by h.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../../math/sweep.h"

namespace qflux::cpu {

// A list entry, beside the pairs it stands for, in units of one pair of the dense loop: measured.
constexpr double kEntryCost = 40;

// Rows whose h lie from `from` on, up to the next group: by arcs or densely.
struct RowGroup {
  double from;
  bool dense;
  std::vector<int32_t> rows{};  // of a rectangle, from its first
  Interval h{std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
};

// How to split rows by h so that arcs and bands together cost least: the best sequence of groups
// between quantiles of a sample, ascending from minus infinity.
std::vector<RowGroup> group_rows(const double* low, const double* high, int64_t rows, int64_t keys);

}  // namespace qflux::cpu
