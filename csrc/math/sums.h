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

// The sum of term(number), in float64 and in an order that depends on the count alone.
template <class T, class Term>
double ordered_sum(const T* numbers, int64_t count, const Term& term) {
  constexpr int64_t kChains = 8;  // hide the latency of an addition
  double chains[kChains] = {};
  const int64_t whole = count / kChains * kChains;
  for (int64_t n = 0; n < whole; n += kChains)
    for (int64_t c = 0; c < kChains; ++c) chains[c] += term(static_cast<double>(numbers[n + c]));
  for (int64_t n = whole; n < count; ++n)
    chains[n - whole] += term(static_cast<double>(numbers[n]));
  double sum = 0;
  for (const double chain : chains) sum += chain;
  return sum;
}
template <class T>
double ordered_sum(const T* numbers, int64_t count) {
  return ordered_sum(numbers, count, [](double number) { return number; });
}

}  // namespace qflux
