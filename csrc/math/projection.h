// LayerNorm of W f + b for few features f, each formula beside its derivative.
//
// With u = (f, 1) and A = [W b] less the mean of each column, the centred outputs are A u, and
// their variance is u' G u with the Gram matrix G = A' A / d, which depends on the weights alone.
// So no token needs a pass over the width d before its outputs are written:
//
//   out_k = scale_k (A_k . s) + shift_k      with s = r u and r = 1 / sqrt(u' G u + eps)
//
// Backward, with g = d loss / d out, the one pass over the width of a token is
//   m = sum_k g_k scale_k A_k, and v = d loss / d (u' G u) = -r^3 (m . u) / 2; then
//
//   d loss / d u       = r m + 2 v G u
//   d loss / d shift_k = sum over tokens of g_k
//   d loss / d scale_k = A_k . S_k           with S_k = sum over tokens of g_k s
//   d loss / d A_k     = scale_k S_k + (2 / d) Q A_k    with Q = sum over tokens of v u u'
//
// and [W b] gets the gradient of A less its column means, to which Q A_k adds nothing: A has none.
#pragma once

#include "scalar.h"

namespace qflux {

// Entry j of u = (f, 1).
template <class T>
QFLUX_INLINE T extended(const T* features, int64_t count, int64_t j) {
  return j < count ? features[j] : T(1);
}

// Entry j of a row of [W b].
template <class T>
QFLUX_INLINE double extended_weight(const T* row, const T* bias, int64_t count, int64_t k,
                                    int64_t j) {
  return j < count ? static_cast<double>(row[j]) : bias ? static_cast<double>(bias[k]) : 0.0;
}

// Entry j of G u. In float64 for both precisions: where outputs almost cancel, the variance is a
// small difference of large terms.
template <class T>
QFLUX_INLINE double gram_product(const double* gram, const T* features, int64_t count, int64_t j) {
  const double* row = gram + j * (count + 1);
  double sum = row[count];
  for (int64_t i = 0; i < count; ++i) sum = multiply_add(row[i], double(features[i]), sum);
  return sum;
}

// r, from u' G u.
QFLUX_INLINE double inverse_deviation(double variance, double eps) {
  variance = variance < 0 ? 0 : variance;  // rounding; NaN stays
  return 1 / square_root(variance + eps);
}

// v, from r and d loss / d r = m . u.
QFLUX_INLINE double variance_vjp(double inverse, double grad_inverse) {
  return -inverse * inverse * inverse * grad_inverse / 2;
}

// Entry j of d loss / d u, from entries j of m and G u.
QFLUX_INLINE double feature_vjp(double inverse, double pulled, double grad_variance,
                                double gram_product) {
  return multiply_add(inverse, pulled, 2 * grad_variance * gram_product);
}

// Entry (k, j) of d loss / d [W b], from those of scale S, its column mean and A Q.
QFLUX_INLINE double weight_vjp(double scaled, double column_mean, double matrix_product,
                               int64_t width) {
  return scaled - column_mean + 2 * matrix_product / static_cast<double>(width);
}

// Where entry (i, j) of a symmetric matrix stands when its upper triangle is stored by columns.
QFLUX_INLINE int64_t triangle(int64_t i, int64_t j) {
  return i <= j ? j * (j + 1) / 2 + i : i * (i + 1) / 2 + j;
}

}  // namespace qflux
