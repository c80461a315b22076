// Rows of a matrix by a vector: a stretch of a row in each lane, several rows at once.
#pragma once

#include "matvec.h"
#include "simd.h"

namespace qflux::cpu {
namespace {
namespace matvec {

// Rows whose sums are in registers together, enough to hide the latency of an addition.
constexpr int kRows = 8;

template <class T, int kCount>
QFLUX_INLINE void some_rows(const T* weight, const T* bias, int64_t count, const T* x, T* out) {
  using V = Vector<T>;
  V sums[kCount];
  for (int r = 0; r < kCount; ++r) sums[r] = V(T(0));
  int64_t n = 0;
  for (; n + V::kWidth <= count; n += V::kWidth) {
    const V at = load(x + n);
    for (int r = 0; r < kCount; ++r)
      sums[r] = multiply_add(load(weight + r * count + n), at, sums[r]);
  }
  for (int r = 0; r < kCount; ++r) {
    T sum = across(sums[r]);
    for (int64_t m = n; m < count; ++m) sum += weight[r * count + m] * x[m];
    out[r] = bias ? sum + bias[r] : sum;
  }
}

template <class T>
void rows(const T* weight, const T* bias, int64_t count, const T* x, int64_t first, int64_t last,
          T* out) {
  const auto from = [&](int64_t r) { return bias ? bias + r : nullptr; };
  int64_t r = first;
  for (; r + kRows <= last; r += kRows)
    some_rows<T, kRows>(weight + r * count, from(r), count, x, out + r);
  for (; r + 2 <= last; r += 2) some_rows<T, 2>(weight + r * count, from(r), count, x, out + r);
  if (r < last) some_rows<T, 1>(weight + r * count, from(r), count, x, out + r);
}

template <class T>
constexpr MatvecLoops<T> kLoops = {rows<T>};

}  // namespace matvec
}  // namespace
}  // namespace qflux::cpu
