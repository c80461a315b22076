// The hot loops of a tree. A group of rows walks it together, a row in each lane: a node that a row
// keeps whole goes into its sums, and leaves that its boundary crosses are listed and met pair by
// pair, a key in each lane.
#pragma once

#include "../../math/score.h"
#include "../../math/tree.h"
#include "simd.h"
#include "tree.h"

namespace qflux::cpu {
namespace {
namespace tree {

// Leaves or nodes that a row lists before it meets them; also how many sums of a leaf are added up
// in T.
constexpr int kListed = 64;
// Rows that a vector of keys meets before their sums, in T, are passed on.
constexpr int64_t kRowsAtOnce = 128;

template <class T>
QFLUX_INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  // Forms without a mask leave a warning of some compilers about their own headers.
  if constexpr (sizeof(T) == 4)
    return {(typename Vector<T>::Raw)_mm512_maskz_max_ps(0xffff, (__m512)a.raw, (__m512)b.raw)};
  else
    return {(typename Vector<T>::Raw)_mm512_maskz_max_pd(0xff, (__m512d)a.raw, (__m512d)b.raw)};
#else
  return a.raw > b.raw ? a.raw : b.raw;
#endif
}

template <class T>
QFLUX_INLINE Mask<T> mask_of(uint32_t bits) {
#if defined(__AVX512F__)
  return {bits & ((1u << Vector<T>::kWidth) - 1u)};
#else
  using Bits = typename Vector<T>::Bits;
  using Integer = typename Vector<T>::Integer;
  Bits lane;
  for (int l = 0; l < Vector<T>::kWidth; ++l) lane[l] = Integer(1) << l;
  return {((static_cast<Integer>(bits) - Bits{}) & lane) == lane};
#endif
}

template <class T>
QFLUX_INLINE uint32_t bits_of(Mask<T> mask) {
#if defined(__AVX512F__)
  return mask.bits;
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask.bits));
  else
    return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask.bits));
#else
  uint32_t bits = 0;
  for (int l = 0; l < Vector<T>::kWidth; ++l) bits |= (mask.bits[l] ? 1u : 0u) << l;
  return bits;
#endif
}

template <class T>
QFLUX_INLINE double total(Vector<T> v) {
  T lane[Vector<T>::kWidth];
  store(lane, v);
  double sum = 0;
  for (int l = 0; l < Vector<T>::kWidth; ++l) sum += lane[l];
  return sum;
}

template <class T>
QFLUX_INLINE double total_count(typename Vector<T>::Bits counter) {
  int64_t sum = 0;
  for (int l = 0; l < Vector<T>::kWidth; ++l) sum += counter[l];
  return static_cast<double>(sum);
}

// Calls body(columns) with the number of columns as a type where it is a usual one, else 0.
template <class Body>
QFLUX_INLINE void visit_columns(int64_t columns, const Body& body) {
  if (columns == 4) return body(Constant<4>());
  if (columns == 2) return body(Constant<2>());
  body(Constant<0>());
}

// ---- build

template <class T>
bool all_tame(const T* numbers, int64_t count) {
  constexpr T kLargest = sizeof(T) == 4 ? T(1e15) : T(1e75);
  int32_t tame = 1;
  for (int64_t i = 0; i < count; ++i) tame &= absolute(numbers[i]) <= kLargest;
  return tame != 0;
}

// A box around points: along their main direction or along the axes, whichever is smaller around.
template <class T>
Box<T> box_around(const double* x, const double* y, int64_t count) {
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
    best = make_box<T>(u, left, right, bottom, top);
  }
  return best;
}

