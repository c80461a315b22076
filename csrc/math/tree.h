// The formulas of a tree over keys that answers half-plane sums (docs/subquadratic.md).
//
// Row q with threshold tau keeps key k where q . k > tau, with the weight q . k - tau. Over a box of
// keys q . k lies in an interval (`reach`): a box above tau is kept whole, and then sums over it
// need its moments alone, for each column of values v and for v = 1
//   m = (sum v, sum v x, sum v y):   sum (q . k - tau) v = q . (m.x, m.y) - tau m.one.
// Gradients have the same form with roles exchanged: rows sum moments of their own, for each column
// g of the context's gradient a = (sum -tau g, sum g qx, sum g qy), and a key k with value v gets
//   dv = a.one + k . (a.x, a.y),   dk = sum over columns of v (a.x, a.y), for v = 1 with g = -mean u.
#pragma once

#include "scalar.h"

namespace qflux {

// Bound on the rounding of an inner product and of `reach`, relative to the sum of |q| |k| by
// component. Boxes are widened by it, so that what is kept or dropped whole is what the pair loop
// would keep or drop.
template <class T>
constexpr double kBoxUnit = sizeof(T) == 4 ? 0x1p-20 : 0x1p-49;

// Keys with |k.x - x| <= dx, |k.y - y| <= dy.
template <class V>
struct Box {
  V x, y, dx, dy;
};

template <class T>
QFLUX_INLINE Box<T> make_box(double left, double right, double bottom, double top) {
  const T x = static_cast<T>((left + right) / 2), y = static_cast<T>((bottom + top) / 2);
  const double ex = right - x > x - left ? right - x : x - left;
  const double ey = top - y > y - bottom ? top - y : y - bottom;
  const double unit = kBoxUnit<T>;
  return {x, y, static_cast<T>(ex + unit * (absolute(double(x)) + ex)),
          static_cast<T>(ey + unit * (absolute(double(y)) + ey))};
}

// The least and the largest q . k over a box; `ax` and `ay` are |q|.
template <class V>
struct Reach {
  V low, high;
};

template <class V>
QFLUX_INLINE Reach<V> reach(const Box<V>& box, V qx, V qy, V ax, V ay) {
  const V middle = multiply_add(qx, box.x, qy * box.y);
  const V extent = multiply_add(ax, box.dx, ay * box.dy);
  return {middle - extent, middle + extent};
}

// Numbers of a column: sums of v, v x, v y.
constexpr int64_t kColumnMoments = 3;

// sum (q . k - tau) v from the moments of a column.
QFLUX_INLINE double weighed(const double* moments, double qx, double qy, double tau) {
  return qx * moments[1] + qy * moments[2] - tau * moments[0];
}

// A guess at the root of F(t) = sum max(z - t, 0) = 1 from its value and slope -N at tau: of the
// power law that has both and ends at the row's largest z, `top`.
QFLUX_INLINE double power_law_root(double tau, double mass, double count, double top) {
  const double reach = top - tau, power = count * reach / mass;
  if (!(power >= 1)) return tau + (mass - 1) / count;
  return top - reach * exp(-log(mass) / power);
}

}  // namespace qflux
