// Every pair of a sequence, forward and backward. Each lane of a vector owns a row (or, in the key
// pass, a key), keeps its sums in registers and meets its sources one by one, broadcast: no sum is
// ever taken across lanes, and what a lane adds up depends on nothing but its owner.
#pragma once

#include "mass-inl.h"
#include "owners-inl.h"

namespace qflux::cpu {
namespace {
namespace dense {

// The keys as their own values. These and the values below are narrow enough for all sums of a pair
// to stay in registers.
template <class T>
struct KeysAsValues {
  static constexpr int kCount = 2;
  static constexpr bool kApart = false;
  // A dropped pair of the threshold is finite and may be left out of a sum instead of entering it
  // as zero, which saves the select; a dropped pair of the gate may be infinite and has to show.
  template <class Score>
  static constexpr bool kLeavesOutDropped = Score::kThresholded;

  explicit KeysAsValues(const Sequence<T>&) {}
  template <class Index>
  QFLUX_INLINE Vector<T> column(Index c, int64_t, Vector<T> kx, Vector<T> ky) const {
    return c == 0 ? kx : ky;
  }
  QFLUX_INLINE Vector<T> dot(const Vector<T>* grad, int64_t, Vector<T> kx, Vector<T> ky,
                             Vector<T> start) const {
    return inner_product(grad[0], grad[1], kx, ky, start);
  }
};

// Values of kColumns columns, as many as a model's cylinders usually have. Every lane adds up what
// it adds up on the general path, in the same order.
template <class T>
struct ColumnValues {
  static constexpr int kCount = kColumns;
  // Sixteen registers hold the sums for one vector of owners, thirty-two for all.
  static constexpr bool kApart = sizeof(Vector<float>) < 64;
  // A value that is not finite has to show, whatever its weight.
  template <class Score>
  static constexpr bool kLeavesOutDropped = false;

  const T* values;
  int64_t stride;
  explicit ColumnValues(const Sequence<T>& s) : values(s.values), stride(s.value_stride) {}
  template <class Index>
  QFLUX_INLINE Vector<T> column(Index c, int64_t j, Vector<T>, Vector<T>) const {
    return Vector<T>(values[j * stride + c]);
  }
  QFLUX_INLINE Vector<T> dot(const Vector<T>* grad, int64_t j, Vector<T>, Vector<T>,
                             Vector<T> sum) const {
    each_column<kCount>([&](auto c) QFLUX_INLINE_LAMBDA {
      sum = multiply_add(grad[c], Vector<T>(values[j * stride + c]), sum);
    });
    return sum;
  }
};

// The queries of a group of rows, and what keeps and weighs their pairs.
template <class Score, class T>
struct Queries {
  using V = Vector<T>;
  V x[kVectors], y[kVectors], bias[kVectors];
  Score pair[kVectors];

  QFLUX_INLINE Queries(const Sequence<T>& s, const Group<T>& group) {
    const V eps(s.eps), min_gate(s.min_gate);
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      x[r] = load(s.query_x + group.start(r));
      y[r] = load(s.query_y + group.start(r));
      V rest = eps;
      if constexpr (Score::kMass)
        if (s.limit_rest) rest = load(s.limit_rest + group.start(r));
      pair[r] = Score::make(load(s.limit + group.start(r)), rest, min_gate);
      bias[r] = pair[r].bias();
    });
  }
  template <class Index>
  QFLUX_INLINE V product(Index r, V kx, V ky) const {
    return inner_product(x[r], y[r], kx, ky, bias[r]);
  }
};

// What a group of rows adds up over its pairs: the gradient of the query and, where the score has
// more, what that of the limit is made from.
template <class Score, class T>
class RowSums {
  using V = Vector<T>;

 public:
  static constexpr int kCount = Score::kMass ? 6 : Score::kLimitVjp ? 3 : 2;

  // Those of a tile of keys, apart: with an object whose methods are called they would be in
  // memory.
  struct Tile {
    V part[kVectors][kCount];

