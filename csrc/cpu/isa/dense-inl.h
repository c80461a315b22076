// Every pair of a sequence, forward and backward. Each lane of a vector owns a row (or, in the key
// pass, a key), keeps its sums in registers and meets its sources one by one, broadcast: no sum is
// ever taken across lanes, and what a lane adds up depends on nothing but its owner.
#pragma once

#include "../../math/score.h"
#include "../../math/statistics.h"
#include "../../math/sums.h"
#include "dense.h"
#include "simd.h"

namespace qflux::cpu {
namespace {
namespace dense {

// Two vectors of owners share each broadcast and hide the latency of the sums; more would not fit
// the sixteen registers of AVX2.
constexpr int kVectors = 2;
// Sources whose sums are taken in T from zero: their rounding stays below that of a score, and
// passing them on to the totals costs a few percent. The general path stages a tile's weights too:
// 128 sources x 2 vectors x 64 bytes are 16 KB of L1.
constexpr int64_t kTile = 128;
// Value columns accumulated together.
constexpr int kColumns = 4;

static_assert(kPadding % (kVectors * Vector<float>::kWidth) == 0, "a group may overhang a plane");
static_assert(kBlock % (kVectors * Vector<float>::kWidth) == 0, "a block is made of whole groups");

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// One sum of each lane, continued from tile to tile so that the error does not grow with their
// number: in float64 for float, compensated for double.
template <class T>
struct Total;
template <>
struct Total<float> {
  static constexpr int kWidth = Vector<float>::kWidth;
  double value[kWidth] = {};

  void add(Vector<float> part) {
    float lane[kWidth];
    store(lane, part);
    for (int l = 0; l < kWidth; ++l) value[l] += lane[l];
  }
  float get(int lane) const { return static_cast<float>(value[lane]); }
};
template <>
struct Total<double> {
  static constexpr int kWidth = Vector<double>::kWidth;
  double value[kWidth] = {}, error[kWidth] = {};

  void add(Vector<double> part) {
    double lane[kWidth];
    store(lane, part);
    for (int l = 0; l < kWidth; ++l) error[l] += add_exactly(value[l], lane[l]);
  }
  double get(int lane) const { return CompensatedSum<double>{value[lane], error[lane]}.get(); }
};

// The owners of one pass: vectors of consecutive ones, and the sources that each vector meets.
template <class T>
struct Group {
  static constexpr int kWidth = Vector<T>::kWidth;
  static constexpr int kOwners = kVectors * kWidth;

  int64_t first, last;  // owners first .. last - 1; lanes from last on are padding
  int64_t begin[kVectors], end[kVectors];
  int64_t common_begin, common_end;  // met by every owner
  int64_t shift;                     // keys - rows

  int64_t start(int r) const { return first + r * kWidth; }
  int64_t lowest() const { return lesser(begin[0], common_begin); }
  int64_t highest() const { return greater(end[0], end[kVectors - 1]); }
};

template <class T>
Group<T> row_group(const Sequence<T>& s, int64_t row, int64_t last) {
  Group<T> group{};
  group.first = row;
  group.last = lesser(row + Group<T>::kOwners, last);
  group.shift = s.visibility.shift;
  group.common_end = s.visibility.visible_keys(row);
  for (int r = 0; r < kVectors; ++r)
    group.end[r] =
        group.start(r) < group.last
            ? s.visibility.visible_keys(lesser(group.start(r) + Group<T>::kWidth, group.last) - 1)
            : group.common_end;
  return group;
}

template <class T>
Group<T> key_group(const Sequence<T>& s, int64_t key, int64_t last) {
  Group<T> group{};
  const int64_t row_end = s.visibility.row_end;
  group.first = key;
  group.last = lesser(key + Group<T>::kOwners, last);
  group.shift = s.visibility.shift;
  group.common_begin = lesser(s.visibility.first_row(group.last - 1), row_end);
  group.common_end = row_end;
  for (int r = 0; r < kVectors; ++r) {
    group.begin[r] = group.start(r) < group.last
                         ? lesser(s.visibility.first_row(group.start(r)), group.common_begin)
                         : group.common_begin;
    group.end[r] = row_end;
  }
  return group;
}

// Calls body(r) for each vector of a group. The index is a type, so that arrays over it live in
// registers even where the compiler would not unroll a loop.
template <class Body>
QFLUX_INLINE void each_vector(const Body& body) {
  body(Constant<0>());
  body(Constant<1>());
  static_assert(kVectors == 2, "one call for each vector");
}

// Calls body(r, j, visible) for the keys j of a tile that vector r of rows meets: first those that
// every owner sees, then the edge of the causal triangle, where `visible` tells the lanes.
template <class T, class Body>
QFLUX_INLINE void each_key(const Group<T>& group, int64_t tile, int64_t tile_end,
                           const Body& body) {
  const int64_t main_end = lesser(tile_end, group.common_end);
  for (int64_t j = tile; j < main_end; ++j)
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA { body(r, j, nullptr); });
  each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
    const int64_t end = lesser(tile_end, group.end[r]);
    for (int64_t j = greater(tile, group.common_end); j < end; ++j) {
      const Mask<T> visible = lanes_between<T>(j - group.shift - group.start(r), Group<T>::kWidth);
      body(r, j, &visible);
    }
  });
}

