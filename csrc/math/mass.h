// The threshold by mass (sparsemax; Martins and Astudillo 2016): tau with
//   sum_j max(p_j - tau, 0) = 1   over the pairs p_j of a row.
//
// excess(tau) = sum_j max(p_j - tau, 0) - 1 falls, is convex and piecewise linear, so a step of
// Newton from anywhere ends at or below the solution, and from there steps rise to it: each drops
// pairs, and once two in a row keep as many the last is exact (Michelot 1986). It is not positive
// from max p on, and not negative at max p - 1, from where steps may begin.
//
// Gradient. Where kept, w_j = p_j - tau and tau = (sum of kept p - 1) / count. With u_j what a unit
// of w_j is worth, d/dp_j = u_j - mean of the kept u on the kept pairs, and 0 elsewhere. A constant
// in u, such as the gradient of the strength, has no effect: the strength is one.
#pragma once

#include "scalar.h"

namespace qflux {

// One step of Newton from tau, where `mass` = sum of max(p - tau, 0) over `count` kept pairs.
template <class V>
QFLUX_INLINE V mass_step(V tau, V mass, V count) {
  return tau + (mass - V(1)) / count;
}

// The step times `count` to where a mass that ends like the square of the distance to the largest
// pair is `share`: longer than Newton's, and too long where it ends slower.
template <class V>
QFLUX_INLINE V mass_stride(V mass, V share) {
  return V(2) * (mass - square_root(mass * share));
}

// Excess beneath which a step changes tau by no more than rounding does.
template <class T>
QFLUX_INLINE T mass_tolerance() {
  return static_cast<T>(sizeof(T) == 4 ? 0x1p-21 : 0x1p-50);
}

// Sums over the kept pairs of a row from which the gradient of its query comes in one pass.
template <class T>
struct MassSums {
  T count, upstream;           // of 1 and u
  Point<T> key, upstream_key;  // of k and u k
};

// The mean of u: what the key pass subtracts from the u of this row.
template <class T>
QFLUX_INLINE T mass_mean(const MassSums<T>& sums) {
  return sums.count > 0 ? sums.upstream / sums.count : T(0);
}

// sum of (u - mean) k, the gradient of the query.
template <class T>
QFLUX_INLINE Point<T> mass_query_vjp(const MassSums<T>& sums) {
  const T mean = mass_mean(sums);
  return {sums.upstream_key.x - mean * sums.key.x, sums.upstream_key.y - mean * sums.key.y};
}

}  // namespace qflux
