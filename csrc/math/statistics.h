// Mean and deviation of a row's scores from the moments of its keys: no pass over pairs
// (docs/operators.md, "Statistics without pairs").
#pragma once

#include "scalar.h"

namespace qflux {

// Sums over a window of keys, taken relative to one of them (`shift` below) so that equal states
// have a variance of exactly zero.
template <class V>
struct MomentsOf {
  V count = V(0), x = V(0), y = V(0), xx = V(0), xy = V(0), yy = V(0);

  QFLUX_INLINE void add(V dx, V dy) {
    count = count + V(1);
    x = x + dx;
    y = y + dy;
    xx = multiply_add(dx, dx, xx);
    xy = multiply_add(dx, dy, xy);
    yy = multiply_add(dy, dy, yy);
  }
  QFLUX_INLINE void add(const MomentsOf& other) {
    count = count + other.count;
    x = x + other.x;
    y = y + other.y;
    xx = xx + other.xx;
    xy = xy + other.xy;
    yy = yy + other.yy;
  }
};
using Moments = MomentsOf<double>;

// tau = mean + sigma * sqrt(variance + eps) of (x . k + 1) / 2 over the window's keys k. V is
// double or a vector of them, a row in each lane.
template <class V>
QFLUX_INLINE V threshold(Point<V> x, const MomentsOf<V>& window, Point<double> shift, double sigma,
                         double eps) {
  const V scale = V(1) / window.count;
  const V mx = window.x * scale, my = window.y * scale;
  const V cxx = multiply_add(V(0) - mx, mx, window.xx * scale);
  const V cxy = multiply_add(V(0) - mx, my, window.xy * scale);
  const V cyy = multiply_add(V(0) - my, my, window.yy * scale);
  const V mean = (x.x * (V(shift.x) + mx) + x.y * (V(shift.y) + my) + V(1)) / V(2);
  const V variance = (x.x * x.x * cxx + V(2) * x.x * x.y * cxy + x.y * x.y * cyy) / V(4);
  // An infinite state leaves no score defined, even where its infinities agree: NaN, as for a NaN.
  const V undefined = (x.x - x.x) + (x.y - x.y);
  return mean + V(sigma) * square_root(not_negative(variance) + V(eps)) + undefined;
}

// What tau owes to its row, to the sums over its window and to sigma, for a gradient `grad` of tau.
// With the window's mean m and covariance C = M - m m', v = x' C x / 4 and sd = sqrt(v + eps):
//   d tau / dx = (shift + m) / 2 + sigma C x / (4 sd),  d tau / d sigma = sd,
//   d tau / dM = sigma x x' / (8 sd),  d tau / dm = x / 2 - sigma (x . m) x / (4 sd).
template <class V>
struct ThresholdGradient {
  Point<V> x;
  MomentsOf<V> sums;  // `count` has none
  V sigma;
};

template <class V>
QFLUX_INLINE ThresholdGradient<V> threshold_vjp(Point<V> x, const MomentsOf<V>& window,
                                                Point<double> shift, double sigma, double eps,
                                                V grad) {
  const V scale = V(1) / window.count;
  const V mx = window.x * scale, my = window.y * scale;
  const V cxx = window.xx * scale - mx * mx;
  const V cxy = window.xy * scale - mx * my;
  const V cyy = window.yy * scale - my * my;
  const V ux = cxx * x.x + cxy * x.y, uy = cxy * x.x + cyy * x.y;
  const V variance = (x.x * ux + x.y * uy) / V(4);
  // Where nothing deviates, or rounding says less than nothing, the deviation has no gradient.
  const auto deviates = less(V(0), variance);
  const V sd = square_root(where(deviates, variance) + V(eps));
  const V half = grad / V(2), slope = where(deviates, half * V(sigma) / (V(2) * sd));
  const V of_mean = (half - slope * (x.x * mx + x.y * my)) * scale, part = slope * scale / V(2);
  return {{half * (V(shift.x) + mx) + slope * ux, half * (V(shift.y) + my) + slope * uy},
          {V(0), of_mean * x.x, of_mean * x.y, part * x.x * x.x, V(2) * part * x.x * x.y,
           part * x.y * x.y},
          grad * sd};
}

}  // namespace qflux