// The same for the rows i that vector r of keys meets: first the edge, then the rest.
template <class T, class Body>
QFLUX_INLINE void each_row(const Group<T>& group, int64_t tile, int64_t tile_end,
                           const Body& body) {
  each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
    const int64_t end = lesser(tile_end, group.common_begin);
    for (int64_t i = greater(tile, group.begin[r]); i < end; ++i) {
      const Mask<T> visible = lanes_between<T>(0, i + group.shift - group.start(r) + 1);
      body(r, i, &visible);
    }
  });
  const int64_t main_end = lesser(tile_end, group.common_end);
  for (int64_t i = greater(tile, group.common_begin); i < main_end; ++i)
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA { body(r, i, nullptr); });
}

// acc + w * x on the visible lanes: what a lane may not see must not reach it even as 0 * NaN.
template <class T>
QFLUX_INLINE Vector<T> add_visible(const Mask<T>* visible, Vector<T> w, Vector<T> x,
                                   Vector<T> acc) {
  const Vector<T> sum = multiply_add(w, x, acc);
  return visible ? select(*visible, sum, acc) : sum;
}

// acc + w * x on the kept lanes.
template <class T>
QFLUX_INLINE Vector<T> add_kept(const Mask<T>* visible, Mask<T> kept, Vector<T> w, Vector<T> x,
                                Vector<T> acc) {
  return visible ? select(kept, multiply_add(w, x, acc), acc) : multiply_add_where(kept, w, x, acc);
}

template <class T>
QFLUX_INLINE Mask<T> kept_and_visible(Mask<T> kept, const Mask<T>* visible) {
  return visible ? both(kept, *visible) : kept;
}

// A dropped pair of the threshold is finite and may be left out of a sum instead of entering it as
// zero, which saves the select; a dropped pair of the gate may be infinite and has to show.
template <class Score>
constexpr bool kLeavesOutDropped = Score::kThresholded;

template <class T>
void add_counts(const typename Vector<T>::Bits& counter, int32_t* counts) {
  for (int l = 0; l < Vector<T>::kWidth; ++l) counts[l] += static_cast<int32_t>(counter[l]);
}

// Writes sum `which` of the owners in `group` to out[owner - first of the block][which].
template <class T>
void take(const Group<T>& group, int64_t block_first, const Total<T>* totals, int64_t which,
          int64_t width, T* out) {
  for (int64_t i = group.first; i < group.last; ++i) {
    const int64_t n = i - group.first;
    out[(i - block_first) * width + which] =
        totals[n / Group<T>::kWidth].get(static_cast<int>(n % Group<T>::kWidth));
  }
}

// d w / d limit = -1 for every pair kept.
template <class T>
void take_limit(const Group<T>& group, int64_t block_first, const Total<T>* totals, T* out) {
  take(group, block_first, totals, 0, 1, out);
  for (int64_t i = group.first; i < group.last; ++i) out[i - block_first] = -out[i - block_first];
}

