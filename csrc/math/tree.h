// The formulas of a tree over keys that answers half-plane sums (docs/subquadratic.md).
//
// Row q with threshold tau keeps key k where q . k > tau, with the weight q . k - tau. Over a box
// of keys q . k lies in an interval (`reach`): a box above tau is kept whole, and then sums over it
// need its moments alone, for each column of values v and for v = 1
//   m = (sum v, sum v x, sum v y):   sum (q . k - tau) v = q . (m.x, m.y) - tau m.one.
// Gradients have the same form with roles exchanged: rows sum moments of their own, for each column
// g of the context's gradient a = (sum -tau g, sum g qx, sum g qy), and a key k with value v gets
//   dv = a.one + k . (a.x, a.y),   dk = sum over columns of v (a.x, a.y), for v = 1 with g = -mean
//   u.
#pragma once

#include "scalar.h"

namespace qflux {

// Bound on the rounding of an inner product and of `reach`, relative to the length of the row times
// the largest of a key. Boxes are widened by it, so that what is kept or dropped whole is what the
// pair loop would keep or drop.
template <class T>
constexpr double kBoxUnit = sizeof(T) == 4 ? 0x1p-19 : 0x1p-48;

// A rectangle around keys, in any direction: (x, y) + s a + t b with |s|, |t| <= 1.
template <class V>
struct Box {
  V x, y, ax, ay, bx, by;
};

// The rectangle with sides along the unit vector u and across it, in these intervals.
template <class T>
QFLUX_INLINE Box<T> make_box(Point<double> u, double left, double right, double bottom, double top,
                             bool exact_points = true) {
  const double along = (left + right) / 2, across = (bottom + top) / 2;
  const double a = (right - left) / 2, b = (top - bottom) / 2;
  // Keys that are all one point have one inner product, which a pair loop without a bias rounds as
  // `reach` does.
  const bool point = exact_points && !(a > 0 || b > 0);
  const double slack = point ? 0.0 : kBoxUnit<T> * (absolute(along) + absolute(across) + a + b);
  return {static_cast<T>(along * u.x - across * u.y), static_cast<T>(along * u.y + across * u.x),
          static_cast<T>((a + slack) * u.x),          static_cast<T>((a + slack) * u.y),
          static_cast<T>(-(b + slack) * u.y),         static_cast<T>((b + slack) * u.x)};
}

// The least and the largest q . k over a box.
template <class V>
struct Reach {
  V low, high;
};

template <class V>
QFLUX_INLINE Reach<V> reach(const Box<V>& box, V qx, V qy) {
  const V middle = multiply_add(qx, box.x, qy * box.y);
  const V extent = absolute(multiply_add(qx, box.ax, qy * box.ay)) +
                   absolute(multiply_add(qx, box.bx, qy * box.by));
  return {middle - extent, middle + extent};
}

// The direction in which points with these second moments about their mean are spread most.
QFLUX_INLINE Point<double> main_direction(double xx, double xy, double yy) {
  const double difference = xx - yy, root = square_root(difference * difference + 4 * xy * xy);
  if (!(root > 0)) return {1, 0};
  const double cosine = difference / root, sine = 2 * xy / root;  // of twice the angle
  if (cosine >= 0) {
    const double x = square_root((1 + cosine) / 2);
    return {x, sine / (2 * x)};
  }
  const double y = square_root((1 - cosine) / 2);
  return {sine / (2 * y), y};
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