template <class T>
void build_leaves(const TreeView<T>& tree, int64_t count, int64_t first, int64_t last,
                  Box<T>* boxes, double* masses, double* moments) {
  constexpr int kLanes = 8;
  for (int64_t leaf = first; leaf < last; ++leaf) {
    const int64_t begin = leaf * kLeaf, size = lesser(kLeaf, count - begin);
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
      double sums[kColumnMoments][kLanes] = {};
      for (int64_t k = 0; k < kLeaf; k += kLanes)
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

// ---- pairs of one row with runs of keys

// Runs of `size` keys, of which the numbers tell the places; without numbers one, in front.
struct Runs {
  const int32_t* place;
  int64_t count, size;
  QFLUX_INLINE int64_t begin(int64_t n) const { return place ? place[n] * size : 0; }
};

// Calls body(p, key) for the vectors of products of a row with the keys of runs; lanes behind a run
// are NaN.
template <class T, class Body>
QFLUX_INLINE void each_product(const KeyPlanes<T>& keys, const Runs& runs, const T* record,
                               const Body& body) {
  using V = Vector<T>;
  const V qx(record[0]), qy(record[1]), zero(T(0));
  for (int64_t n = 0; n < runs.count; ++n) {
    const int64_t begin = runs.begin(n), end = begin + runs.size;
    int64_t k = begin;
    for (; k + V::kWidth <= end; k += V::kWidth)
      body(inner_product(qx, qy, load(keys.x + k), load(keys.y + k), zero), k);
    if (k == end) continue;
    const V p = inner_product(qx, qy, load(keys.x + k), load(keys.y + k), zero);
    body(select(lanes_between<T>(0, end - k), p, V(T(NAN))), k);
  }
}

// The weights of a row's pairs, and their sum; NaN has none. Many weights share what tau loses when
// it is rounded to T: the rest.
template <class T>
struct Excess {
  using V = Vector<T>;
  const V tau, rest;
  V sum = V(T(0));
  typename V::Bits counter = typename V::Bits{};

  explicit Excess(const T* record) : tau(record[2]), rest(record[3]) {}
  QFLUX_INLINE V add(V p) {
    const Mask<T> kept = less(tau, p);
    const V w = where(kept, (p - tau) - rest);
    sum = sum + w;
    count(kept, counter);
    return w;
  }
  void take(Mass<T>* out) const {
    out->excess += total(sum);
    out->count += total_count<T>(counter);
  }
};

template <class T>
void mass_of(const KeyPlanes<T>& keys, const Runs& runs, const T* record, Mass<T>* out) {
  using V = Vector<T>;
  Excess<T> excess(record);
  V top(out->top);
  each_product<T>(keys, runs, record, [&](V p, int64_t) QFLUX_INLINE_LAMBDA {
    top = larger(p, top);
    excess.add(p);
  });
  excess.take(out);
  T lane[V::kWidth];
  store(lane, top);
  for (int l = 0; l < V::kWidth; ++l) out->top = lane[l] > out->top ? lane[l] : out->top;
}

template <class T, int kColumns>
void context_columns(const KeyPlanes<T>& keys, const Runs& runs, const T* record, Mass<T>* out,
                     const T* values, double* context) {
  using V = Vector<T>;
  Excess<T> excess(record);
  V sums[kColumns];
  for (int c = 0; c < kColumns; ++c) sums[c] = V(T(0));
  each_product<T>(keys, runs, record, [&](V p, int64_t k) QFLUX_INLINE_LAMBDA {
    const V w = excess.add(p);
    for (int c = 0; c < kColumns; ++c)
      sums[c] = multiply_add(w, load(values + c * keys.stride + k), sums[c]);
  });
  if (out) excess.take(out);
  for (int c = 0; c < kColumns; ++c) context[c] += total(sums[c]);
}

template <class T>
void context_of(const KeyPlanes<T>& keys, const Runs& runs, const T* record, Mass<T>* out,
                double* context) {
  int64_t c = 0;
  for (; c + 4 <= keys.value_dim; c += 4)
    context_columns<T, 4>(keys, runs, record, c == 0 ? out : nullptr, keys.values + c * keys.stride,
                          context + c);
  for (; c + 2 <= keys.value_dim; c += 2)
    context_columns<T, 2>(keys, runs, record, c == 0 ? out : nullptr, keys.values + c * keys.stride,
                          context + c);
  if (c < keys.value_dim)
    context_columns<T, 1>(keys, runs, record, c == 0 ? out : nullptr, keys.values + c * keys.stride,
                          context + c);
}

template <class T, int kColumns>
void kept_sums(const KeyPlanes<T>& keys, const Runs& runs, const T* record, KeptSums* out) {
  using V = Vector<T>;
  const V tau(record[2]), zero(T(0));
  const int64_t columns = kColumns ? kColumns : keys.value_dim;
  const T* grad = record + kRowNumbers;
  V su = zero, sx = zero, sy = zero, sux = zero, suy = zero;
  typename V::Bits counter{};
  each_product<T>(keys, runs, record, [&](V p, int64_t k) QFLUX_INLINE_LAMBDA {
    const Mask<T> kept = less(tau, p);
    V u = zero;
    for (int64_t c = 0; c < columns; ++c)
      u = multiply_add(V(grad[c]), load(keys.values + c * keys.stride + k), u);
    u = where(kept, u);
    const V x = where(kept, load(keys.x + k)), y = where(kept, load(keys.y + k));
    count(kept, counter);
    su = su + u;
    sx = sx + x;
    sy = sy + y;
    sux = multiply_add(u, x, sux);
    suy = multiply_add(u, y, suy);
  });
  out->count += total_count<T>(counter);
  out->u += total(su);
  out->x += total(sx);
  out->y += total(sy);
  out->ux += total(sux);
  out->uy += total(suy);
}

template <class T>
void kept_sums_of(const KeyPlanes<T>& keys, const Runs& runs, const T* record, KeptSums* out) {
  visit_columns(keys.value_dim, [&](auto columns) {
    kept_sums<T, decltype(columns)::kValue>(keys, runs, record, out);
  });
}

// ---- walks

// A group of rows in lanes; those without a row keep nothing.
template <class T>
struct Lanes {
  using V = Vector<T>;
  static constexpr int kVectors = kGroup / V::kWidth;

  V x[kVectors], y[kVectors], tau[kVectors];
  uint32_t all;

  explicit Lanes(const TreeRows<T>& rows) : all((1u << rows.count) - 1u) {
    T numbers[3][kGroup];
    for (int l = 0; l < kGroup; ++l)
      for (int n = 0; n < 3; ++n)
        numbers[n][l] = l < rows.count ? rows.at(l)[n] : n == 2 ? T(INFINITY) : T(0);
    for (int r = 0; r < kVectors; ++r) {
      x[r] = load(numbers[0] + r * V::kWidth);
      y[r] = load(numbers[1] + r * V::kWidth);
      tau[r] = load(numbers[2] + r * V::kWidth);
    }
  }
};

// Takes every node under roots first .. last - 1 to inside(node, rows, high) for the rows that keep
// all of it but not all of its parent, with the upper ends of their reach, or if it is a leaf to
// crossed(leaf, rows) for the rows whose boundary crosses it.
template <class T, class Inside, class Crossed>
QFLUX_INLINE void walk(const TreeView<T>& tree, const Lanes<T>& lanes, int height, int32_t first,
                       int32_t last, const Inside& inside, const Crossed& crossed) {
  using V = Vector<T>;
  struct Entry {
    int32_t node;
    int16_t height;
    uint16_t rows;
  };
  Entry stack[kHeights * kFan];
  V high[Lanes<T>::kVectors];
  for (int32_t root = first; root < last; ++root) {
    int size = 0;
    stack[size++] = {root, static_cast<int16_t>(height), static_cast<uint16_t>(lanes.all)};
    while (size > 0) {
      const Entry at = stack[--size];
      const Box<T>& box = tree.boxes[at.node];
      const Box<V> wide{V(box.x),  V(box.y),  V(box.ax),
                        V(box.ay), V(box.bx), V(box.by)};
      uint32_t above = 0, below = 0;
      for (int r = 0; r < Lanes<T>::kVectors; ++r) {
        const Reach<V> span = reach(wide, lanes.x[r], lanes.y[r]);
        high[r] = span.high;
        above |= bits_of(less(lanes.tau[r], span.low)) << (r * V::kWidth);
        below |= bits_of(less(span.high, lanes.tau[r])) << (r * V::kWidth);
      }
      const uint32_t whole = above & at.rows, rest = at.rows & ~(above | below);
      if (whole) inside(at.node, whole, high);
      if (!rest) continue;
      if (at.height == 0) {
        crossed(at.node, rest);
        continue;
      }
      const int32_t begin = tree.child(at.height, at.node), end = tree.first[at.height];
      for (int32_t child = begin + kFan < end ? begin + kFan : end; child-- > begin;)
        stack[size++] = {child, static_cast<int16_t>(at.height - 1), static_cast<uint16_t>(rest)};
    }
  }
}

template <class T, class Inside, class Crossed>
QFLUX_INLINE void walk(const TreeView<T>& tree, const Lanes<T>& lanes, const Inside& inside,
                       const Crossed& crossed) {
  walk(tree, lanes, tree.height, tree.first[tree.height], tree.first[tree.height + 1], inside,
       crossed);
}

template <class Body>
QFLUX_INLINE void each_row_of(uint32_t rows, const Body& body) {
  for (; rows; rows &= rows - 1) body(__builtin_ctz(rows));
}

// Places that each row of a group has met, handed over when there are many of them.
struct Lists {
  int32_t place[kGroup][kListed];
  int32_t size[kGroup] = {};

  template <class Flush>
  QFLUX_INLINE void push(uint32_t rows, int32_t at, const Flush& flush) {
    each_row_of(rows, [&](int l) QFLUX_INLINE_LAMBDA {
      place[l][size[l]++] = at;
      if (size[l] == kListed) clear(l, flush);
    });
  }
  template <class Flush>
  QFLUX_INLINE void clear(int l, const Flush& flush) {
    if (size[l]) flush(l, place[l], size[l]);
    size[l] = 0;
  }
};

template <class T>
void mass(const TreeView<T>& tree, const TreeRows<T>& rows, Mass<T>* sums, int64_t* pairs) {
  using V = Vector<T>;
  using D = Vector<double>;
  constexpr int kDoubles = kGroup / D::kWidth;
  const Lanes<T> lanes(rows);
  D inner[kColumnMoments][kDoubles];
  V top[Lanes<T>::kVectors];
  for (auto& column : inner)
    for (D& part : column) part = D(0.0);
  for (V& part : top) part = V(T(-INFINITY));
  Lists lists;
  const auto flush = [&](int l, const int32_t* leaves, int64_t count) {
    mass_of(tree.keys, {leaves, count, kLeaf}, rows.at(l), &sums[l]);
    *pairs += count * kLeaf;
  };
  walk(
      tree, lanes,
      [&](int32_t node, uint32_t whole, const V* high) QFLUX_INLINE_LAMBDA {
        const double* mass = tree.masses + 4 * node;
        for (int r = 0; r < kDoubles; ++r) {
          const Mask<double> mask = mask_of<double>(whole >> (r * D::kWidth));
          for (int m = 0; m < kColumnMoments; ++m)
            inner[m][r] = add_where(mask, D(mass[m]), inner[m][r]);
        }
        for (int r = 0; r < Lanes<T>::kVectors; ++r)
          top[r] = select(mask_of<T>(whole >> (r * V::kWidth)), larger(high[r], top[r]), top[r]);
      },
      [&](int32_t leaf, uint32_t crossing)
          QFLUX_INLINE_LAMBDA { lists.push(crossing, leaf, flush); });
  double moments[kColumnMoments][kGroup];
  T tops[kGroup];
  for (int m = 0; m < kColumnMoments; ++m)
    for (int r = 0; r < kDoubles; ++r) store(moments[m] + r * D::kWidth, inner[m][r]);
  for (int r = 0; r < Lanes<T>::kVectors; ++r) store(tops + r * V::kWidth, top[r]);
  for (int l = 0; l < rows.count; ++l) {
    lists.clear(l, flush);
    const T* q = rows.at(l);
    const double own[kColumnMoments] = {moments[0][l], moments[1][l], moments[2][l]};
    sums[l].excess += weighed(own, q[0], q[1], double(q[2]) + q[3]);
    sums[l].count += own[0];
    sums[l].top = tops[l] > sums[l].top ? tops[l] : sums[l].top;
  }
}

// Adds the moments of nodes.
template <class T>
void add_moments(const TreeView<T>& tree, const int32_t* nodes, int64_t count, double* sums) {
  using D = Vector<double>;
  for (int64_t m = 0; m < tree.width; m += D::kWidth) {
    D sum = load(sums + m);
    for (int64_t n = 0; n < count; ++n) sum = sum + load(tree.moments + nodes[n] * tree.width + m);
    store(sums + m, sum);
  }
}

// A walk that adds up, for each row, the moments of what it keeps whole: moments [kGroup][width].
template <class T, class Flush>
QFLUX_INLINE void walk_for_moments(const TreeView<T>& tree, const TreeRows<T>& rows,
                                   double* moments, const Flush& flush) {
  const Lanes<T> lanes(rows);
  Lists leaves, nodes;
  const auto flush_nodes = [&](int l, const int32_t* list, int64_t count) {
    add_moments(tree, list, count, moments + l * tree.width);
  };
  walk(
      tree, lanes,
      [&](int32_t node, uint32_t whole, const Vector<T>*)
          QFLUX_INLINE_LAMBDA { nodes.push(whole, node, flush_nodes); },
      [&](int32_t leaf, uint32_t crossing)
          QFLUX_INLINE_LAMBDA { leaves.push(crossing, leaf, flush); });
  for (int l = 0; l < rows.count; ++l) {
    nodes.clear(l, flush_nodes);
    leaves.clear(l, flush);
  }
}

// Numbers on the stack where they are few.
class Room {
 public:
  explicit Room(int64_t count)
      : many_(count > kFew ? count : 0), numbers_(count > kFew ? many_.get() : few_) {
    if (count <= kFew)
      for (int64_t n = 0; n < count; ++n) few_[n] = 0;
  }
  double* get() const { return numbers_; }

 private:
  static constexpr int64_t kFew = kGroup * 16;
  double few_[kFew];
  const Array<double> many_;
  double* const numbers_;
};

template <class T>
void context(const TreeView<T>& tree, const TreeRows<T>& rows, Mass<T>* sums, double* contexts,
             int64_t* pairs) {
  const int64_t value_dim = tree.keys.value_dim;
  const Room moments(kGroup * tree.width);
  walk_for_moments(tree, rows, moments.get(), [&](int l, const int32_t* leaves, int64_t count) {
    context_of(tree.keys, {leaves, count, kLeaf}, rows.at(l), &sums[l], contexts + l * value_dim);
    *pairs += count * kLeaf;
  });
  for (int l = 0; l < rows.count; ++l) {
    const double* column = moments.get() + l * tree.width;
    const T* q = rows.at(l);
    const double x = q[0], y = q[1], tau = double(q[2]) + q[3];
    for (int64_t c = 0; c < value_dim; ++c, column += kColumnMoments)
      contexts[l * value_dim + c] += weighed(column, x, y, tau);
    sums[l].excess += weighed(column, x, y, tau);
    sums[l].count += column[0];
  }
}

template <class T>
void row_gradient(const TreeView<T>& tree, const TreeRows<T>& rows, KeptSums* sums) {
  const int64_t value_dim = tree.keys.value_dim;
  const Room moments(kGroup * tree.width);
  walk_for_moments(tree, rows, moments.get(), [&](int l, const int32_t* leaves, int64_t count) {
    kept_sums_of(tree.keys, {leaves, count, kLeaf}, rows.at(l), &sums[l]);
  });
  for (int l = 0; l < rows.count; ++l) {
    const double* column = moments.get() + l * tree.width;
    const T* grad = rows.at(l) + kRowNumbers;
    KeptSums& sum = sums[l];
    for (int64_t c = 0; c < value_dim; ++c, column += kColumnMoments) {
      sum.u += grad[c] * column[0];
      sum.ux += grad[c] * column[1];
      sum.uy += grad[c] * column[2];
    }
    sum.count += column[0];
    sum.x += column[1];
    sum.y += column[2];
  }
}

// ---- gradients of keys

// Adds what the vector of keys from `k` on gets from rows, numbered by `list` or 0 on:
// add(component, vector) takes keys' x, y, then values. Row n sees lanes below visible + n.
template <int kColumns, bool kCausal, class T, class Add>
QFLUX_INLINE void meet_rows(const KeyPlanes<T>& keys, int64_t k, const TreeRows<T>& rows,
                            const int32_t* list, int64_t count, int64_t visible, const Add& add) {
  using V = Vector<T>;
  const int64_t columns = kColumns ? kColumns : keys.value_dim;
  const V kx = load(keys.x + k), ky = load(keys.y + k), zero(T(0));
  V ax = zero, ay = zero, weights[kColumns ? 1 : kRowsAtOnce];
  V values[kColumns ? kColumns : 1], sums[kColumns ? kColumns : 1];
  for (int c = 0; c < kColumns; ++c) {
    values[c] = load(keys.values + c * keys.stride + k);
    sums[c] = zero;
  }
  for (int64_t n = 0; n < count; ++n) {
    const T* q = rows.at(list ? list[n] : n);
    const T* grad = q + kRowNumbers;
    const V qx(q[0]), qy(q[1]), tau(q[2]);
    const V p = inner_product(qx, qy, kx, ky, zero);
    Mask<T> kept = less(tau, p);
    if constexpr (kCausal) kept = both(kept, lanes_between<T>(0, visible + n));
    const V w = where(kept, p - tau);
    V u(q[3]);
    for (int64_t c = 0; c < columns; ++c) {
      const V value = kColumns ? values[c] : load(keys.values + c * keys.stride + k);
      u = multiply_add(value, V(grad[c]), u);
      if constexpr (kColumns > 0) sums[c] = multiply_add(w, V(grad[c]), sums[c]);
    }
    ax = multiply_add_where(kept, u, qx, ax);
    ay = multiply_add_where(kept, u, qy, ay);
    if constexpr (kColumns == 0) weights[n] = w;
  }
  add(0, ax);
  add(1, ay);
  for (int64_t c = 0; c < columns; ++c) {
    V sum = zero;
    if constexpr (kColumns > 0) {
      sum = sums[c];
    } else {
      for (int64_t n = 0; n < count; ++n)
        sum = multiply_add(weights[n], V(rows.at(list ? list[n] : n)[kRowNumbers + c]), sum);
    }
    add(2 + c, sum);
  }
}

// What rows add to the sums of a node that they keep whole.
template <class T>
void row_moments(const T* record, int64_t value_dim, double* to) {
  const double x = record[0], y = record[1], tau = record[2];
  for (int64_t c = 0; c <= value_dim; ++c, to += kColumnMoments) {
    const double grad = c < value_dim ? record[kRowNumbers + c] : record[3];
    to[0] = -tau * grad;
    to[1] = x * grad;
    to[2] = y * grad;
  }
}

template <class T>
void key_gradient(const TreeView<T>& tree, const TreeRows<T>& rows, int height, int32_t first,
                  int32_t last, const TreeGradients& out) {
  using V = Vector<T>;
  using D = Vector<double>;
  const int64_t value_dim = tree.keys.value_dim, width = tree.width, stride = tree.keys.stride;
  const Lanes<T> lanes(rows);
  // Of each row, and behind them of all; made when a node wants them.
  const Room moments((kGroup + 1) * width);
  double* const common = moments.get() + kGroup * width;
  bool made = false;
  const auto make_moments = [&] {
    made = true;
    for (int l = 0; l < rows.count; ++l) {
      double* own = moments.get() + l * width;
      row_moments(rows.at(l), value_dim, own);
      for (int64_t m = 0; m < width; ++m) common[m] += own[m];
    }
  };
  visit_columns(value_dim, [&](auto columns) QFLUX_INLINE_LAMBDA {
    walk(
        tree, lanes, height, first, last,
        [&](int32_t node, uint32_t whole, const V*) QFLUX_INLINE_LAMBDA {
          if (!made) make_moments();
          double* to = out.nodes + node * width;
          for (int64_t m = 0; m < width; m += D::kWidth) {
            D sum = load(to + m);
            if (whole == lanes.all)
              sum = sum + load(common + m);
            else
              each_row_of(whole, [&](int l) QFLUX_INLINE_LAMBDA {
                sum = sum + load(moments.get() + l * width + m);
              });
            store(to + m, sum);
          }
        },
        [&](int32_t leaf, uint32_t crossing) QFLUX_INLINE_LAMBDA {
          int32_t list[kGroup];
          int64_t count = 0;
          each_row_of(crossing, [&](int l) QFLUX_INLINE_LAMBDA { list[count++] = l; });
          for (int64_t k = leaf * kLeaf; k < (leaf + 1) * kLeaf; k += V::kWidth)
            meet_rows<decltype(columns)::kValue, false>(
                tree.keys, k, rows, list, count, 0, [&](int64_t c, V sum) QFLUX_INLINE_LAMBDA {
                  T lane[V::kWidth];
                  store(lane, sum);
                  double* to = out.pairs + c * stride + k;
                  for (int l = 0; l < V::kWidth; ++l) to[l] += lane[l];
                });
        });
  });
}

template <class T>
void hand_down(const TreeView<T>& tree, const TreeGradients& sums, int height, int32_t first,
               int32_t last, const int32_t* order, int64_t count, double* point, double* values) {
  const int64_t value_dim = tree.keys.value_dim, width = tree.width, stride = tree.keys.stride;
  for (; height > 0; --height) {
    for (int32_t node = first; node < last; ++node) {
      const int32_t begin = tree.child(height, node), end = tree.first[height];
      for (int32_t child = begin; child < begin + kFan && child < end; ++child)
        for (int64_t m = 0; m < width; ++m)
          sums.nodes[child * width + m] += sums.nodes[node * width + m];
    }
    const int32_t begin = tree.child(height, first), end = tree.child(height, last);
    first = begin;
    last = end < tree.first[height] ? end : tree.first[height];
  }
  for (int64_t n = first * kLeaf; n < lesser(last * kLeaf, count); ++n) {
    const double* column = sums.nodes + n / kLeaf * width;
    const double kx = tree.keys.x[n], ky = tree.keys.y[n];
    double x = sums.pairs[n], y = sums.pairs[stride + n];
    const int64_t key = order[n];
    for (int64_t c = 0; c < value_dim; ++c, column += kColumnMoments) {
      const double v = tree.keys.values[c * stride + n];
      x += v * column[1];
      y += v * column[2];
      values[key * value_dim + c] +=
          sums.pairs[(2 + c) * stride + n] + column[0] + kx * column[1] + ky * column[2];
    }
    point[2 * key] += x + column[1];
    point[2 * key + 1] += y + column[2];
  }
}

// ---- runs

template <class T>
void run_mass(const KeyPlanes<T>& keys, int64_t count, const T* record, Mass<T>* out) {
  mass_of(keys, {nullptr, 1, count}, record, out);
}
template <class T>
void run_context(const KeyPlanes<T>& keys, int64_t count, const T* record, Mass<T>* out,
                 double* context) {
  context_of(keys, {nullptr, 1, count}, record, out, context);
}
template <class T>
void run_row_gradient(const KeyPlanes<T>& keys, int64_t count, const T* record, KeptSums* out) {
  kept_sums_of(keys, {nullptr, 1, count}, record, out);
}

template <class T>
void run_key_gradient(const KeyPlanes<T>& keys, int64_t count, const TreeRows<T>& rows,
                      int64_t visible, double* point, double* values) {
  using V = Vector<T>;
  const int64_t value_dim = keys.value_dim;
  visit_columns(value_dim, [&](auto columns) QFLUX_INLINE_LAMBDA {
    for (int64_t k = 0; k < count; k += V::kWidth) {
      const int64_t valid = lesser(V::kWidth, count - k);
      const auto add = [&](int64_t c, V sum) QFLUX_INLINE_LAMBDA {
        T lane[V::kWidth];
        store(lane, sum);
        for (int64_t l = 0; l < valid; ++l)
          (c < 2 ? point[2 * (k + l) + c] : values[(k + l) * value_dim + c - 2]) += lane[l];
      };
      // Row n sees keys up to visible + n - 1: the first rows see some of this vector's, the others
      // all.
      const int64_t from = greater(0, k + 1 - visible);
      const int64_t full = lesser(greater(from, k + V::kWidth - visible), rows.count);
      for (int64_t n = from; n < rows.count;) {
        const bool edge = n < full;
        const int64_t end = lesser(n + kRowsAtOnce, edge ? full : rows.count);
        const TreeRows<T> part{rows.at(n), rows.stride, end - n};
        if (edge)
          meet_rows<decltype(columns)::kValue, true>(keys, k, part, nullptr, end - n,
                                                     visible + n - k, add);
        else
          meet_rows<decltype(columns)::kValue, false>(keys, k, part, nullptr, end - n, 0, add);
        n = end;
      }
    }
  });
}

template <class T>
constexpr TreeLoops<T> kLoops = {all_tame<T>,     build_leaves<T>, build_nodes<T>,
                                 mass<T>,         context<T>,      row_gradient<T>,
                                 key_gradient<T>, hand_down<T>,    run_mass<T>,
                                 run_context<T>,  run_row_gradient<T>, run_key_gradient<T>};

}  // namespace tree
}  // namespace
}  // namespace qflux::cpu