    QFLUX_INLINE Tile() {
      each_column<kCount>([&](auto n) QFLUX_INLINE_LAMBDA { part[0][n] = part[1][n] = V(T(0)); });
    }
    // A pair of vector r: its derivative d, and its key.
    template <class Index>
    QFLUX_INLINE void add(Index r, const Mask<T>* visible, Mask<T> kept, V d, V kx, V ky) {
      part[r][0] = add_kept(visible, kept, d, kx, part[r][0]);
      part[r][1] = add_kept(visible, kept, d, ky, part[r][1]);
      if constexpr (kCount > 2) part[r][2] = add_where(kept, d, part[r][2]);
      if constexpr (Score::kMass) {
        part[r][3] = add_where(kept, V(T(1)), part[r][3]);
        part[r][4] = add_where(kept, kx, part[r][4]);
        part[r][5] = add_where(kept, ky, part[r][5]);
      }
    }
  };
  QFLUX_INLINE void add(const Tile& tile) {
    V parts[kCount][kVectors];
    each_column<kCount>([&](auto n) QFLUX_INLINE_LAMBDA {
      parts[n][0] = tile.part[0][n];
      parts[n][1] = tile.part[1][n];
    });
    add_parts(totals_, parts);
  }
  void take_all(const Group<T>& group, int64_t first, const BackwardBlock<T>& out) const {
    take(group, first, totals_[0], 0, 2, out.point);
    take(group, first, totals_[1], 1, 2, out.point);
    if constexpr (Score::kLimitVjp) take_limit(group, first, totals_[2], out.limit);
    if constexpr (Score::kMass)
      for (int64_t i = group.first; i < group.last; ++i) {
        const auto sum = [&](int n) {
          return totals_[n][(i - group.first) / V::kWidth].precise(
              static_cast<int>((i - group.first) % V::kWidth));
        };
        mass::take_row({sum(3), sum(2), {sum(4), sum(5)}, {sum(0), sum(1)}}, i - first, out);
      }
  }

 private:
  Total<T> totals_[kCount][kVectors];
};

template <class Score, class Values, bool kDegree, class T>
void forward_narrow(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  using V = Vector<T>;
  constexpr int kWidth = V::kWidth, kCount = Values::kCount;
  const Values values(s);
  constexpr bool kCounts = kDegree || Score::kMass;
  using Thresholds = mass::Thresholds<Score::kMass, T>;
  const typename Thresholds::Shared shared(s, last, out);
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    Group<T> group = row_group(s, row, last);
    Thresholds thresholds(shared, group, true);
    Total<T> totals[kCount + 1][kVectors];  // of the context, of the strength
    int32_t degrees[kVectors * kWidth];
    do {
      const Queries<Score, T> query(s, group);
      for (auto& column : totals)
        for (Total<T>& total : column) total = Total<T>{};
      for (int32_t& degree : degrees) degree = 0;
      for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
        V context[kVectors][kCount], strength[kVectors];
        typename V::Bits degree[kVectors];
        each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
          each_column<kCount>([&](auto c) QFLUX_INLINE_LAMBDA { context[r][c] = V(T(0)); });
          strength[r] = V(T(0));
          degree[r] = typename V::Bits{};
        });
        const auto meet = [&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
          const V kx(s.key_x[j]), ky(s.key_y[j]);
          const V p = query.product(r, kx, ky);
          const Mask<T> kept = kept_and_visible(query.pair[r].kept(p), visible);
          if constexpr (Values::template kLeavesOutDropped<Score>) {
            const V w = query.pair[r].weight(p);
            each_column<kCount>([&](auto c) QFLUX_INLINE_LAMBDA {
              context[r][c] =
                  add_kept(visible, kept, w, values.column(c, j, kx, ky), context[r][c]);
            });
            if constexpr (Score::kMass)
              strength[r] = add_where(kept, p, strength[r]);
            else
              strength[r] = add_where(kept, w, strength[r]);
          } else {
            const V w = query.pair[r].weight(p, kept);
            each_column<kCount>([&](auto c) QFLUX_INLINE_LAMBDA {
              context[r][c] = add_visible(visible, w, values.column(c, j, kx, ky), context[r][c]);
            });
            if constexpr (Score::kMass)
              strength[r] = add_where(kept, p, strength[r]);
            else
              strength[r] = add_visible(visible, w, V(T(1)), strength[r]);
          }
          if constexpr (kCounts) count(kept, degree[r]);
        };
        if (Score::kMass && group.list)
          each_key<Values::kApart, Score::kMass>(group, tile, tile + kTile, meet);
        else
          each_key<Values::kApart>(group, tile, tile + kTile, meet);
        V parts[kCount + 1][kVectors];
        each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
          each_column<kCount>([&](auto c) QFLUX_INLINE_LAMBDA { parts[c][r] = context[r][c]; });
          parts[kCount][r] = strength[r];
          if constexpr (kCounts) add_counts<T>(degree[r], degrees + r * kWidth);
        });
        add_parts(totals, parts);
      }
    } while (!thresholds.accept(totals[kCount], degrees));
    each_column<kCount>(
        [&](auto c) QFLUX_INLINE_LAMBDA { take(group, first, totals[c], c, kCount, out.context); });
    take(group, first, totals[kCount], 0, 1, out.strength);
    if constexpr (Score::kMass)
      for (int64_t i = group.first; i < group.last; ++i)
        out.strength[i - first] -= static_cast<T>(degrees[i - group.first]) * out.limit_rest[i];
    if constexpr (kDegree) take_degrees(group, first, degrees, out.degree);
  }
}

