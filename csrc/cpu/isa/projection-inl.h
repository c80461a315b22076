// The passes of project_norm over tokens: lanes hold outputs, the features are broadcast.
#pragma once

#include "projection.h"
#include "simd.h"

namespace qflux::cpu {
namespace {
namespace projection {

constexpr int kVectors = 4;  // independent chains of the forward
constexpr int kTokens = 4;   // tokens that share a read of the matrix and the sums in the backward
// Tokens whose sums are taken in T from zero: their rounding stays below that of a gradient.
constexpr int64_t kTile = 128;

// r, with u and G u left behind.
template <class T>
double inverse_deviation(const ProjectionParams<T>& p, const double* gram, int64_t token, double* u,
                         double* product) {
  const int64_t columns = p.columns();
  for (int64_t j = 0; j < columns; ++j) u[j] = extended(p.token(token), p.count, j);
  for (int64_t j = 0; j < columns; ++j) product[j] = gram_product(gram, p.token(token), p.count, j);
  double variance = 0;
  for (int64_t j = 0; j < columns; ++j) variance = multiply_add(product[j], u[j], variance);
  return qflux::inverse_deviation(variance, p.eps);
}

template <class T, int kGroup>
QFLUX_INLINE void write_outputs(const ProjectionPlanes<T>& planes, const T* scaled, int64_t columns,
                                int64_t k, int64_t width, T* out) {
  using V = Vector<T>;
  V sum[kGroup];
  for (int n = 0; n < kGroup; ++n) sum[n] = load(planes.shift + k + n * V::kWidth);
  for (int64_t j = 0; j < columns; ++j) {
    const V s(scaled[j]);
    const T* column = planes.columns + j * planes.stride + k;
    for (int n = 0; n < kGroup; ++n) sum[n] = multiply_add(load(column + n * V::kWidth), s, sum[n]);
  }
  for (int n = 0; n < kGroup; ++n) {
    const int64_t left = width - k - n * V::kWidth;
    if (left >= V::kWidth)
      store(out + k + n * V::kWidth, sum[n]);
    else if (left > 0)
      std::memcpy(out + k + n * V::kWidth, &sum[n].raw, static_cast<size_t>(left) * sizeof(T));
  }
}

template <class T>
void forward(const ProjectionParams<T>& p, const ProjectionPlanes<T>& planes, int64_t first,
             int64_t last, T* out) {
  constexpr int64_t kStep = kVectors * Vector<T>::kWidth;
  double u[kMaxFeatures + 1], product[kMaxFeatures + 1];
  T scaled[kMaxFeatures + 1];
  for (int64_t t = first; t < last; ++t) {
    const T inverse = static_cast<T>(inverse_deviation(p, planes.gram, t, u, product));
    for (int64_t j = 0; j < p.columns(); ++j) scaled[j] = inverse * static_cast<T>(u[j]);
    T* row = out + t * p.width;
    int64_t k = 0;
    for (; k + kStep <= p.width; k += kStep)
      write_outputs<T, kVectors>(planes, scaled, p.columns(), k, p.width, row);
    for (; k < p.width; k += Vector<T>::kWidth)
      write_outputs<T, 1>(planes, scaled, p.columns(), k, p.width, row);
  }
}

// The backward of kGroup tokens that follow each other.
template <class T, int kGroup>
void backward_group(const ProjectionParams<T>& p, const ProjectionPlanes<T>& planes, int64_t first,
                    T* grad_features, T* sums, double* triangle_sums) {
  using V = Vector<T>;
  const int64_t count = p.count, columns = p.columns();
  const int64_t whole = p.width / V::kWidth * V::kWidth;
  constexpr int64_t kColumns = kMaxFeatures + 1;
  double inverse[kGroup], u[kGroup][kColumns], product[kGroup][kColumns], pulled[kGroup][kColumns];
  const T* grad[kGroup];
  for (int n = 0; n < kGroup; ++n) {
    grad[n] = p.grad + (first + n) * p.width;
    inverse[n] = inverse_deviation(p, planes.gram, first + n, u[n], product[n]);
  }
  for (int64_t j = 0; j <= columns; ++j) {
    const bool plain = j == columns;  // the sum of g itself
    if (plain && !sums) break;
    T scaled[kGroup];
    for (int n = 0; n < kGroup; ++n)
      scaled[n] = plain ? T(1) : static_cast<T>(inverse[n]) * static_cast<T>(u[n][j]);
    const T* column = planes.columns + (plain ? 0 : j) * planes.stride;
    T* sum = sums ? sums + j * planes.stride : nullptr;
    V of_token[kGroup];
    for (int n = 0; n < kGroup; ++n) of_token[n] = V(T(0));
    for (int64_t k = 0; k < whole; k += V::kWidth) {
      const V b = load(column + k);
      V s = sums ? load(sum + k) : V(T(0));
      for (int n = 0; n < kGroup; ++n) {
        const V g = load(grad[n] + k);
        of_token[n] = multiply_add(g, b, of_token[n]);
        s = multiply_add(g, V(scaled[n]), s);
      }
      if (sums) store(sum + k, s);
    }
    for (int n = 0; n < kGroup; ++n) {
      T lane[V::kWidth], total = 0;
      store(lane, of_token[n]);
      for (int64_t k = whole; k < p.width; ++k) {
        total = qflux::multiply_add(grad[n][k], column[k], total);
        if (sums) sum[k] = qflux::multiply_add(grad[n][k], scaled[n], sum[k]);
      }
      for (int l = 0; l < V::kWidth; ++l) total += lane[l];
      if (!plain) pulled[n][j] = total;
    }
  }
  for (int n = 0; n < kGroup; ++n) {
    double grad_inverse = 0;
    for (int64_t j = 0; j < columns; ++j)
      grad_inverse = qflux::multiply_add(pulled[n][j], u[n][j], grad_inverse);
    const double v = variance_vjp(inverse[n], grad_inverse);
    if (grad_features)
      for (int64_t j = 0; j < count; ++j)
        grad_features[(first + n) * count + j] =
            static_cast<T>(feature_vjp(inverse[n], pulled[n][j], v, product[n][j]));
    if (!sums) continue;
    for (int64_t j = 0; j < columns; ++j) {
      double* column = triangle_sums + triangle(0, j);
      for (int64_t i = 0; i <= j; ++i)
        column[i] = qflux::multiply_add(v * u[n][j], u[n][i], column[i]);
    }
  }
}

template <class T>
void backward(const ProjectionParams<T>& p, const ProjectionPlanes<T>& planes, int64_t first,
              int64_t last, T* grad_features, CompensatedSum<double>* totals) {
  const Array<T> sums(totals ? p.sum_columns() * planes.stride : 0);
  const Array<double> triangle_sums(totals ? p.triangle_size() : 0);
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int64_t end = tile + kTile < last ? tile + kTile : last;
    int64_t t = tile;
    for (; t + kTokens <= end; t += kTokens)
      backward_group<T, kTokens>(p, planes, t, grad_features, sums.get(), triangle_sums.get());
    for (; t < end; ++t)
      backward_group<T, 1>(p, planes, t, grad_features, sums.get(), triangle_sums.get());
    if (!totals) continue;
    for (int64_t j = 0; j < p.sum_columns(); ++j)
      for (int64_t k = 0; k < p.width; ++k) {
        totals[j * p.width + k].add(sums[j * planes.stride + k]);
        sums[j * planes.stride + k] = 0;
      }
    for (int64_t n = 0; n < p.triangle_size(); ++n) {
      totals[p.sum_columns() * p.width + n].add(triangle_sums[n]);
      triangle_sums[n] = 0;
    }
  }
}

template <class T>
constexpr ProjectionLoops<T> kLoops = {forward<T>, backward<T>};

}  // namespace projection
}  // namespace
}  // namespace qflux::cpu
