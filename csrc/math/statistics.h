// Mean and deviation of a row's scores from the moments of its keys: no pass over pairs (SPEC 2).
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

}  // namespace qflux