// The gradients of the queries.
template <class Score, class Values, class T>
void backward_rows_narrow(const Sequence<T>& s, int64_t first, int64_t last,
                          const BackwardBlock<T>& out) {
  using V = Vector<T>;
  constexpr int kCount = Values::kCount;
  const Values values(s);
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    const Group<T> group = row_group(s, row, last);
    const Queries<Score, T> query(s, group);
    V grad[kVectors][kCount], gs[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      const int64_t start = group.start(r);
      each_column<kCount>([&](auto c) QFLUX_INLINE_LAMBDA {
        grad[r][c] = load(s.grad + c * s.row_stride + start);
      });
      gs[r] = load(s.grad_strength + start);
    });
    RowSums<Score, T> sums;
    for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
      typename RowSums<Score, T>::Tile of_tile;
      each_key<Values::kApart>(
          group, tile, tile + kTile,
          [&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
            const V kx(s.key_x[j]), ky(s.key_y[j]);
            const V p = query.product(r, kx, ky);
            const Mask<T> kept = kept_and_visible(query.pair[r].kept(p), visible);
            const V d = query.pair[r].derivative(p, values.dot(grad[r], j, kx, ky, gs[r]));
            of_tile.add(r, visible, kept, d, kx, ky);
          });
      sums.add(of_tile);
    }
    sums.take_all(group, first, out);
  }
}

// The gradients of the keys, as keys and as values at once.
template <class Score, class T>
void backward_keys_keys(const Sequence<T>& s, int64_t first, int64_t last,
                        const BackwardBlock<T>& out) {
  using V = Vector<T>;
  const V eps(s.eps), min_gate(s.min_gate);
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
                 const V p = inner_product(qx, qy, kx[r], ky[r], pair.bias());
                 const Mask<T> kept = kept_and_visible(pair.kept(p), visible);
                 const V u = inner_product(gx, gy, kx[r], ky[r], V(s.grad_strength[i]));
                 const V d = pair.derivative(p, u), w = pair.backward_weight(p);
                 ax[r] = add_kept(visible, kept, d, qx, ax[r]);
                 ay[r] = add_kept(visible, kept, d, qy, ay[r]);
                 ax[r] = add_kept(visible, kept, w, gx, ax[r]);
                 ay[r] = add_kept(visible, kept, w, gy, ay[r]);
               });
      V parts[2][kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        parts[0][r] = ax[r];
        parts[1][r] = ay[r];
      });
      add_parts(totals, parts);
    }
    take(group, first, totals[0], 0, 2, out.point);
    take(group, first, totals[1], 1, 2, out.point);
  }
}

