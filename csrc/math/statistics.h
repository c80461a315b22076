// Mean and deviation of a row's scores from the moments of its keys: no pass over pairs
// (docs/operators.md, "Statistics without pairs").
#pragma once

#include "scalar.h"

namespace qflux {

// Sums over a window of keys, taken relative to one of them (`shift` below) so that equal states
// have a variance of exactly zero.
struct Moments {
  double count = 0, x = 0, y = 0, xx = 0, xy = 0, yy = 0;

  QFLUX_INLINE void add(double dx, double dy) {
    count += 1;
    x += dx;
    y += dy;
    xx = multiply_add(dx, dx, xx);
    xy = multiply_add(dx, dy, xy);
    yy = multiply_add(dy, dy, yy);
  }
  QFLUX_INLINE void add(const Moments& other) {
    count += other.count;
    x += other.x;
    y += other.y;
    xx += other.xx;
    xy += other.xy;
    yy += other.yy;
  }
};

// tau = mean + sigma * sqrt(variance + eps) of (x . k + 1) / 2 over the window's keys k.
QFLUX_INLINE double threshold(Point<double> x, const Moments& window, Point<double> shift,
                              double sigma, double eps) {
  const double scale = 1 / window.count;
  const double mx = window.x * scale, my = window.y * scale;
  const double cxx = multiply_add(-mx, mx, window.xx * scale);
  const double cxy = multiply_add(-mx, my, window.xy * scale);
  const double cyy = multiply_add(-my, my, window.yy * scale);
  const double mean = (x.x * (shift.x + mx) + x.y * (shift.y + my) + 1) / 2;
  double variance = (x.x * x.x * cxx + 2 * x.x * x.y * cxy + x.y * x.y * cyy) / 4;
  variance = variance < 0 ? 0 : variance;
  // An infinite state leaves no score defined, even where its infinities agree: NaN, as for a NaN.
  const double undefined = (x.x - x.x) + (x.y - x.y);
  return mean + sigma * square_root(variance + eps) + undefined;
}

// What tau owes to its row, to the sums over its window and to sigma, for a gradient `grad` of tau.
// With the window's mean m and covariance C = M - m m', v = x' C x / 4 and sd = sqrt(v + eps):
//   d tau / dx = (shift + m) / 2 + sigma C x / (4 sd),  d tau / d sigma = sd,
//   d tau / dM = sigma x x' / (8 sd),  d tau / dm = x / 2 - sigma (x . m) x / (4 sd).
struct ThresholdGradient {
  Point<double> x;
  Moments sums;  // `count` has none
  double sigma;
};

QFLUX_INLINE ThresholdGradient threshold_vjp(Point<double> x, const Moments& window,
                                             Point<double> shift, double sigma, double eps,
                                             double grad) {
  const double scale = 1 / window.count;
  const double mx = window.x * scale, my = window.y * scale;
  const double cxx = window.xx * scale - mx * mx;
  const double cxy = window.xy * scale - mx * my;
  const double cyy = window.yy * scale - my * my;
  const double ux = cxx * x.x + cxy * x.y, uy = cxy * x.x + cyy * x.y;
  const double variance = (x.x * ux + x.y * uy) / 4;
  // Where nothing deviates, or rounding says less than nothing, the deviation has no gradient.
  const bool deviates = variance > 0;
  const double sd = square_root((deviates ? variance : 0.0) + eps);
  const double half = grad / 2, slope = deviates ? half * sigma / (2 * sd) : 0.0;
  const double of_mean = (half - slope * (x.x * mx + x.y * my)) * scale, part = slope * scale / 2;
  return {
      {half * (shift.x + mx) + slope * ux, half * (shift.y + my) + slope * uy},
      {0, of_mean * x.x, of_mean * x.y, part * x.x * x.x, 2 * part * x.x * x.y, part * x.y * x.y},
      grad * sd};
}

}  // namespace qflux
