// The gradient of tau on its way to states, keys and sigma.
#include "../math/statistics.h"
#include "device.h"
#include "parallel.h"

namespace qflux::cpu {
namespace {

template <class T>
Point<T> narrow(double x, double y) {
  return {static_cast<T>(x), static_cast<T>(y)};
}

// One pass over the rows, whose windows grow, and one back over the keys, each of which is in the
// windows of all rows from some row on.
template <class T>
void threshold_backward(const ThresholdBackwardParams<T>& params, BatchIndex b) {
  const PairParams<T>& p = params.pair;
  const Visibility visibility = p.visibility(b);
  const int64_t rows = visibility.row_end, keys = visibility.key_end;
  const bool whole = p.whole_window || !p.causal;
  if (rows == 0 || keys == 0) return;
  const Point<T> first = load_point(p.key_points, b, 0);
  const Point<double> shift{first.x, first.y};
  const auto relative = [&](int64_t j) {
    const Point<T> key = load_point(p.key_points, b, j);
    return Point<double>{key.x - shift.x, key.y - shift.y};
  };
  Moments window;
  int64_t n = 0;
  const auto extend = [&](int64_t end) {
    for (; n < end; ++n) {
      const Point<double> d = relative(n);
      window.add({1, d.x, d.y, d.x * d.x, d.x * d.y, d.y * d.y});
    }
  };
  if (whole) extend(keys);
  // What the keys of a window get: of all rows together where they share it, else of each row.
  Moments sums;
  double* of_row = params.window_grads + p.flat(b) * p.rows * kWindowSums;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t visible = visibility.visible_keys(i);
    if (visible == 0) continue;
    if (!whole) extend(visible);
    const Point<T> x = load_point(p.states, b, i);
    const ThresholdGradient of =
        threshold_vjp(Point<double>{double(x.x), double(x.y)}, window, shift, p.coefficient[b],
                      p.eps, params.grad_threshold.at(b, i));
    add_point(params.grad_states, b, i, narrow<T>(of.x.x, of.x.y));
    if (params.grad_coefficient) params.grad_coefficient.at(b, i) += static_cast<T>(of.sigma);
    if (whole) {
      sums.add(of.sums);
    } else {
      double* at = of_row + i * kWindowSums;
      at[0] = of.sums.x, at[1] = of.sums.y;
      at[2] = of.sums.xx, at[3] = of.sums.xy, at[4] = of.sums.yy;
    }
  }
  int64_t row = rows;
  for (int64_t j = keys - 1; j >= 0; --j) {
    while (!whole && row > 0 && visibility.visible_keys(row - 1) > j) {
      const double* at = of_row + --row * kWindowSums;
      sums.add({0, at[0], at[1], at[2], at[3], at[4]});
    }
    const Point<double> d = relative(j);
    add_point(params.grad_keys, b, j,
              narrow<T>(sums.x + 2 * sums.xx * d.x + sums.xy * d.y,
                        sums.y + sums.xy * d.x + 2 * sums.yy * d.y));
  }
}

}  // namespace

template <class T>
void Device::threshold_backward(const ThresholdBackwardParams<T>& params) {
  for_each_block(params.pair.batch(), 1, false, 1, [&](int64_t n, int64_t) {
    cpu::threshold_backward(params, params.pair.index(n));
  });
}

template void Device::threshold_backward(const ThresholdBackwardParams<float>&);
template void Device::threshold_backward(const ThresholdBackwardParams<double>&);

}  // namespace qflux::cpu
