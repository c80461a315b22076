// The pair scores: for each its formula, its derivative, how it is made from a row's limit, and its
// traits. Everything else in csrc takes a score as a template parameter.
//
// All are functions of one inner product: with a query q made from the row's state,
//   p_ij = q_i . k_j + bias_i,   w_ij = weight(p_ij) where kept, else 0.
// `V` is float, double or a vector of either; a comparison with NaN never drops a pair.
//
// The traits of a score:
//   kThresholded  its limit is tau, the row's adaptive threshold, by mean and deviation
//                 (statistics.h) or by mass (mass.h);
//   kMass         the second of these: the weights of a row sum to one;
//   kLimitVjp     the limit has a gradient, dw / dlimit = -derivative where kept, which goes to the
//                 statistics it was made from. That of a mass is taken with the pairs' (mass.h);
//   kAffine       weight(p) = p + offset(limit) where kept, which is what a sweep needs (sweep.h);
//   kCoefficientInQuery  the coefficient acts through the query, else through tau.
#pragma once

#include "scalar.h"

namespace qflux {

// In the order of `SCORES` in qflux_kernels/schema.py.
enum class ScoreKind : int64_t {
  kHardThreshold = 0,
  kInverseGate = 1,
  kSoftThreshold = 2,
  kSparsemax = 3
};
constexpr const char* kScoreNames = "hard_threshold,inverse_gate,soft_threshold,sparsemax";
constexpr int64_t kScores = 4;

template <class V>
QFLUX_INLINE V inner_product(V qx, V qy, V kx, V ky, V bias) {
  // Forward and both backward passes must round alike, or they would disagree on kept pairs.
  return multiply_add(qx, kx, multiply_add(qy, ky, bias));
}

// w = p if p >= limit else 0, with p = (x_i . x_j + 1) / 2 and limit = tau_i. The coefficient,
// sigma, acts through tau alone.
template <class V>
struct HardThreshold {
  static constexpr float kBias = 0.5f;
  static constexpr bool kThresholded = true, kMass = false, kLimitVjp = false, kAffine = true;
  static constexpr bool kCoefficientInQuery = false;

  template <class T>
  static QFLUX_INLINE Point<T> query(Point<T> x, T /*sigma*/) {
    return {x.x / 2, x.y / 2};
  }
  template <class T>
  static QFLUX_INLINE Point<T> query_vjp(Point<T> grad, T /*sigma*/) {
    return {grad.x / 2, grad.y / 2};
  }
  // d query / d coefficient, contracted with the gradient of the query.
  template <class T>
  static QFLUX_INLINE T coefficient_vjp(Point<T> /*grad*/, Point<T> /*x*/) {
    return T(0);
  }
  static QFLUX_INLINE V offset(V /*limit*/) { return V(0); }
  static QFLUX_INLINE HardThreshold make(V limit, V /*eps*/, V /*min_gate*/) { return {limit}; }

  V limit;
  QFLUX_INLINE V bias() const { return V(kBias); }
  QFLUX_INLINE auto kept(V p) const { return not_less(p, limit); }
  QFLUX_INLINE V weight(V p) const { return p; }
  // What a backward, which has the limit alone, takes for the weight.
  QFLUX_INLINE V backward_weight(V p) const { return p; }
  template <class M>
  QFLUX_INLINE V weight(V p, M kept) const {
    return where(kept, p);
  }
  QFLUX_INLINE V derivative(V /*p*/, V grad) const { return grad; }
};

// w = p - limit if p >= limit else 0: continuous, so that the limit has a gradient too.
template <class V>
struct SoftThreshold : HardThreshold<V> {
  static constexpr bool kLimitVjp = true;

  static QFLUX_INLINE V offset(V limit) { return V(0) - limit; }
  static QFLUX_INLINE SoftThreshold make(V limit, V /*eps*/, V /*min_gate*/) { return {{limit}}; }

  QFLUX_INLINE V weight(V p) const { return p - this->limit; }
  QFLUX_INLINE V backward_weight(V p) const { return weight(p); }
  template <class M>
  QFLUX_INLINE V weight(V p, M kept) const {
    return where(kept, p - this->limit);
  }
};

// w = p / (eps + |p|) if 1 / (eps + |p|) > min_gate else 0, with p = x_i . x_j + alpha (x_i ^ x_j)
// and the wedge y_i x_j - x_i y_j = r_i r_j sin(th_i - th_j). The coefficient is alpha.
template <class V>
struct InverseGate {
  static constexpr bool kThresholded = false, kMass = false, kLimitVjp = false, kAffine = false;
  static constexpr bool kCoefficientInQuery = true;

