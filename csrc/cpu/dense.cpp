// Every pair of a sequence, forward and backward: a group of owners in registers against a vector
// of the others. The forward and the row pass own rows and stream keys; the key pass owns keys and
// streams rows. Sums run in vectors of T inside a tile and continue in `Total` across tiles.
#include "dense.h"

#include <memory>

#include "../math/score.h"
#include "../math/statistics.h"
#include "simd.h"

namespace qflux::cpu {
namespace {

#define QFLUX_INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t kKeyTile = 2048;     // keys of the fast path, two planes: 16 KB of L1
constexpr int64_t kRowTile = 1024;     // rows of its key pass, six planes: 24 KB
constexpr int64_t kGeneralTile = 512;  // of the general path, whose weights are staged in L1 too
constexpr int kGroup = 4;              // owners in registers
constexpr int kColumns = 4;            // value columns accumulated together

// Continues a tile's sums so that the error does not grow with the number of tiles.
template <class T>
struct Total;
template <>
struct Total<float> {
  double value = 0;
  void add(float part) { value += part; }
  float get() const { return static_cast<float>(value); }
};
template <>
struct Total<double> {
  double value = 0, error = 0;
  void add(double part) {  // Knuth's two-sum
    const double sum = value + part;
    const double shadow = sum - value;
    error += (value - (sum - shadow)) + (part - shadow);
    value = sum;
  }
  // An overflow makes the error term NaN; the sum itself is then the answer.
  double get() const { return error == error ? value + error : value; }
};

template <class T>
struct Group {
  int64_t owner[kGroup];
  int64_t begin[kGroup], end[kGroup];  // the others each owner meets

