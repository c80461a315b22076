// Long sums whose error does not grow with their length.
#pragma once

#include "scalar.h"

namespace qflux {

// Adds `part` to `sum` and returns what that rounded off: Knuth's two-sum, of numbers or vectors.
template <class V>
QFLUX_INLINE V add_exactly(V& sum, V part) {
  const V before = sum;
  sum = before + part;
  const V shadow = sum - before;
  return (before - (sum - shadow)) + (part - shadow);
}

// A sum and, apart from it, all that its additions rounded off.
template <class T>
struct CompensatedSum {
  T value = 0, error = 0;

  QFLUX_INLINE void add(T part) { error += add_exactly(value, part); }
  QFLUX_INLINE void add(const CompensatedSum& other) {
    add(other.value);
    error += other.error;
  }
  // An overflow makes the error term NaN; the sum itself is then the answer.
  QFLUX_INLINE T get() const { return error == error ? value + error : value; }
};

}  // namespace qflux