// Fast path: values are the keys.
template <class Score, bool kDegree, class T>
void forward_keys(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  using V = Vector<T>;
  constexpr int kWidth = V::kWidth;
  const V bias(static_cast<T>(Score::kBias)), eps(s.eps), min_gate(s.min_gate);
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    const Group<T> group = row_group(s, row, last);
    V qx[kVectors], qy[kVectors];
    Score pair[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      qx[r] = load(s.query_x + group.start(r));
      qy[r] = load(s.query_y + group.start(r));
      pair[r] = Score::make(load(s.limit + group.start(r)), eps, min_gate);
    });
    Total<T> totals[3][kVectors];
    int32_t degrees[kVectors * kWidth] = {};
    for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
      V cx[kVectors], cy[kVectors], strength[kVectors];
      typename V::Bits degree[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        cx[r] = cy[r] = strength[r] = V(T(0));
        degree[r] = typename V::Bits{};
      });
      each_key(group, tile, tile + kTile,
               [&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                 const V kx(s.key_x[j]), ky(s.key_y[j]);
                 const V p = inner_product(qx[r], qy[r], kx, ky, bias);
                 const Mask<T> kept = kept_and_visible(pair[r].kept(p), visible);
                 if constexpr (kLeavesOutDropped<Score>) {
                   const V w = pair[r].weight(p);
                   cx[r] = add_kept(visible, kept, w, kx, cx[r]);
                   cy[r] = add_kept(visible, kept, w, ky, cy[r]);
                   strength[r] = add_where(kept, w, strength[r]);
                 } else {
                   const V w = pair[r].weight(p, kept);
                   cx[r] = add_visible(visible, w, kx, cx[r]);
                   cy[r] = add_visible(visible, w, ky, cy[r]);
                   strength[r] = add_visible(visible, w, V(T(1)), strength[r]);
                 }
                 if constexpr (kDegree) count(kept, degree[r]);
               });
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        totals[0][r].add(cx[r]);
        totals[1][r].add(cy[r]);
        totals[2][r].add(strength[r]);
        if constexpr (kDegree) add_counts<T>(degree[r], degrees + r * kWidth);
      });
    }
    take(group, first, totals[0], 0, 2, out.context);
    take(group, first, totals[1], 1, 2, out.context);
    take(group, first, totals[2], 0, 1, out.strength);
    if constexpr (kDegree)
      for (int64_t i = group.first; i < group.last; ++i)
        out.degree[i - first] = degrees[i - group.first];
  }
}

// The fast path's gradients of the queries.
template <class Score, class T>
void backward_rows_keys(const Sequence<T>& s, int64_t first, int64_t last,
                        const BackwardBlock<T>& out) {
  using V = Vector<T>;
  const V bias(static_cast<T>(Score::kBias)), eps(s.eps), min_gate(s.min_gate);
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    const Group<T> group = row_group(s, row, last);
    V qx[kVectors], qy[kVectors], gx[kVectors], gy[kVectors], gs[kVectors];
    Score pair[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      const int64_t start = group.start(r);
      qx[r] = load(s.query_x + start);
      qy[r] = load(s.query_y + start);
      gx[r] = load(s.grad + start);
      gy[r] = load(s.grad + s.row_stride + start);
      gs[r] = load(s.grad_strength + start);
      pair[r] = Score::make(load(s.limit + start), eps, min_gate);
    });
    Total<T> totals[3][kVectors];
    for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
      V ax[kVectors], ay[kVectors], al[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { ax[r] = ay[r] = al[r] = V(T(0)); });
      each_key(group, tile, tile + kTile,
               [&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                 const V kx(s.key_x[j]), ky(s.key_y[j]);
                 const V p = inner_product(qx[r], qy[r], kx, ky, bias);
                 const Mask<T> kept = kept_and_visible(pair[r].kept(p), visible);
                 const V d = pair[r].derivative(p, inner_product(gx[r], gy[r], kx, ky, gs[r]));
                 ax[r] = add_kept(visible, kept, d, kx, ax[r]);
                 ay[r] = add_kept(visible, kept, d, ky, ay[r]);
                 if constexpr (Score::kLimitVjp) al[r] = add_where(kept, d, al[r]);
               });
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        totals[0][r].add(ax[r]);
        totals[1][r].add(ay[r]);
        if constexpr (Score::kLimitVjp) totals[2][r].add(al[r]);
      });
    }
    take(group, first, totals[0], 0, 2, out.point);
    take(group, first, totals[1], 1, 2, out.point);
    if constexpr (Score::kLimitVjp) take_limit(group, first, totals[2], out.limit);
  }
}