  template <class T>
  static QFLUX_INLINE Point<T> query(Point<T> x, T alpha) {
    return {multiply_add(alpha, x.y, x.x), multiply_add(-alpha, x.x, x.y)};
  }
  template <class T>
  static QFLUX_INLINE Point<T> query_vjp(Point<T> grad, T alpha) {
    return {multiply_add(-alpha, grad.y, grad.x), multiply_add(alpha, grad.x, grad.y)};
  }
  template <class T>
  static QFLUX_INLINE T coefficient_vjp(Point<T> grad, Point<T> x) {
    return grad.x * x.y - grad.y * x.x;
  }
  static QFLUX_INLINE InverseGate make(V /*limit*/, V eps, V min_gate) { return {eps, min_gate}; }

  V eps, min_gate;
  QFLUX_INLINE V bias() const { return V(0); }
  QFLUX_INLINE V gate(V p) const { return reciprocal(eps + absolute(p)); }
  // The zero is NaN for an infinite p, so that what is not finite is never dropped.
  QFLUX_INLINE auto kept(V p) const {
    return not_less_equal(multiply_add(p, V(0), gate(p)), min_gate);
  }
  QFLUX_INLINE V weight(V p) const { return p * gate(p); }
  QFLUX_INLINE V backward_weight(V p) const { return weight(p); }
  // A dropped infinity stays visible as NaN.
  template <class M>
  QFLUX_INLINE V weight(V p, M kept) const {
    return p * where(kept, gate(p));
  }
  // d/dp p / (eps + |p|) = eps / (eps + |p|)^2
  QFLUX_INLINE V derivative(V p, V grad) const { return grad * (eps * gate(p) * gate(p)); }
};

// w = p if p > 0 else 0, with p = scale x_i . x_j - limit and the limit of which the weights of a
// row sum to one. The coefficient is the scale.
template <class V>
struct Sparsemax {
  static constexpr bool kThresholded = true, kMass = true, kLimitVjp = false, kAffine = false;
  static constexpr bool kCoefficientInQuery = true;

  template <class T>
  static QFLUX_INLINE Point<T> query(Point<T> x, T scale) {
    return {scale * x.x, scale * x.y};
  }
  template <class T>
  static QFLUX_INLINE Point<T> query_vjp(Point<T> grad, T scale) {
    return {scale * grad.x, scale * grad.y};
  }
  template <class T>
  static QFLUX_INLINE T coefficient_vjp(Point<T> grad, Point<T> x) {
    return grad.x * x.x + grad.y * x.y;
  }
  // Many weights share what tau loses when it is rounded to V: `rest`, where it is known.
  static QFLUX_INLINE Sparsemax make(V limit, V rest, V /*min_gate*/) { return {limit, rest}; }

  V limit, rest;
  QFLUX_INLINE V bias() const { return -limit; }
  QFLUX_INLINE auto kept(V p) const { return not_less_equal(p, V(0)); }
  QFLUX_INLINE V weight(V p) const { return p - rest; }
  // Products beyond the precision of a weight (2^21 in float) leave a limit far below a pair.
  QFLUX_INLINE V backward_weight(V p) const { return at_most_one(p); }
  template <class M>
  QFLUX_INLINE V weight(V p, M kept) const {
    return where(kept, weight(p));
  }
  QFLUX_INLINE V derivative(V /*p*/, V grad) const { return grad; }
};

// A score as a value that a generic lambda can take apart: `typename decltype(tag)::of<V>`.
template <template <class> class Score>
struct ScoreTag {
  template <class V>
  using of = Score<V>;
};

// The one place where a score's run-time value becomes a type: visit(ScoreTag<Score>()).
template <class Visit>
QFLUX_HOST_INLINE auto visit_score(ScoreKind kind, const Visit& visit) {
  switch (kind) {
    case ScoreKind::kInverseGate:
      return visit(ScoreTag<InverseGate>());
    case ScoreKind::kSoftThreshold:
      return visit(ScoreTag<SoftThreshold>());
    case ScoreKind::kSparsemax:
      return visit(ScoreTag<Sparsemax>());
    case ScoreKind::kHardThreshold:
      break;
  }
  return visit(ScoreTag<HardThreshold>());
}

// The traits by run-time value.
QFLUX_HOST_INLINE bool is_thresholded(ScoreKind kind) {
  return visit_score(kind,
                     [](auto tag) { return decltype(tag)::template of<float>::kThresholded; });
}
QFLUX_HOST_INLINE bool has_mass(ScoreKind kind) {
  return visit_score(kind, [](auto tag) { return decltype(tag)::template of<float>::kMass; });
}
QFLUX_HOST_INLINE bool has_limit_vjp(ScoreKind kind) {
  return visit_score(kind, [](auto tag) { return decltype(tag)::template of<float>::kLimitVjp; });
}
QFLUX_HOST_INLINE bool is_affine(ScoreKind kind) {
  return visit_score(kind, [](auto tag) { return decltype(tag)::template of<float>::kAffine; });
}

}  // namespace qflux