  int64_t lowest() const {
    int64_t n = begin[0];
    for (int r = 1; r < kGroup; ++r) n = begin[r] < n ? begin[r] : n;
    return n;
  }
  int64_t highest() const {
    int64_t n = end[0];
    for (int r = 1; r < kGroup; ++r) n = end[r] > n ? end[r] : n;
    return n;
  }
  // The range that every owner meets, in whole vectors; empty if begin >= end.
  int64_t common_begin() const {
    constexpr int64_t width = Vector<T>::kWidth;
    int64_t n = begin[0];
    for (int r = 1; r < kGroup; ++r) n = begin[r] > n ? begin[r] : n;
    return (n + width - 1) / width * width;
  }
  int64_t common_end() const {
    constexpr int64_t width = Vector<T>::kWidth;
    int64_t n = end[0];
    for (int r = 1; r < kGroup; ++r) n = end[r] < n ? end[r] : n;
    return n / width * width;
  }
};

// Calls body(j, masks or nullptr) for the vectors of others in [tile_begin, tile_end).
template <class T, class Body>
QFLUX_INLINE void for_each_vector(const Group<T>& group, int64_t tile_begin, int64_t tile_end,
                                  const Body& body) {
  constexpr int64_t width = Vector<T>::kWidth;
  const auto masked = [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j += width) {
      Mask<T> visible[kGroup];
      for (int r = 0; r < kGroup; ++r)
        visible[r] = lanes_between<T>(group.begin[r] - j, group.end[r] - j);
      body(j, visible);
    }
  };
  const auto clamp = [&](int64_t n) {
    return n < tile_begin ? tile_begin : n > tile_end ? tile_end : n;
  };
  const int64_t lowest = clamp(group.lowest() / width * width);
  const int64_t highest = clamp((group.highest() + width - 1) / width * width);
  const int64_t common_begin = group.common_begin(), common_end = group.common_end();
  if (common_begin >= common_end) return masked(lowest, highest);
  const int64_t begin = clamp(common_begin), end = clamp(common_end);
  masked(lowest, begin);
  for (int64_t j = begin; j < end; j += width) body(j, nullptr);
  masked(end, highest);
}

template <class T>
QFLUX_INLINE Vector<T> visible_only(const Mask<T>* visible, int r, Vector<T> v) {
  return visible ? select(visible[r], v, Vector<T>(T(0))) : v;
}

template <class Pair, class T>
struct MakePair;
template <class T>
struct MakePair<ThresholdPair<Vector<T>>, T> {
  static QFLUX_INLINE ThresholdPair<Vector<T>> make(const Sequence<T>&, Vector<T> limit) {
    return {limit};
  }
};
template <class T>
struct MakePair<GatePair<Vector<T>>, T> {
  static QFLUX_INLINE GatePair<Vector<T>> make(const Sequence<T>& s, Vector<T>) {
    return {Vector<T>(s.eps), Vector<T>(s.min_gate)};
  }
};

// Only a weight that is finite wherever it is dropped may be left out of a sum instead of being
// added as zero; it saves the vector units a select.
template <class Pair>
constexpr bool kSkipsDropped = false;
template <class V>
constexpr bool kSkipsDropped<ThresholdPair<V>> = true;

template <class T>
Group<T> row_group(const Sequence<T>& s, int64_t row, int64_t last) {
  Group<T> group;
  for (int r = 0; r < kGroup; ++r) {
    group.owner[r] = row + r < last ? row + r : last - 1;
    group.begin[r] = 0;
    group.end[r] = s.visibility.visible_keys(group.owner[r]);
  }
  return group;
}

template <class T>
Group<T> key_group(const Sequence<T>& s, int64_t key, int64_t last) {
  Group<T> group;
  for (int r = 0; r < kGroup; ++r) {
    group.owner[r] = key + r < last ? key + r : last - 1;
    group.begin[r] = s.visibility.first_row(group.owner[r]);
    group.end[r] = s.visibility.row_end;
    if (group.begin[r] > group.end[r]) group.begin[r] = group.end[r];
  }
  return group;
}

template <class T>
int32_t lanes_total(const typename Vector<T>::Bits& counter) {
  int64_t n = 0;
  for (int lane = 0; lane < Vector<T>::kWidth; ++lane) n += counter[lane];
  return static_cast<int32_t>(n);
}

// Fast path: values are the keys.
template <class Pair, bool kDegree, class T>
void forward_keys(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  using V = Vector<T>;
  Total<T> totals[kBlock][3];
  int32_t degrees[kBlock] = {};
  const V bias(static_cast<T>(Pair::kBias));
  const int64_t end = s.visibility.visible_keys(last - 1);
  for (int64_t tile = 0; tile < end; tile += kKeyTile) {
    for (int64_t row = first; row < last; row += kGroup) {
      const Group<T> group = row_group(s, row, last);
      V qx[kGroup], qy[kGroup], cx[kGroup], cy[kGroup], strength[kGroup];
      Pair pair[kGroup];
      typename V::Bits kept_count[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        const int64_t i = group.owner[r];
        qx[r] = V(s.query_x[i]);
        qy[r] = V(s.query_y[i]);
        pair[r] = MakePair<Pair, T>::make(s, V(s.limit[i]));
        cx[r] = cy[r] = strength[r] = V(T(0));
        kept_count[r] = typename V::Bits{};
      }
      for_each_vector(
          group, tile, tile + kKeyTile, [&](int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
            const V key_x = load(s.key_x + j), key_y = load(s.key_y + j);
            for (int r = 0; r < kGroup; ++r) {
              const V kx = visible_only(visible, r, key_x), ky = visible_only(visible, r, key_y);
              const V p = inner_product(qx[r], qy[r], kx, ky, bias);
              auto kept = pair[r].kept(p);
              if (visible) kept = both(kept, visible[r]);
              if constexpr (kSkipsDropped<Pair>) {
                cx[r] = multiply_add_where(kept, p, kx, cx[r]);
                cy[r] = multiply_add_where(kept, p, ky, cy[r]);
                strength[r] = add_where(kept, p, strength[r]);
              } else {
                const V w = pair[r].weight(p, kept);
                cx[r] = multiply_add(w, kx, cx[r]);
                cy[r] = multiply_add(w, ky, cy[r]);
                strength[r] = strength[r] + w;
              }
              if constexpr (kDegree) count(kept, kept_count[r]);
            }
          });
      for (int r = 0; r < kGroup && row + r < last; ++r) {
        Total<T>* total = totals[row + r - first];
        total[0].add(sum(cx[r]));
        total[1].add(sum(cy[r]));
        total[2].add(sum(strength[r]));
        if constexpr (kDegree) degrees[row + r - first] += lanes_total<T>(kept_count[r]);
      }
    }
  }
  for (int64_t i = 0; i < last - first; ++i) {
    out.context[2 * i] = totals[i][0].get();
    out.context[2 * i + 1] = totals[i][1].get();
    out.strength[i] = totals[i][2].get();
    if constexpr (kDegree) out.degree[i] = degrees[i];
  }
}

// The fast path's gradients of the queries.
template <class Pair, class T>
void backward_rows_keys(const Sequence<T>& s, int64_t first, int64_t last,
                        const BackwardBlock<T>& out) {
  using V = Vector<T>;
  Total<T> totals[kBlock][2];
  const V bias(static_cast<T>(Pair::kBias));
  const T *grad_x = s.grad, *grad_y = s.grad + s.row_stride;
  const int64_t end = s.visibility.visible_keys(last - 1);
  for (int64_t tile = 0; tile < end; tile += kKeyTile) {
    for (int64_t row = first; row < last; row += kGroup) {
      const Group<T> group = row_group(s, row, last);
      V qx[kGroup], qy[kGroup], gx[kGroup], gy[kGroup], gs[kGroup], ax[kGroup], ay[kGroup];
      Pair pair[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        const int64_t i = group.owner[r];
        qx[r] = V(s.query_x[i]);
        qy[r] = V(s.query_y[i]);
        gx[r] = V(grad_x[i]);
        gy[r] = V(grad_y[i]);
        gs[r] = V(s.grad_strength[i]);
        pair[r] = MakePair<Pair, T>::make(s, V(s.limit[i]));
        ax[r] = ay[r] = V(T(0));
      }
      for_each_vector(group, tile, tile + kKeyTile,
                      [&](int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                        const V key_x = load(s.key_x + j), key_y = load(s.key_y + j);
                        for (int r = 0; r < kGroup; ++r) {
                          const V kx = visible_only(visible, r, key_x);
                          const V ky = visible_only(visible, r, key_y);
                          const V p = inner_product(qx[r], qy[r], kx, ky, bias);
                          auto kept = pair[r].kept(p);
                          if (visible) kept = both(kept, visible[r]);
                          const V u = inner_product(gx[r], gy[r], kx, ky, gs[r]);
                          const V d = pair[r].derivative(p, u);
                          ax[r] = multiply_add_where(kept, d, kx, ax[r]);
                          ay[r] = multiply_add_where(kept, d, ky, ay[r]);
                        }
                      });
      for (int r = 0; r < kGroup && row + r < last; ++r) {
        totals[row + r - first][0].add(sum(ax[r]));
        totals[row + r - first][1].add(sum(ay[r]));
      }
    }
  }
  for (int64_t i = 0; i < last - first; ++i)
    for (int c = 0; c < 2; ++c) out.point[2 * i + c] = totals[i][c].get();
}

// The fast path's gradients of the keys, as keys and as values at once.
template <class Pair, class T>
void backward_keys_keys(const Sequence<T>& s, int64_t first, int64_t last,
                        const BackwardBlock<T>& out) {
  using V = Vector<T>;
  Total<T> totals[kBlock][2];
  const V bias(static_cast<T>(Pair::kBias));
  const T *grad_x = s.grad, *grad_y = s.grad + s.row_stride;
  const int64_t begin = s.visibility.first_row(first), end = s.visibility.row_end;
  for (int64_t tile = begin / kRowTile * kRowTile; tile < end; tile += kRowTile) {
    for (int64_t key = first; key < last; key += kGroup) {
      const Group<T> group = key_group(s, key, last);
      V kx[kGroup], ky[kGroup], ax[kGroup], ay[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        kx[r] = V(s.key_x[group.owner[r]]);
        ky[r] = V(s.key_y[group.owner[r]]);
        ax[r] = ay[r] = V(T(0));
      }
      for_each_vector(group, tile, tile + kRowTile,
                      [&](int64_t i, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                        const V qx = load(s.query_x + i), qy = load(s.query_y + i);
                        const V gx = load(grad_x + i), gy = load(grad_y + i);
                        const V gs = load(s.grad_strength + i);
                        const Pair pair = MakePair<Pair, T>::make(s, load(s.limit + i));
                        for (int r = 0; r < kGroup; ++r) {
                          const V p = inner_product(qx, qy, kx[r], ky[r], bias);
                          auto kept = pair.kept(p);
                          if (visible) kept = both(kept, visible[r]);
                          const V u = inner_product(gx, gy, kx[r], ky[r], gs);
                          const V d = pair.derivative(p, u);
                          const V w = pair.weight(p);
                          ax[r] = multiply_add_where(kept, d, qx, ax[r]);
                          ay[r] = multiply_add_where(kept, d, qy, ay[r]);
                          ax[r] = multiply_add_where(kept, w, gx, ax[r]);
                          ay[r] = multiply_add_where(kept, w, gy, ay[r]);
                        }
                      });
      for (int r = 0; r < kGroup && key + r < last; ++r) {
        totals[key + r - first][0].add(sum(ax[r]));
        totals[key + r - first][1].add(sum(ay[r]));
      }
    }
  }
  for (int64_t j = 0; j < last - first; ++j)
    for (int c = 0; c < 2; ++c) out.point[2 * j + c] = totals[j][c].get();
}

// Numbers of a group's pairs with one tile of others, staged between the two loops over them.
template <class T>
using TileRows = T[kGroup][kGeneralTile];

// totals[r][c] += sum over the tile of weight[r][j] * (column c at j), for the first `owners`.
template <class T>
void add_columns(const Group<T>& group, int64_t tile, const TileRows<T>& weight, const T* columns,
                 int64_t stride, int64_t depth, int owners, Total<T>* totals) {
  using V = Vector<T>;
  for (int64_t column = 0; column < depth; column += kColumns) {
    const int width = depth - column < kColumns ? static_cast<int>(depth - column) : kColumns;
    const T* plane[kColumns];
    for (int c = 0; c < kColumns; ++c) plane[c] = columns + (column + (c < width ? c : 0)) * stride;
    V acc[kGroup][kColumns];
    for (auto& row : acc)
      for (V& a : row) a = V(T(0));
    for_each_vector(group, tile, tile + kGeneralTile,
                    [&](int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                      V value[kColumns];
                      for (int c = 0; c < kColumns; ++c) value[c] = load(plane[c] + j);
                      for (int r = 0; r < kGroup; ++r) {
                        const V w = load(weight[r] + (j - tile));
                        for (int c = 0; c < kColumns; ++c)
                          acc[r][c] =
                              multiply_add(w, visible_only(visible, r, value[c]), acc[r][c]);
                      }
                    });
    for (int r = 0; r < owners; ++r)
      for (int c = 0; c < width; ++c) totals[r * depth + column + c].add(sum(acc[r][c]));
  }
}

// product[r][j] = start + sum over c of (own column c of owner r) * (column c at j).
template <class T, class Start>
void dot_columns(const Group<T>& group, int64_t tile, const T* own, int64_t own_stride,
                 const T* columns, int64_t stride, int64_t depth, const Start& start,
                 TileRows<T>& product) {
  using V = Vector<T>;
  for_each_vector(
      group, tile, tile + kGeneralTile, [&](int64_t j, const Mask<T>*) QFLUX_INLINE_LAMBDA {
        V acc[kGroup];
        for (int r = 0; r < kGroup; ++r) acc[r] = start(r, j);
        for (int64_t c = 0; c < depth; ++c) {
          const V value = load(columns + c * stride + j);
          for (int r = 0; r < kGroup; ++r)
            acc[r] = multiply_add(V(own[c * own_stride + group.owner[r]]), value, acc[r]);
        }
        for (int r = 0; r < kGroup; ++r) store(product[r] + (j - tile), acc[r]);
      });
}

template <class T>
std::unique_ptr<Total<T>[]> new_totals(int64_t depth) {
  return std::unique_ptr<Total<T>[]>(new Total<T>[static_cast<size_t>(kGroup * depth)]);
}

template <class T>
void take_totals(Total<T>* totals, int64_t count, T* out) {
  for (int64_t n = 0; n < count; ++n) {
    out[n] = totals[n].get();
    totals[n] = Total<T>{};
  }
}

// General path: values of their own.
template <class Pair, class T>
void forward_values(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  using V = Vector<T>;
  alignas(64) TileRows<T> weight;
  const auto totals = new_totals<T>(s.depth);
  const V bias(static_cast<T>(Pair::kBias));
  for (int64_t row = first; row < last; row += kGroup) {
    const Group<T> group = row_group(s, row, last);
    const int owners = last - row < kGroup ? static_cast<int>(last - row) : kGroup;
    Total<T> strengths[kGroup];
    int32_t degrees[kGroup] = {};
    for (int64_t tile = 0; tile < group.highest(); tile += kGeneralTile) {
      V strength[kGroup];
      typename V::Bits kept_count[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        strength[r] = V(T(0));
        kept_count[r] = typename V::Bits{};
      }
      for_each_vector(group, tile, tile + kGeneralTile,
                      [&](int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                        const V key_x = load(s.key_x + j), key_y = load(s.key_y + j);
                        for (int r = 0; r < kGroup; ++r) {
                          const int64_t i = group.owner[r];
                          const Pair pair = MakePair<Pair, T>::make(s, V(s.limit[i]));
                          const V p = inner_product(V(s.query_x[i]), V(s.query_y[i]),
                                                    visible_only(visible, r, key_x),
                                                    visible_only(visible, r, key_y), bias);
                          auto kept = pair.kept(p);
                          if (visible) kept = both(kept, visible[r]);
                          const V w = pair.weight(p, kept);
                          strength[r] = strength[r] + w;
                          count(kept, kept_count[r]);
                          store(weight[r] + (j - tile), w);
                        }
                      });
      for (int r = 0; r < owners; ++r) {
        strengths[r].add(sum(strength[r]));
        degrees[r] += lanes_total<T>(kept_count[r]);
      }
      add_columns(group, tile, weight, s.values, s.key_stride, s.depth, owners, totals.get());
    }
    take_totals(totals.get(), owners * s.depth, out.context + (row - first) * s.depth);
    take_totals(strengths, owners, out.strength + (row - first));
    if (out.degree)
      for (int r = 0; r < owners; ++r) out.degree[row - first + r] = degrees[r];
  }
}

template <class Pair, class T>
void backward_rows_values(const Sequence<T>& s, int64_t first, int64_t last,
                          const BackwardBlock<T>& out) {
  using V = Vector<T>;
  alignas(64) TileRows<T> upstream;
  const V bias(static_cast<T>(Pair::kBias));
  for (int64_t row = first; row < last; row += kGroup) {
    const Group<T> group = row_group(s, row, last);
    const int owners = last - row < kGroup ? static_cast<int>(last - row) : kGroup;
    Total<T> totals[2 * kGroup];
    for (int64_t tile = 0; tile < group.highest(); tile += kGeneralTile) {
      dot_columns(
          group, tile, s.grad, s.row_stride, s.values, s.key_stride, s.depth,
          [&](int r, int64_t) { return V(s.grad_strength[group.owner[r]]); }, upstream);
      V ax[kGroup], ay[kGroup];
      for (int r = 0; r < kGroup; ++r) ax[r] = ay[r] = V(T(0));
      for_each_vector(group, tile, tile + kGeneralTile,
                      [&](int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                        const V kx = load(s.key_x + j), ky = load(s.key_y + j);
                        for (int r = 0; r < kGroup; ++r) {
                          const int64_t i = group.owner[r];
                          const Pair pair = MakePair<Pair, T>::make(s, V(s.limit[i]));
                          const V p = inner_product(V(s.query_x[i]), V(s.query_y[i]), kx, ky, bias);
                          auto kept = pair.kept(p);
                          if (visible) kept = both(kept, visible[r]);
                          const V d = select(
                              kept, pair.derivative(p, load(upstream[r] + (j - tile))), V(T(0)));
                          ax[r] = multiply_add(d, visible_only(visible, r, kx), ax[r]);
                          ay[r] = multiply_add(d, visible_only(visible, r, ky), ay[r]);
                        }
                      });
      for (int r = 0; r < owners; ++r) {
        totals[2 * r].add(sum(ax[r]));
        totals[2 * r + 1].add(sum(ay[r]));
      }
    }
    take_totals(totals, 2 * owners, out.point + 2 * (row - first));
  }
}

template <class Pair, class T>
void backward_keys_values(const Sequence<T>& s, int64_t first, int64_t last,
                          const BackwardBlock<T>& out) {
  using V = Vector<T>;
  alignas(64) TileRows<T> upstream, weight;
  const auto value_totals = new_totals<T>(s.depth);
  const V bias(static_cast<T>(Pair::kBias));
  for (int64_t key = first; key < last; key += kGroup) {
    const Group<T> group = key_group(s, key, last);
    const int owners = last - key < kGroup ? static_cast<int>(last - key) : kGroup;
    Total<T> totals[2 * kGroup];
    for (int64_t tile = group.lowest() / kGeneralTile * kGeneralTile; tile < group.highest();
         tile += kGeneralTile) {
      dot_columns(
          group, tile, s.values, s.key_stride, s.grad, s.row_stride, s.depth,
          [&](int, int64_t i) { return load(s.grad_strength + i); }, upstream);
      V ax[kGroup], ay[kGroup];
      for (int r = 0; r < kGroup; ++r) ax[r] = ay[r] = V(T(0));
      for_each_vector(group, tile, tile + kGeneralTile,
                      [&](int64_t i, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                        const V qx = load(s.query_x + i), qy = load(s.query_y + i);
                        const Pair pair = MakePair<Pair, T>::make(s, load(s.limit + i));
                        for (int r = 0; r < kGroup; ++r) {
                          const int64_t j = group.owner[r];
                          const V p = inner_product(qx, qy, V(s.key_x[j]), V(s.key_y[j]), bias);
                          auto kept = pair.kept(p);
                          if (visible) kept = both(kept, visible[r]);
                          const V d = select(
                              kept, pair.derivative(p, load(upstream[r] + (i - tile))), V(T(0)));
                          ax[r] = multiply_add(d, visible_only(visible, r, qx), ax[r]);
                          ay[r] = multiply_add(d, visible_only(visible, r, qy), ay[r]);
                          store(weight[r] + (i - tile), select(kept, pair.weight(p), V(T(0))));
                        }
                      });
      for (int r = 0; r < owners; ++r) {
        totals[2 * r].add(sum(ax[r]));
        totals[2 * r + 1].add(sum(ay[r]));
      }
      add_columns(group, tile, weight, s.grad, s.row_stride, s.depth, owners, value_totals.get());
    }
    take_totals(totals, 2 * owners, out.point + 2 * (key - first));
    take_totals(value_totals.get(), owners * s.depth, out.values + (key - first) * s.depth);
  }
}

template <class T, template <class> class Pair>
struct OfScore {
  using P = Pair<Vector<T>>;