// The fast path's gradients of the keys, as keys and as values at once.
template <class Score, class T>
void backward_keys_keys(const Sequence<T>& s, int64_t first, int64_t last,
                        const BackwardBlock<T>& out) {
  using V = Vector<T>;
  const V bias(static_cast<T>(Score::kBias)), eps(s.eps), min_gate(s.min_gate);
  const T *grad_x = s.grad, *grad_y = s.grad + s.row_stride;
  for (int64_t key = first; key < last; key += Group<T>::kOwners) {
    const Group<T> group = key_group(s, key, last);
    V kx[kVectors], ky[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      kx[r] = load(s.key_x + group.start(r));
      ky[r] = load(s.key_y + group.start(r));
    });
    Total<T> totals[2][kVectors];
    for (int64_t tile = group.lowest() / kTile * kTile; tile < group.highest(); tile += kTile) {
      V ax[kVectors], ay[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { ax[r] = ay[r] = V(T(0)); });
      each_row(group, tile, tile + kTile,
               [&](auto r, int64_t i, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
                 const V qx(s.query_x[i]), qy(s.query_y[i]), gx(grad_x[i]), gy(grad_y[i]);
                 const Score pair = Score::make(V(s.limit[i]), eps, min_gate);
                 const V p = inner_product(qx, qy, kx[r], ky[r], bias);
                 const Mask<T> kept = kept_and_visible(pair.kept(p), visible);
                 const V u = inner_product(gx, gy, kx[r], ky[r], V(s.grad_strength[i]));
                 const V d = pair.derivative(p, u), w = pair.weight(p);
                 ax[r] = add_kept(visible, kept, d, qx, ax[r]);
                 ay[r] = add_kept(visible, kept, d, qy, ay[r]);
                 ax[r] = add_kept(visible, kept, w, gx, ax[r]);
                 ay[r] = add_kept(visible, kept, w, gy, ay[r]);
               });
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        totals[0][r].add(ax[r]);
        totals[1][r].add(ay[r]);
      });
    }
    take(group, first, totals[0], 0, 2, out.point);
    take(group, first, totals[1], 1, 2, out.point);
  }
}

// Numbers of a group's pairs with one tile of sources, staged between the loops over them.
template <class T>
using Staged = T[kTile][kVectors][Vector<T>::kWidth];

// totals[column][r] += sum over a tile of weight * (the source's column), for columns of `records`.
template <class T, class Each>
void add_columns(const Each& each, int64_t tile, const Staged<T>& weight, const T* records,
                 int64_t stride, int64_t value_dim, Total<T>* totals) {
  using V = Vector<T>;
  const auto chunk = [&](int64_t column, auto width) QFLUX_INLINE_LAMBDA {
    constexpr int kWide = decltype(width)::kValue;
    V acc[kVectors][kWide];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      for (int c = 0; c < kWide; ++c) acc[r][c] = V(T(0));
    });
    each([&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
      const V w = load(weight[j - tile][r]);
#pragma GCC unroll 4
      for (int c = 0; c < kWide; ++c)
        acc[r][c] = add_visible(visible, w, V(records[j * stride + column + c]), acc[r][c]);
    });
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      for (int c = 0; c < kWide; ++c) totals[(column + c) * kVectors + r].add(acc[r][c]);
    });
  };
  int64_t column = 0;
  for (; column + kColumns <= value_dim; column += kColumns) chunk(column, Constant<kColumns>());
  for (; column < value_dim; ++column) chunk(column, Constant<1>());
}

// product = start(r, j) + sum over columns of (owner's column) * (the source's column).
template <class T, class Each, class Start>
void dot_columns(const Each& each, int64_t tile, const Group<T>& group, const T* planes,
                 int64_t plane_stride, const T* records, int64_t stride, int64_t value_dim,
                 const Start& start, Staged<T>& product) {
  using V = Vector<T>;
  const auto chunk = [&](int64_t column, auto width) QFLUX_INLINE_LAMBDA {
    constexpr int kWide = decltype(width)::kValue;
    V own[kVectors][kWide];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      for (int c = 0; c < kWide; ++c)
        own[r][c] = load(planes + (column + c) * plane_stride + group.start(r));
    });
    each([&](auto r, int64_t j, const Mask<T>*) QFLUX_INLINE_LAMBDA {
      V sum = column == 0 ? start(r, j) : load(product[j - tile][r]);
#pragma GCC unroll 4
      for (int c = 0; c < kWide; ++c)
        sum = multiply_add(own[r][c], V(records[j * stride + column + c]), sum);
      store(product[j - tile][r], sum);
    });
  };
  int64_t column = 0;
  for (; column + kColumns <= value_dim; column += kColumns) chunk(column, Constant<kColumns>());
  for (; column < value_dim; ++column) chunk(column, Constant<1>());
}