// Numbers of a group's pairs with one tile of sources, staged between the loops over them.
template <class T>
using Staged = T[kTile][kVectors][Vector<T>::kWidth];

// totals[column][r] += sum over a tile of weight * (the source's column), for columns of `records`.
// Once for all scores, which would multiply the time that this takes to compile.
template <class T, class Each>
QFLUX_NO_INLINE void add_columns(const Each& each, const Staged<T>& weight, const T* records,
                                 int64_t stride, int64_t value_dim, Total<T>* totals) {
  using V = Vector<T>;
  const int64_t tile = each.tile;
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

// product = (start of the owner or of the source) + sum over columns of (owner's column) * (the
// source's column).
template <bool kStartOfOwner, class T, class Each>
QFLUX_NO_INLINE void dot_columns(const Each& each, const T* planes, int64_t plane_stride,
                                 const T* records, int64_t stride, int64_t value_dim,
                                 const T* start, Staged<T>& product) {
  using V = Vector<T>;
  const Group<T>& group = each.group;
  const int64_t tile = each.tile;
  V first[kVectors];
  each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
    if constexpr (kStartOfOwner) first[r] = load(start + group.start(r));
  });
  const auto chunk = [&](int64_t column, auto width) QFLUX_INLINE_LAMBDA {
    constexpr int kWide = decltype(width)::kValue;
    V own[kVectors][kWide];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      for (int c = 0; c < kWide; ++c)
        own[r][c] = load(planes + (column + c) * plane_stride + group.start(r));
    });
    const auto walk = [&](auto begins) QFLUX_INLINE_LAMBDA {
      each([&](auto r, int64_t j, const Mask<T>*) QFLUX_INLINE_LAMBDA {
        V sum = !begins ? load(product[j - tile][r]) : kStartOfOwner ? first[r] : V(start[j]);
#pragma GCC unroll 4
        for (int c = 0; c < kWide; ++c)
          sum = multiply_add(own[r][c], V(records[j * stride + column + c]), sum);
        store(product[j - tile][r], sum);
      });
    };
    column == 0 ? walk(Constant<1>()) : walk(Constant<0>());
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
  using Thresholds = mass::Thresholds<Score::kMass, T>;
  const typename Thresholds::Shared shared(s, last, out);
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    Group<T> group = row_group(s, row, last);
    const Thresholds thresholds(shared, group, false);
    const Queries<Score, T> query(s, group);
    Total<T> strengths[1][kVectors];
    int32_t degrees[kVectors * kWidth] = {};
    for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
      const EachKey<T> each{group, tile};
      V strength[kVectors];
      typename V::Bits degree[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        strength[r] = V(T(0));
        degree[r] = typename V::Bits{};
      });
      each([&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V p = query.product(r, V(s.key_x[j]), V(s.key_y[j]));
        const Mask<T> kept = kept_and_visible(query.pair[r].kept(p), visible);
        const V w = query.pair[r].weight(p, kept);
        store(weight[j - tile][r], w);
        strength[r] = add_visible(visible, w, V(T(1)), strength[r]);
        count(kept, degree[r]);
      });
      V parts[1][kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        parts[0][r] = strength[r];
        add_counts<T>(degree[r], degrees + r * kWidth);
      });
      add_parts(strengths, parts);
      add_columns<T>(each, weight, s.values, s.value_stride, s.value_dim, contexts.get());
    }
    take_columns(group, first, contexts.get(), s.value_dim, out.context);
    take(group, first, strengths[0], 0, 1, out.strength);
    if (out.degree) take_degrees(group, first, degrees, out.degree);
  }
}

