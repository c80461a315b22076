// Who sees whom in one sequence.
#pragma once

#include "scalar.h"

namespace qflux {

// Row i of a sequence sees keys 0 .. visible_keys(i) - 1, and key j is seen by rows first_row(j) ..
// row_end - 1.
struct Visibility {
  int64_t row_end, key_end, shift;  // valid rows and keys of the sequence; keys - rows
  bool causal;

  QFLUX_INLINE int64_t visible_keys(int64_t row) const {
    if (row >= row_end) return 0;
    const int64_t limit = row + shift + 1;
    return !causal || limit > key_end ? key_end : limit < 0 ? 0 : limit;
  }
  QFLUX_INLINE int64_t first_row(int64_t key) const {
    const int64_t first = key - shift;
    return !causal || first < 0 ? 0 : first;
  }
};

}  // namespace qflux