template <class T>
void take_columns(const Group<T>& group, int64_t block_first, Total<T>* totals, int64_t value_dim,
                  T* out) {
  for (int64_t c = 0; c < value_dim; ++c) {
    take(group, block_first, totals + c * kVectors, c, value_dim, out);
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA { totals[c * kVectors + r] = Total<T>{}; });
  }
}

// General path: values of their own.
template <class Score, class T>
void forward_values(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  using V = Vector<T>;
  constexpr int kWidth = V::kWidth;
  alignas(64) Staged<T> weight;
  const Array<Total<T>> contexts(kVectors * s.value_dim);
  const V bias(static_cast<T>(Score::kBias)), eps(s.eps), min_gate(s.min_gate);
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    const Group<T> group = row_group(s, row, last);
    V qx[kVectors], qy[kVectors];
    Score pair[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      qx[r] = load(s.query_x + group.start(r));
      qy[r] = load(s.query_y + group.start(r));
      pair[r] = Score::make(load(s.limit + group.start(r)), eps, min_gate);
    });
    Total<T> strengths[kVectors];
    int32_t degrees[kVectors * kWidth] = {};
    for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
      const auto each = [&](const auto& body)
                            QFLUX_INLINE_LAMBDA { each_key(group, tile, tile + kTile, body); };
      V strength[kVectors];
      typename V::Bits degree[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        strength[r] = V(T(0));
        degree[r] = typename V::Bits{};
      });
      each([&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V p = inner_product(qx[r], qy[r], V(s.key_x[j]), V(s.key_y[j]), bias);
        const Mask<T> kept = kept_and_visible(pair[r].kept(p), visible);
        const V w = pair[r].weight(p, kept);
        store(weight[j - tile][r], w);
        strength[r] = add_visible(visible, w, V(T(1)), strength[r]);
        count(kept, degree[r]);
      });
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        strengths[r].add(strength[r]);
        add_counts<T>(degree[r], degrees + r * kWidth);
      });
      add_columns<T>(each, tile, weight, s.values, s.value_stride, s.value_dim, contexts.get());
    }
    take_columns(group, first, contexts.get(), s.value_dim, out.context);
    take(group, first, strengths, 0, 1, out.strength);
    if (out.degree)
      for (int64_t i = group.first; i < group.last; ++i)
        out.degree[i - first] = degrees[i - group.first];
  }
}

template <class Score, class T>
void backward_rows_values(const Sequence<T>& s, int64_t first, int64_t last,
                          const BackwardBlock<T>& out) {
  using V = Vector<T>;
  alignas(64) Staged<T> upstream;
  const V bias(static_cast<T>(Score::kBias)), eps(s.eps), min_gate(s.min_gate);
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    const Group<T> group = row_group(s, row, last);
    V qx[kVectors], qy[kVectors], gs[kVectors];
    Score pair[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      qx[r] = load(s.query_x + group.start(r));
      qy[r] = load(s.query_y + group.start(r));
      gs[r] = load(s.grad_strength + group.start(r));
      pair[r] = Score::make(load(s.limit + group.start(r)), eps, min_gate);
    });
    Total<T> totals[3][kVectors];
    for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
      const auto each = [&](const auto& body)
                            QFLUX_INLINE_LAMBDA { each_key(group, tile, tile + kTile, body); };
      dot_columns<T>(
          each, tile, group, s.grad, s.row_stride, s.values, s.value_stride, s.value_dim,
          [&](int r, int64_t) QFLUX_INLINE_LAMBDA { return gs[r]; }, upstream);
      V ax[kVectors], ay[kVectors], al[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { ax[r] = ay[r] = al[r] = V(T(0)); });
      each([&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V kx(s.key_x[j]), ky(s.key_y[j]);
        const V p = inner_product(qx[r], qy[r], kx, ky, bias);
        const Mask<T> kept = kept_and_visible(pair[r].kept(p), visible);
        const V d = pair[r].derivative(p, load(upstream[j - tile][r]));
        ax[r] = select(kept, multiply_add(d, kx, ax[r]), ax[r]);
        ay[r] = select(kept, multiply_add(d, ky, ay[r]), ay[r]);
        if constexpr (Score::kLimitVjp) al[r] = add_where(kept, d, al[r]);
      });
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        totals[0][r].add(ax[r]);
        totals[1][r].add(ay[r]);
        if constexpr (Score::kLimitVjp) totals[2][r].add(al[r]);
      });
    }
    take(group, first, totals[0], 0, 2, out.point);
    take(group, first, totals[1], 1, 2, out.point);
    if constexpr (Score::kLimitVjp) take_limit(group, first, totals[2], out.limit);
  }
}