template <class Score, class T>
void backward_rows_values(const Sequence<T>& s, int64_t first, int64_t last,
                          const BackwardBlock<T>& out) {
  using V = Vector<T>;
  alignas(64) Staged<T> upstream;
  for (int64_t row = first; row < last; row += Group<T>::kOwners) {
    const Group<T> group = row_group(s, row, last);
    const Queries<Score, T> query(s, group);
    RowSums<Score, T> sums;
    for (int64_t tile = 0; tile < group.highest(); tile += kTile) {
      const EachKey<T> each{group, tile};
      dot_columns<true, T>(each, s.grad, s.row_stride, s.values, s.value_stride, s.value_dim,
                           s.grad_strength, upstream);
      typename RowSums<Score, T>::Tile of_tile;
      each([&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V kx(s.key_x[j]), ky(s.key_y[j]);
        const V p = query.product(r, kx, ky);
        const Mask<T> kept = kept_and_visible(query.pair[r].kept(p), visible);
        of_tile.add(r, visible, kept, query.pair[r].derivative(p, load(upstream[j - tile][r])), kx,
                    ky);
      });
      sums.add(of_tile);
    }
    sums.take_all(group, first, out);
  }
}

template <class Score, class T>
void backward_keys_values(const Sequence<T>& s, int64_t first, int64_t last,
                          const BackwardBlock<T>& out) {
  using V = Vector<T>;
  alignas(64) Staged<T> upstream, weight;
  const Array<Total<T>> values(kVectors * s.value_dim);
  const V eps(s.eps), min_gate(s.min_gate);
  for (int64_t key = first; key < last; key += Group<T>::kOwners) {
    const Group<T> group = key_group(s, key, last);
    V kx[kVectors], ky[kVectors];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      kx[r] = load(s.key_x + group.start(r));
      ky[r] = load(s.key_y + group.start(r));
    });
    Total<T> totals[2][kVectors];
    for (int64_t tile = group.lowest() / kTile * kTile; tile < group.highest(); tile += kTile) {
      const EachRow<T> each{group, tile};
      dot_columns<false, T>(each, s.value_planes, s.key_stride, s.grad_records, s.value_dim,
                            s.value_dim, s.grad_strength, upstream);
      V ax[kVectors], ay[kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { ax[r] = ay[r] = V(T(0)); });
      each([&](auto r, int64_t i, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V qx(s.query_x[i]), qy(s.query_y[i]);
        const Score pair = Score::make(V(s.limit[i]), eps, min_gate);
        const V p = inner_product(qx, qy, kx[r], ky[r], pair.bias());
        const Mask<T> kept = kept_and_visible(pair.kept(p), visible);
        const V d = pair.derivative(p, load(upstream[i - tile][r]));
        ax[r] = select(kept, multiply_add(d, qx, ax[r]), ax[r]);
        ay[r] = select(kept, multiply_add(d, qy, ay[r]), ay[r]);
        store(weight[i - tile][r], where(kept, pair.backward_weight(p)));
      });
      V parts[2][kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        parts[0][r] = ax[r];
        parts[1][r] = ay[r];
      });
      add_parts(totals, parts);
      add_columns<T>(each, weight, s.grad_records, s.value_dim, s.value_dim, values.get());
    }
    take(group, first, totals[0], 0, 2, out.point);
    take(group, first, totals[1], 1, 2, out.point);
    take_columns(group, first, values.get(), s.value_dim, out.values);
  }
}

