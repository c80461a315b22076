// The pair scores, each weight beside its derivative (docs/operators.md).
//
// All are functions of one inner product: with a query q made from the row's state,
//   p_ij = q_i . k_j + bias,   w_ij = weight(p_ij) where kept, else 0.
// `V` is float, double or a vector of either; a comparison with NaN never drops a pair.
#pragma once

#include "scalar.h"

namespace qflux {

template <class V>
QFLUX_INLINE V inner_product(V qx, V qy, V kx, V ky, V bias) {
  // Forward and both backward passes must round alike, or they would disagree on kept pairs.
  return multiply_add(qx, kx, multiply_add(qy, ky, bias));
}

// w = p if p >= limit else 0, with p = (x_i . x_j + 1) / 2 and limit = tau_i.
template <class V>
struct ThresholdPair {
  static constexpr double kBias = 0.5;

  template <class T>
  static QFLUX_INLINE Point<T> query(Point<T> x, T /*sigma*/) {
    return {x.x / 2, x.y / 2};
  }
  template <class T>
  static QFLUX_INLINE Point<T> query_vjp(Point<T> grad, T /*sigma*/) {
    return {grad.x / 2, grad.y / 2};
  }

  V limit;
  QFLUX_INLINE auto kept(V p) const { return not_less(p, limit); }
  QFLUX_INLINE V weight(V p) const { return p; }
  template <class M>
  QFLUX_INLINE V weight(V p, M kept) const {
    return select(kept, p, V(0));
  }
  QFLUX_INLINE V derivative(V /*p*/, V grad) const { return grad; }
};

// w = p - limit if p >= limit else 0: continuous, so that the limit has a gradient too,
//   dw / dlimit = -1 where kept.
template <class V>
struct ExcessPair : ThresholdPair<V> {
  QFLUX_INLINE V weight(V p) const { return p - this->limit; }
  template <class M>
  QFLUX_INLINE V weight(V p, M kept) const {
    return select(kept, p - this->limit, V(0));
  }
};

// Whether a row's limit is tau, and whether its gradient is wanted.
template <class Pair>
constexpr bool kHasThreshold = false;
template <class V>
constexpr bool kHasThreshold<ThresholdPair<V>> = true;
template <class V>
constexpr bool kHasThreshold<ExcessPair<V>> = true;
template <class Pair>
constexpr bool kLimitHasGradient = false;
template <class V>
constexpr bool kLimitHasGradient<ExcessPair<V>> = true;

// w = p / (eps + |p|) if 1 / (eps + |p|) > min_gate else 0, with p = x_i . x_j + alpha (x_i ^ x_j)
// and the wedge y_i x_j - x_i y_j = r_i r_j sin(th_i - th_j).
template <class V>
struct GatePair {
  static constexpr double kBias = 0.0;

  template <class T>
  static QFLUX_INLINE Point<T> query(Point<T> x, T alpha) {
    return {multiply_add(alpha, x.y, x.x), multiply_add(-alpha, x.x, x.y)};
  }
  template <class T>
  static QFLUX_INLINE Point<T> query_vjp(Point<T> grad, T alpha) {
    return {multiply_add(-alpha, grad.y, grad.x), multiply_add(alpha, grad.x, grad.y)};
  }
  // d query / d alpha, contracted with the gradient of the query.
  template <class T>
  static QFLUX_INLINE T alpha_vjp(Point<T> grad, Point<T> x) {
    return grad.x * x.y - grad.y * x.x;
  }

  V eps, min_gate;
  QFLUX_INLINE V gate(V p) const { return V(1) / (eps + absolute(p)); }
  // The zero is NaN for an infinite p, so that what is not finite is never dropped.
  QFLUX_INLINE auto kept(V p) const {
    return not_less_equal(multiply_add(p, V(0), gate(p)), min_gate);
  }
  QFLUX_INLINE V weight(V p) const { return p * gate(p); }
  // A dropped infinity stays visible as NaN.
  template <class M>
  QFLUX_INLINE V weight(V p, M kept) const {
    return p * select(kept, gate(p), V(0));
  }
  // d/dp p / (eps + |p|) = eps / (eps + |p|)^2
  QFLUX_INLINE V derivative(V p, V grad) const { return grad * (eps * gate(p) * gate(p)); }
};

}  // namespace qflux
