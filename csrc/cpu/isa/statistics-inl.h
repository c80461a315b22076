// Windows grow along the rows, one key after another; what follows from them is computed with a row
// in each lane.
#pragma once

#include "simd.h"
#include "statistics.h"

namespace qflux::cpu {
namespace {
namespace statistics {

using V = Vector<double>;

// Rows whose windows are kept as planes between the two loops: 4 KB.
constexpr int64_t kRows = 64;
static_assert(kRows % V::kWidth == 0, "whole vectors");

// For each of a few rows, its state and its window.
struct RowPlanes {
  double x[kRows], y[kRows], window[6][kRows];

  void set(int64_t row, Point<double> state, const Moments& m) {
    x[row] = state.x;
    y[row] = state.y;
    const double of[6] = {m.count, m.x, m.y, m.xx, m.xy, m.yy};
    for (int64_t n = 0; n < 6; ++n) window[n][row] = of[n];
  }
  // A row without keys, of which nothing may depend on what its state is.
  void set_empty(int64_t row) { set(row, {0, 0}, {1, 0, 0, 0, 0, 0}); }
  // The last vector may overhang the rows.
  void pad(int64_t rows) {
    for (; rows % V::kWidth != 0; ++rows) set_empty(rows);
  }
  Point<V> states(int64_t row) const { return {load(x + row), load(y + row)}; }
  MomentsOf<V> windows(int64_t row) const {
    return {load(window[0] + row), load(window[1] + row), load(window[2] + row),
            load(window[3] + row), load(window[4] + row), load(window[5] + row)};
  }
};

template <class T>
QFLUX_INLINE Point<double> state_of(const View<const T>& states, BatchIndex b, int64_t i) {
  const T* const state = states.sequence(b) + i * states.token;
  return {double(state[0]), double(state[states.component])};
}

template <class T>
Moments moments(const T* key_x, const T* key_y, int64_t first, int64_t last, Point<double> shift) {
  Moments sums;
  for (int64_t j = first; j < last; ++j) sums.add(key_x[j] - shift.x, key_y[j] - shift.y);
  return sums;
}

template <class T>
void thresholds(const Windows<T>& of, const View<const T>& states, BatchIndex b, int64_t first,
                int64_t last, T* tau) {
  const Visibility visibility = of.visibility;
  const Point<double> shift = of.shift;
  const int64_t start = of.whole ? visibility.key_end : visibility.visible_keys(first);
  // A window that ends with a tile still counts as that tile's.
  int64_t n = start > 0 ? (start - 1) / kMomentsTile * kMomentsTile : 0;
  const Moments* before = of.before + n / kMomentsTile;
  Moments inside = moments(of.key_x, of.key_y, n - of.base, start - of.base, shift);
  n = start;
  RowPlanes rows;
  double found[kRows];
  for (int64_t chunk = first; chunk < last; chunk += kRows) {
    const int64_t count = lesser(kRows, last - chunk);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t i = chunk + row, visible = visibility.visible_keys(i);
      if (visible == 0) {
        rows.set_empty(row);
        continue;
      }
      for (const int64_t end = of.whole ? start : visible; n < end; ++n) {
        if (n % kMomentsTile == 0 && n > 0) {
          inside = Moments{};
          ++before;
        }
        inside.add(of.key_x[n - of.base] - shift.x, of.key_y[n - of.base] - shift.y);
      }
      Moments window = *before;
      window.add(inside);
      rows.set(row, state_of(states, b, i), window);
    }
    rows.pad(count);
    for (int64_t row = 0; row < count; row += V::kWidth)
      store(found + row, threshold(rows.states(row), rows.windows(row), shift, of.sigma, of.eps));
    for (int64_t row = 0; row < count; ++row)
      tau[chunk + row - first] =
          visibility.visible_keys(chunk + row) > 0 ? static_cast<T>(found[row]) : T(0);
  }
}

template <class T>
Point<T> narrow(double x, double y) {
  return {static_cast<T>(x), static_cast<T>(y)};
}

// One pass over the rows, whose windows grow, and one back over the keys, each of which is in the
// windows of all rows from some row on.
template <class T>
void backward(const ThresholdBackwardParams<T>& params, BatchIndex b) {
  const PairParams<T>& p = params.pair;
  const Visibility visibility = p.visibility(b);
  const int64_t last = visibility.row_end, keys = visibility.key_end;
  const bool whole = p.whole_window || !p.causal;
  if (last == 0 || keys == 0) return;
  const Point<double> shift = state_of(p.key_points, b, 0);
  const auto relative = [&](int64_t j) QFLUX_INLINE_LAMBDA {
    const Point<double> key = state_of(p.key_points, b, j);
    return Point<double>{key.x - shift.x, key.y - shift.y};
  };
  Moments window;
  int64_t n = 0;
  const auto extend = [&](int64_t end) QFLUX_INLINE_LAMBDA {
    for (; n < end; ++n) {
      const Point<double> d = relative(n);
      window.add(d.x, d.y);
    }
  };
  if (whole) extend(keys);
  // What the keys of a window get: of all rows together where they share it, else of each row.
  Moments sums;
  double* of_row = params.window_grads + p.flat(b) * p.rows * kWindowSums;
  const double sigma = p.coefficient[b];
  RowPlanes rows;
  double grad[kRows], of_x[kRows], of_y[kRows], of_sigma[kRows], of_sums[kWindowSums][kRows];
  for (int64_t chunk = 0; chunk < last; chunk += kRows) {
    const int64_t count = lesser(kRows, last - chunk);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t i = chunk + row, visible = visibility.visible_keys(i);
      grad[row] = visible == 0 ? 0.0 : double(params.grad_threshold.at(b, i));
      if (visible == 0) {
        rows.set_empty(row);
        continue;
      }
      if (!whole) extend(visible);
      rows.set(row, state_of(p.states, b, i), window);
    }
    rows.pad(count);
    for (int64_t row = count; row % V::kWidth != 0; ++row) grad[row] = 0;
    for (int64_t row = 0; row < count; row += V::kWidth) {
      const auto of =
          threshold_vjp(rows.states(row), rows.windows(row), shift, sigma, p.eps, load(grad + row));
      store(of_x + row, of.x.x);
      store(of_y + row, of.x.y);
      store(of_sigma + row, of.sigma);
      const V planes[kWindowSums] = {of.sums.x, of.sums.y, of.sums.xx, of.sums.xy, of.sums.yy};
      for (int64_t s = 0; s < kWindowSums; ++s) store(of_sums[s] + row, planes[s]);
    }
    for (int64_t row = 0; row < count; ++row) {
      const int64_t i = chunk + row;
      if (visibility.visible_keys(i) == 0) continue;
      add_point(params.grad_states, b, i, narrow<T>(of_x[row], of_y[row]));
      if (params.grad_coefficient)
        params.grad_coefficient.at(b, i) += static_cast<T>(of_sigma[row]);
      if (whole)
        sums.add({0, of_sums[0][row], of_sums[1][row], of_sums[2][row], of_sums[3][row],
                  of_sums[4][row]});
      else
        for (int64_t s = 0; s < kWindowSums; ++s) of_row[i * kWindowSums + s] = of_sums[s][row];
    }
  }
  int64_t row = last;
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

template <class T>
constexpr StatisticsLoops<T> kLoops = {moments<T>, thresholds<T>, backward<T>};

}  // namespace statistics
}  // namespace
}  // namespace qflux::cpu