  static void forward(const Sequence<T>& s, int64_t first, int64_t last,
                      const ForwardBlock<T>& out) {
    if (s.values) return forward_values<P>(s, first, last, out);
    return out.degree ? forward_keys<P, true>(s, first, last, out)
                      : forward_keys<P, false>(s, first, last, out);
  }
  static void backward_rows(const Sequence<T>& s, int64_t first, int64_t last,
                            const BackwardBlock<T>& out) {
    return s.values ? backward_rows_values<P>(s, first, last, out)
                    : backward_rows_keys<P>(s, first, last, out);
  }
  static void backward_keys(const Sequence<T>& s, int64_t first, int64_t last,
                            const BackwardBlock<T>& out) {
    return s.values ? backward_keys_values<P>(s, first, last, out)
                    : backward_keys_keys<P>(s, first, last, out);
  }
};

template <class T>
void forward(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  return s.score == Score::kThreshold ? OfScore<T, ThresholdPair>::forward(s, first, last, out)
                                      : OfScore<T, GatePair>::forward(s, first, last, out);
}
template <class T>
void backward_rows(const Sequence<T>& s, int64_t first, int64_t last, const BackwardBlock<T>& out) {
  return s.score == Score::kThreshold
             ? OfScore<T, ThresholdPair>::backward_rows(s, first, last, out)
             : OfScore<T, GatePair>::backward_rows(s, first, last, out);
}
template <class T>
void backward_keys(const Sequence<T>& s, int64_t first, int64_t last, const BackwardBlock<T>& out) {
  return s.score == Score::kThreshold
             ? OfScore<T, ThresholdPair>::backward_keys(s, first, last, out)
             : OfScore<T, GatePair>::backward_keys(s, first, last, out);
}

template <class T>
void thresholds(const Moments* windows, const T* x, const T* y, int64_t count, Point<double> shift,
                double sigma, double eps, T* tau) {
  for (int64_t i = 0; i < count; ++i)
    tau[i] = static_cast<T>(
        threshold(Point<double>{double(x[i]), double(y[i])}, windows[i], shift, sigma, eps));
}

template <class T>
constexpr Kernels<T> kKernels = {forward<T>, backward_rows<T>, backward_keys<T>, thresholds<T>};

}  // namespace

#if defined(__AVX512F__)
const InstructionSet kAvx512 = {"AVX-512", kKernels<float>, kKernels<double>};
#elif defined(__AVX2__)
const InstructionSet kAvx2 = {"AVX2", kKernels<float>, kKernels<double>};
#else
const InstructionSet kBaseline = {"baseline", kKernels<float>, kKernels<double>};
#endif

}  // namespace qflux::cpu