template <class Score, class T>
void backward_keys_values(const Sequence<T>& s, int64_t first, int64_t last,
                          const BackwardBlock<T>& out) {
  using V = Vector<T>;
  alignas(64) Staged<T> upstream, weight;
  const Array<Total<T>> values(kVectors * s.value_dim);
  const V bias(static_cast<T>(Score::kBias)), eps(s.eps), min_gate(s.min_gate);
  for (int64_t key = first; key < last; key += Group<T>::kOwners) {
    const Group<T> group = key_group(s, key, last);
    V kx[kVectors], ky[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      kx[r] = load(s.key_x + group.start(r));
      ky[r] = load(s.key_y + group.start(r));
    });
    Total<T> totals[2][kVectors];
    for (int64_t tile = group.lowest() / kTile * kTile; tile < group.highest(); tile += kTile) {
      const auto each = [&](const auto& body)
                            QFLUX_INLINE_LAMBDA { each_row(group, tile, tile + kTile, body); };
      dot_columns<T>(
          each, tile, group, s.value_planes, s.key_stride, s.grad_records, s.value_dim, s.value_dim,
          [&](int, int64_t i) QFLUX_INLINE_LAMBDA { return V(s.grad_strength[i]); }, upstream);
      V ax[kVectors], ay[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { ax[r] = ay[r] = V(T(0)); });
      each([&](auto r, int64_t i, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V qx(s.query_x[i]), qy(s.query_y[i]);
        const Score pair = Score::make(V(s.limit[i]), eps, min_gate);
        const V p = inner_product(qx, qy, kx[r], ky[r], bias);
        const Mask<T> kept = kept_and_visible(pair.kept(p), visible);
        const V d = pair.derivative(p, load(upstream[i - tile][r]));
        ax[r] = select(kept, multiply_add(d, qx, ax[r]), ax[r]);
        ay[r] = select(kept, multiply_add(d, qy, ay[r]), ay[r]);
        store(weight[i - tile][r], select(kept, pair.weight(p), V(T(0))));
      });
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        totals[0][r].add(ax[r]);
        totals[1][r].add(ay[r]);
      });
      add_columns<T>(each, tile, weight, s.grad_records, s.value_dim, s.value_dim, values.get());
    }
    take(group, first, totals[0], 0, 2, out.point);
    take(group, first, totals[1], 1, 2, out.point);
    take_columns(group, first, values.get(), s.value_dim, out.values);
  }
}

template <class T>
void forward(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  visit_score(s.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<Vector<T>>;
    if (s.values) return forward_values<Score>(s, first, last, out);
    return out.degree ? forward_keys<Score, true>(s, first, last, out)
                      : forward_keys<Score, false>(s, first, last, out);
  });
}
template <class T>
void backward_rows(const Sequence<T>& s, int64_t first, int64_t last, const BackwardBlock<T>& out) {
  visit_score(s.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<Vector<T>>;
    return s.values ? backward_rows_values<Score>(s, first, last, out)
                    : backward_rows_keys<Score>(s, first, last, out);
  });
}
template <class T>
void backward_keys(const Sequence<T>& s, int64_t first, int64_t last, const BackwardBlock<T>& out) {
  visit_score(s.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<Vector<T>>;
    return s.values ? backward_keys_values<Score>(s, first, last, out)
                    : backward_keys_keys<Score>(s, first, last, out);
  });
}

template <class T>
void thresholds(const Moments* windows, const T* x, const T* y, int64_t count, Point<double> shift,
                double sigma, double eps, T* tau) {
  for (int64_t i = 0; i < count; ++i)
    tau[i] = static_cast<T>(
        threshold(Point<double>{double(x[i]), double(y[i])}, windows[i], shift, sigma, eps));
}

template <class T>
constexpr DenseLoops<T> kLoops = {forward<T>, backward_rows<T>, backward_keys<T>, thresholds<T>};

}  // namespace dense
}  // namespace
}  // namespace qflux::cpu
