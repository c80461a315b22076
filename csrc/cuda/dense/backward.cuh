// What the two passes of the backward gather, recomputing the weights: each row the gradient of its
// query over its keys, each key that of itself and of its value over its rows. Both see the
// forward's inner product and threshold, so all three agree on the kept pairs.
#pragma once

#include <type_traits>

#include "../../math/mass.h"
#include "../common/gather.cuh"

namespace qflux::cuda {

// Gradients of one row's context and, unless the score has a mass, strength, reduction applied.
template <class T, class Score, int kColumns>
__device__ __forceinline__ void load_gradients(const InteractBackwardParams<T>& params,
                                               BatchIndex b, int row, const Visibility& visibility,
                                               int column, int columns, T* grad, T& grad_strength) {
  const T scale = params.pair.reduction_scale(visibility.visible_keys(row));
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    grad[c] = column + c < columns ? scale * params.grad_context.load(b, row, column + c) : T(0);
  // The gradient of a weight is a sum over all columns; the strength counts once.
  const bool counts = column == 0 && !Score::kMass && params.grad_strength;
  grad_strength = counts ? scale * params.grad_strength.load(b, row) : T(0);
}

template <class T>
__device__ __forceinline__ void put_gradient(const View<T>& view, BatchIndex b, int i,
                                             Point<T> gradient, bool adds) {
  adds ? add_point(view, b, i, gradient) : store_point(view, b, i, gradient);
}

template <int kColumns, class T>
__device__ __forceinline__ T dot(const T* a, const T* b, T start) {
#pragma unroll
  for (int c = kColumns - 1; c >= 0; --c) start = multiply_add(a[c], b[c], start);
  return start;
}

// Columns of the values that a pass of the backward takes at a time; it loops over all of them.
template <class T, int kValues>
struct BackwardColumns {
  static constexpr bool kOwnValues = kValues > 0, kLoopsColumns = kOwnValues;
  static constexpr int kColumns = Traits<T, kValues>::kColumns;
  QFLUX_INLINE static int64_t columns(const InteractBackwardParams<T>& p) {
    return kOwnValues ? p.pair.value_dim : kColumns;
  }
};

// No totals of columns: registers for a fourth block, those of a mass that gathers its moments too
// with half the rows.
template <class T, int kValues, bool kMoments>
struct RowPassSizes : TileTraits<T, kValues, 2 + kValues, 4> {
  static constexpr int kAll = Traits<T, kValues>::kOwners;
  static constexpr int kOwners = kMoments ? kAll / 2 : kAll;
};

// Wide values meet the gradients of contexts on tensor cores (row_products.cuh).
template <class T, int kValues, bool kMoments>
using RowSizes = std::conditional_t<(kValues >= kTensorColumns), ProductRowSizes<kValues>,
                                    RowPassSizes<T, kValues, kMoments>>;

template <class T, class Score, int kValues>
struct RowPass : OwnsRows<T, Score, InteractBackwardParams<T>>, BackwardColumns<T, kValues> {
  using Base = OwnsRows<T, Score, InteractBackwardParams<T>>;
  using Params = InteractBackwardParams<T>;
  using Base::Base, Base::b, Base::params, Base::visibility;
  using BackwardColumns<T, kValues>::kColumns, BackwardColumns<T, kValues>::kOwnValues;
  // The forward leaves those of values of their own.
  static constexpr bool kMoments = Score::kMass && !kOwnValues;
  using Sizes = RowSizes<T, kValues, kMoments>;
  // Of u k and, for what a limit or a mass has more, u, 1 and k.
  static constexpr int kColumnSums = 0;
  static constexpr int kSums = kMoments ? 6 : Score::kMass || Score::kLimitVjp ? 3 : 2;

  static constexpr bool kShowsDropped = false;

  struct Owner {
    Point<T> query;
    T limit, grad_strength, grad[kColumns];
  };

