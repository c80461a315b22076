// The boxes and moments of a tree's nodes.
#pragma once

#include "../../math/tree.h"
#include "simd.h"
#include "tree.h"

namespace qflux::cpu {
namespace {
namespace tree {

// A box around points: along their main direction or along the axes, whichever is smaller around.
template <class T>
Box<T> box_around(const double* x, const double* y, int64_t count, bool exact_points = true) {
  double mx = 0, my = 0, xx = 0, xy = 0, yy = 0;
  for (int64_t k = 0; k < count; ++k) mx += x[k], my += y[k];
  mx /= static_cast<double>(count);
  my /= static_cast<double>(count);
  for (int64_t k = 0; k < count; ++k) {
    const double dx = x[k] - mx, dy = y[k] - my;
    xx += dx * dx;
    xy += dx * dy;
    yy += dy * dy;
  }
  const Point<double> directions[2] = {{1, 0}, main_direction(xx, xy, yy)};
  Box<T> best{};
  double least = INFINITY;
  for (const Point<double>& u : directions) {
    double left = INFINITY, right = -INFINITY, bottom = INFINITY, top = -INFINITY;
    for (int64_t k = 0; k < count; ++k) {
      const double along = u.x * x[k] + u.y * y[k], across = u.x * y[k] - u.y * x[k];
      left = along < left ? along : left;
      right = along > right ? along : right;
      bottom = across < bottom ? across : bottom;
      top = across > top ? across : top;
    }
    if (!(right - left + top - bottom < least)) continue;
    least = right - left + top - bottom;
    best = make_box<T>(u, left, right, bottom, top, exact_points);
  }
  return best;
}

// The moments of one column of values of a leaf, which is filled up with zeros.
template <int kKeys>
QFLUX_INLINE void column_moments(const double (&x)[kKeys], const double (&y)[kKeys],
                                 const double (&v)[kKeys], double* to) {
  constexpr int kLanes = 8;
  static_assert(kKeys % kLanes == 0, "whole lanes");
  double sums[kColumnMoments][kLanes] = {};
  for (int k = 0; k < kKeys; k += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      sums[0][l] += v[k + l];
      sums[1][l] += v[k + l] * x[k + l];
      sums[2][l] += v[k + l] * y[k + l];
    }
  for (int m = 0; m < kColumnMoments; ++m) {
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += sums[m][l];
    to[m] = sum;
  }
}

template <class T>
void build_leaves(const TreeView<T>& tree, int64_t count, int64_t first, int64_t last,
                  Box<T>* boxes, double* masses, double* moments) {
  for (int64_t leaf = first; leaf < last; ++leaf) {
    const int64_t begin = tree.leaf(leaf), size = lesser(kLeaf, count - leaf * kLeaf);
    double x[kLeaf] = {}, y[kLeaf] = {}, v[kLeaf] = {};
    for (int64_t k = 0; k < size; ++k) {
      x[k] = tree.keys.x[begin + k];
      y[k] = tree.keys.y[begin + k];
    }
    boxes[leaf] = box_around<T>(x, y, size);
    double* to = moments + leaf * tree.width;
    for (int64_t c = 0; c <= tree.keys.value_dim; ++c, to += kColumnMoments) {
      for (int64_t k = 0; k < size; ++k)
        v[k] = c < tree.keys.value_dim ? double(tree.keys.values[c * tree.keys.stride + begin + k])
                                       : 1.0;
      column_moments(x, y, v, to);
    }
    double* mass = masses + 4 * leaf;
    for (int m = 0; m < kColumnMoments; ++m) mass[m] = to[m - kColumnMoments];
    mass[3] = 0;
    for (double* end = moments + (leaf + 1) * tree.width; to < end; ++to) *to = 0;
  }
}

template <class T>
void build_nodes(const TreeView<T>& tree, int height, Box<T>* boxes, double* masses,
                 double* moments) {
  for (int32_t node = tree.first[height]; node < tree.first[height + 1]; ++node) {
    const int32_t begin = tree.child(height, node);
    const int32_t end = begin + kFan < tree.first[height] ? begin + kFan : tree.first[height];
    // The corners of boxes that are wide enough; what their rounding here loses is in the slack.
    double x[4 * kFan], y[4 * kFan];
    int64_t corners = 0;
    for (int m = 0; m < 4; ++m) masses[4 * node + m] = 0;
    for (int64_t m = 0; m < tree.width; ++m) moments[node * tree.width + m] = 0;
    for (int32_t child = begin; child < end; ++child) {
      const Box<T>& box = boxes[child];
      for (int corner = 0; corner < 4; ++corner) {
        const double a = corner & 1 ? 1.0 : -1.0, b = corner & 2 ? 1.0 : -1.0;
        x[corners] = box.x + a * box.ax + b * box.bx;
        y[corners++] = box.y + a * box.ay + b * box.by;
      }
      for (int m = 0; m < 4; ++m) masses[4 * node + m] += masses[4 * child + m];
      for (int64_t m = 0; m < tree.width; ++m)
        moments[node * tree.width + m] += moments[child * tree.width + m];
    }
    boxes[node] = box_around<T>(x, y, corners);
  }
}

}  // namespace tree
}  // namespace
}  // namespace qflux::cpu
