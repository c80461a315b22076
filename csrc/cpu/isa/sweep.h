// The hot loops of the sweep over one pair of a row block and a key block.
#pragma once

#include "../../math/sweep.h"

namespace qflux::cpu {

// Sums are kept in two doubles, the sum and its error: [width] and [width] behind it.
template <class T>
struct SweepLoops {
  bool (*all_tame)(const T* values, int64_t count);
  void (*view_rows)(const Frame&, const T* query_x, const T* query_y, const T* limit, int64_t count,
                    double* angle, double* low, double* high);
  void (*view_keys)(const Frame&, const CellMap&, Interval h, const T* key_x, const T* key_y,
                    int64_t count, Span*);
  // Adds each vector at its span's first inner block and takes it away behind its last:
  // bins [blocks + 1][2][width], whose running sum is then the sum over the keys of a block.
  void (*add_spans)(const double* vectors, int64_t width, const Span*, int64_t count,
                    int32_t blocks, double* bins);
  void (*add_bins)(double* sums, const double* bin, int64_t width);
  void (*add_vectors)(double* sums, const double* vectors, int64_t count, int64_t width);
};

}  // namespace qflux::cpu