// The gradients of keys and of kColumns columns of values.
template <class Score, class T>
void backward_keys_columns(const Sequence<T>& s, int64_t first, int64_t last,
                           const BackwardBlock<T>& out) {
  using V = Vector<T>;
  const V eps(s.eps), min_gate(s.min_gate);
  for (int64_t key = first; key < last; key += Group<T>::kOwners) {
    const Group<T> group = key_group(s, key, last);
    V kx[kVectors], ky[kVectors], value[kVectors][kColumns];
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      kx[r] = load(s.key_x + group.start(r));
      ky[r] = load(s.key_y + group.start(r));
      each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA {
        value[r][c] = load(s.value_planes + c * s.key_stride + group.start(r));
      });
    });
    Total<T> totals[2 + kColumns][kVectors];  // of the keys, of the values
    for (int64_t tile = group.lowest() / kTile * kTile; tile < group.highest(); tile += kTile) {
      V ax[kVectors], ay[kVectors], acc[kVectors][kColumns];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        ax[r] = ay[r] = V(T(0));
        each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA { acc[r][c] = V(T(0)); });
      });
      each_row<ColumnValues<T>::kApart>(
          group, tile, tile + kTile,
          [&](auto r, int64_t i, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
            const T* grad = s.grad_records + i * kColumns;
            const V qx(s.query_x[i]), qy(s.query_y[i]);
            const Score pair = Score::make(V(s.limit[i]), eps, min_gate);
            const V p = inner_product(qx, qy, kx[r], ky[r], pair.bias());
            const Mask<T> kept = kept_and_visible(pair.kept(p), visible);
            V u(s.grad_strength[i]);
            each_column<kColumns>(
                [&](auto c) QFLUX_INLINE_LAMBDA { u = multiply_add(value[r][c], V(grad[c]), u); });
            const V d = pair.derivative(p, u);
            ax[r] = add_kept(visible, kept, d, qx, ax[r]);
            ay[r] = add_kept(visible, kept, d, qy, ay[r]);
            const V w = where(kept, pair.backward_weight(p));
            each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA {
              acc[r][c] = add_visible(visible, w, V(grad[c]), acc[r][c]);
            });
          });
      V parts[2 + kColumns][kVectors];
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        parts[0][r] = ax[r];
        parts[1][r] = ay[r];
        each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA { parts[2 + c][r] = acc[r][c]; });
      });
      add_parts(totals, parts);
    }
    take(group, first, totals[0], 0, 2, out.point);
    take(group, first, totals[1], 1, 2, out.point);
    each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA {
      take(group, first, totals[2 + c], c, kColumns, out.values);
    });
  }
}

template <class T>
void forward(const Sequence<T>& s, int64_t first, int64_t last, const ForwardBlock<T>& out) {
  visit_score(s.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<Vector<T>>;
    if (!s.values)
      return out.degree ? forward_narrow<Score, KeysAsValues<T>, true>(s, first, last, out)
                        : forward_narrow<Score, KeysAsValues<T>, false>(s, first, last, out);
    if (s.value_dim == kColumns && out.degree)
      return forward_narrow<Score, ColumnValues<T>, true>(s, first, last, out);
    return forward_values<Score>(s, first, last, out);
  });
}
template <class T>
void backward_rows(const Sequence<T>& s, int64_t first, int64_t last, const BackwardBlock<T>& out) {
  visit_score(s.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<Vector<T>>;
    if (!s.values) return backward_rows_narrow<Score, KeysAsValues<T>>(s, first, last, out);
    return s.value_dim == kColumns
               ? backward_rows_narrow<Score, ColumnValues<T>>(s, first, last, out)
               : backward_rows_values<Score>(s, first, last, out);
  });
}
template <class T>
void backward_keys(const Sequence<T>& s, int64_t first, int64_t last, const BackwardBlock<T>& out) {
  visit_score(s.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<Vector<T>>;
    if (!s.values) return backward_keys_keys<Score>(s, first, last, out);
    return s.value_dim == kColumns ? backward_keys_columns<Score>(s, first, last, out)
                                   : backward_keys_values<Score>(s, first, last, out);
  });
}

template <class T>
constexpr DenseLoops<T> kLoops = {forward<T>, backward_rows<T>, backward_keys<T>};

}  // namespace dense
}  // namespace
}  // namespace qflux::cpu