  __device__ __forceinline__ Owner load(int row, int column) const {
    Owner owner{query<Score>(params.pair, b, row), this->limit(row), T(0), {}};
    load_gradients<T, Score, kColumns>(params, b, row, visibility(), column, this->columns(params),
                                       owner.grad, owner.grad_strength);
    return owner;
  }
  __device__ __forceinline__ void fetch(int key, int column, T (&record)[Sizes::kWidth]) const {
    this->template fetch_key<Sizes::kWidth - 2>(key, column, record);
  }
  template <bool kCareful = true>
  __device__ __forceinline__ void accumulate(const Owner& row, const T (&record)[Sizes::kWidth],
                                             bool visible, T (&sums)[kSums]) const {
    const Score score = this->score(row.limit);
    const T p = inner_product(row.query.x, row.query.y, record[0], record[1], score.bias());
    const T grad_weight = dot<kColumns>(row.grad, record + (kOwnValues ? 2 : 0), row.grad_strength);
    if (!(visible & score.kept(p))) return;
    const T grad = score.derivative(p, grad_weight);
    sums[0] = multiply_add(grad, record[0], sums[0]);
    sums[1] = multiply_add(grad, record[1], sums[1]);
    if constexpr (kSums > 2) sums[2] += grad;
    if constexpr (kMoments) {
      sums[3] += T(1);
      sums[4] += record[0];
      sums[5] += record[1];
    }
  }
  // Of a row without the gradients of its context.
  struct Row {
    Point<T> query;
    T limit, grad_strength;
  };
  __device__ __forceinline__ Row load_row(int row, int column) const {
    Row owner{query<Score>(params.pair, b, row), this->limit(row), T(0)};
    load_gradients<T, Score, 0>(params, b, row, visibility(), column, 0, static_cast<T*>(nullptr),
                                owner.grad_strength);
    return owner;
  }
  // Of the context, reduction applied; zero behind the last column.
  __device__ __forceinline__ T grad_context(int row, int column) const {
    if (column >= this->columns(params)) return T(0);
    return params.pair.reduction_scale(visibility().visible_keys(row)) *
           params.grad_context.load(b, row, column);
  }
  // Adds a pair of values of their own, of which `grad_weight` is known.
  template <bool kCareful>
  __device__ __forceinline__ void add_pair(const Row& row, Point<T> key, T grad_weight,
                                           bool visible, T (&sums)[kSums]) const {
    static_assert(!kMoments, "the forward leaves them");
    const Score score = this->score(row.limit);
    const T p = inner_product(row.query.x, row.query.y, key.x, key.y, score.bias());
    const bool kept = score.kept(p) & (!kCareful | visible);
    const T grad = score.derivative(p, grad_weight);
    multiply_add_if(kept, grad, key.x, sums[0]);
    multiply_add_if(kept, grad, key.y, sums[1]);
    if constexpr (kSums > 2) add_if(kept, grad, sums[2]);
  }
  __device__ __forceinline__ void store(int row, int /*column*/, bool last,
                                        const T (&sums)[kSums]) const {
    if (!last) return;
    const bool inside = row < visibility().row_end;
    Point<T> grad{inside ? sums[0] : T(0), inside ? sums[1] : T(0)};
    if constexpr (Score::kMass) {
      const auto moment = [&](int n) {
        if constexpr (kMoments) return sums[3 + n];
        return params.moments.at(b, row, n);
      };
      const MassSums<T> of{moment(0), sums[2], {moment(1), moment(2)}, {sums[0], sums[1]}};
      if (inside) grad = mass_query_vjp(of);
      params.pair.row_plane().at(b, row) = inside ? -mass_mean(of) : T(0);
    }
    if constexpr (Score::kLimitVjp)
      if (params.grad_threshold) params.grad_threshold.at(b, row) = inside ? -sums[2] : T(0);
    if constexpr (Score::kCoefficientInQuery) {
      // A row that sees nothing has no share, whatever it holds.
      if (params.grad_coefficient && visibility().visible_keys(row) > 0)
        params.grad_coefficient.at(b, row) +=
            Score::coefficient_vjp(grad, load_point(params.pair.states, b, row));
    }
    if (!params.grad_states) return;
    put_gradient(params.grad_states, b, row, Score::query_vjp(grad, params.pair.coefficient[b]),
                 params.accumulate);
  }
};

// The row pass where the forward left the KeptSums of the row.
template <class T, class Score>
__device__ __forceinline__ void row_from_kept(const InteractBackwardParams<T>& params, BatchIndex b,
                                              int row) {
  const RowPass<T, Score, 0> pass(params, b);
  const auto of = pass.load(row, 0);
  const auto sum = [&](int n) { return params.moments.at(b, row, n); };
  const Point<T> grad = kept_query_vjp<T>({sum(0), sum(1), sum(2), sum(3), sum(4)},
                                          {of.grad[0], of.grad[1]}, of.grad_strength);
  const T sums[RowPass<T, Score, 0>::kSums] = {grad.x, grad.y};
  pass.store(row, 0, true, sums);
}

// Their own totals of columns leave narrow values registers for two owners, which read as many
// records at a time as four.
template <class T, int kValues>
struct KeyPassSizes : TileTraits<T, kValues, 4 + Traits<T, kValues>::kColumns> {
  static constexpr bool kNarrowFloats = sizeof(T) == 4 && kValues == kNarrow;
  static constexpr int kOwners = kNarrowFloats ? 2 : Traits<T, kValues>::kOwners;
  static constexpr int kUnroll = kNarrowFloats ? 4 : Traits<T, kValues>::kUnroll;
};

template <class T, class Score, int kValues>
struct KeyPass : OwnsKeys<T, Score, InteractBackwardParams<T>>, BackwardColumns<T, kValues> {
  using Base = OwnsKeys<T, Score, InteractBackwardParams<T>>;
  using Params = InteractBackwardParams<T>;
  using Base::Base, Base::b, Base::params, Base::visibility;
  using BackwardColumns<T, kValues>::kColumns, BackwardColumns<T, kValues>::kOwnValues;
  // A row's query, limit and gradient of the strength (of a mass: what the row pass left in its
  // place), then of the context.
  using Sizes = KeyPassSizes<T, kValues>;
  static constexpr int kColumnSums = kOwnValues ? kColumns : 0, kSums = kColumnSums + 2;

