// What project_norm hands to its kernels. Every array is contiguous.
#pragma once

#include "math/projection.h"

namespace qflux {

// Of more features a matrix product makes more than these loops do (benchmarks/README.md).
constexpr int64_t kMaxFeatures = 8;

template <class T>
struct ProjectionParams {
  int64_t tokens, count, width;  // count: features of a token
  double eps;
  const T* features;         // [tokens][count]
  const T* weight;           // [width][count]
  const T* bias = nullptr;   // [width], or null: zero
  const T* scale = nullptr;  // [width], or null: one
  const T* shift = nullptr;  // [width], or null: zero; forward only
  const T* grad = nullptr;   // [tokens][width]; backward only

  QFLUX_INLINE int64_t columns() const { return count + 1; }  // of [W b]
  QFLUX_INLINE T scale_at(int64_t k) const { return scale ? scale[k] : T(1); }
  QFLUX_INLINE const T* token(int64_t t) const { return features + t * count; }
  QFLUX_INLINE double matrix(int64_t k, int64_t j) const {
    return extended_weight(weight + k * count, bias, count, k, j);
  }

  // The sums over tokens: S by columns, the sum of g as one column more, the triangle of Q.
  QFLUX_INLINE int64_t sum_columns() const { return columns() + 1; }
  QFLUX_INLINE int64_t triangle_size() const { return columns() * (columns() + 1) / 2; }
  QFLUX_INLINE int64_t sums() const { return sum_columns() * width + triangle_size(); }
  // Tokens are summed chunk by chunk and the chunks in order, so that no result depends on the
  // number of threads or blocks. The chunks depend on the sizes alone, and their sums fit 64 MB.
  int64_t chunks() const {
    constexpr int64_t kTokens = 256, kMost = 512, kSums = int64_t{1} << 22;
    const int64_t wanted = (tokens + kTokens - 1) / kTokens;
    const int64_t affordable = kSums / sums() > 1 ? kSums / sums() : 1;
    const int64_t most = affordable < kMost ? affordable : kMost;
    return wanted < most ? wanted : most;
  }
  QFLUX_INLINE int64_t chunk_begin(int64_t chunk, int64_t chunks) const {
    const int64_t share = tokens / chunks, rest = tokens % chunks;
    return chunk * share + (chunk < rest ? chunk : rest);
  }
};

// Gradients; null: not wanted. The last four are wanted together or not at all.
template <class T>
struct ProjectionGradients {
  T* features = nullptr;  // [tokens][count]
  T* weight = nullptr;    // [width][count]
  T* bias = nullptr;      // [width]
  T* scale = nullptr;     // [width]
  T* shift = nullptr;     // [width]
};

}  // namespace qflux
