// LayerNorm behind a gate, y = (w n + b) silu(g) with n = (x - mean) r, each formula beside its
// derivative.
//
// Backward, with g' = d loss / d y:
//
//   d loss / d g   = g' (w n + b) silu'(g)
//   d loss / d b   = sum over tokens of g' silu(g) = sum of h
//   d loss / d w   = sum over tokens of h n
//   d loss / d x   = r (w h - mean(w h) - n mean(w h n))
//
// The formulas take numbers, or vectors of them.
#pragma once

#include "scalar.h"

namespace qflux {

template <class V>
QFLUX_INLINE V sigmoid(V x) {
  return reciprocal(V(1) + exponential(-x));
}
template <class V>
QFLUX_INLINE V silu(V x) {
  return x * sigmoid(x);
}
// silu'(x), from x and sigmoid(x).
template <class V>
QFLUX_INLINE V silu_vjp(V x, V sigmoid) {
  return sigmoid * multiply_add(x, V(1) - sigmoid, V(1));
}

// d loss / d x, from w h, n, r and the means of w h and of w h n.
template <class V>
QFLUX_INLINE V norm_vjp(V scaled, V normal, V inverse, V mean, V mean_with_normal) {
  return inverse * (scaled - mean - normal * mean_with_normal);
}

}  // namespace qflux