  static constexpr bool kShowsDropped = false;

  struct Owner {
    T point[2];
    T value[kOwnValues ? kColumns : 1];
  };

  __device__ __forceinline__ Owner load(int key, int column) const {
    const Point<T> point = load_point(params.pair.key_points, b, key);
    Owner owner{{point.x, point.y}, {}};
    if constexpr (kOwnValues) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) owner.value[c] = this->value(key, column + c);
    }
    return owner;
  }
  __device__ __forceinline__ void fetch(int row, int column, T (&record)[Sizes::kWidth]) const {
    const Point<T> q = query<Score>(params.pair, b, row);
    record[0] = q.x;
    record[1] = q.y;
    record[2] = this->limit(row);
    load_gradients<T, Score, kColumns>(params, b, row, visibility(), column, this->columns(params),
                                       record + 4, record[3]);
    if constexpr (Score::kMass)
      if (column == 0) record[3] = params.pair.row_plane().at(b, row);
  }
  template <bool kCareful = true>
  __device__ __forceinline__ void accumulate(const Owner& key, const T (&record)[Sizes::kWidth],
                                             bool visible, T (&sums)[kSums]) const {
    const Score score = this->score(record[2]);
    const T p = inner_product(record[0], record[1], key.point[0], key.point[1], score.bias());
    const T grad_weight = dot<kColumns>(record + 4, kOwnValues ? key.value : key.point, record[3]);
    const bool kept = visible & score.kept(p);
    const T grad = score.derivative(p, grad_weight), w = score.backward_weight(p);
    T& x = sums[kColumnSums];
    T& y = sums[kColumnSums + 1];
    if constexpr (kOwnValues) {
      multiply_add_if(kept, grad, record[0], x);
      multiply_add_if(kept, grad, record[1], y);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) multiply_add_if(kept, w, record[4 + c], sums[c]);
    } else if (kept) {
      x = multiply_add(grad, record[0], x);
      y = multiply_add(grad, record[1], y);
      x = multiply_add(w, record[4], x);
      y = multiply_add(w, record[5], y);
    }
  }
  __device__ __forceinline__ void store(int key, int column, bool last,
                                        const T (&sums)[kSums]) const {
    const bool inside = key < visibility().key_end;
    if constexpr (kOwnValues) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (params.grad_values && column + c < params.pair.value_dim)
          params.grad_values.store(b, key, column + c, inside ? sums[c] : T(0));
    }
    if (!last || !params.grad_keys) return;
    const Point<T> grad{inside ? sums[kColumnSums] : T(0), inside ? sums[kColumnSums + 1] : T(0)};
    put_gradient(params.grad_keys, b, key, grad, params.keys_are_states);
  }
};

}  // namespace qflux::cuda
