// Long sums whose error does not grow with their length.
#pragma once

#include "scalar.h"

namespace qflux {

// Knuth's two-sum: what each addition rounds off is added up as well.
struct CompensatedSum {
  double value = 0, error = 0;

  QFLUX_INLINE void add(double part) {
    const double sum = value + part;
    const double shadow = sum - value;
    error += (value - (sum - shadow)) + (part - shadow);
    value = sum;
  }
  QFLUX_INLINE void add(const CompensatedSum& other) {
    add(other.value);
    error += other.error;
  }
  // An overflow makes the error term NaN; the sum itself is then the answer.
  QFLUX_INLINE double get() const { return error == error ? value + error : value; }
};

}  // namespace qflux
