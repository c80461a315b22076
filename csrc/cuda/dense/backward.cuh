// What the two passes of the backward gather, recomputing the weights: each row the gradient of its
// query over its keys, each key that of itself and of its value over its rows. Both see the
// forward's inner product and threshold, so all three agree on the kept pairs.
#pragma once

#include "../common/gather.cuh"

namespace qflux::cuda {

// Gradients of one row's context and strength, reduction applied.
template <class T, int kColumns>
__device__ __forceinline__ void load_gradients(const InteractBackwardParams<T>& params, int64_t b,
                                               int row, const Visibility& visibility, int column,
                                               int columns, T* grad, T& grad_strength) {
  const T scale = params.pair.reduction_scale(visibility.visible_keys(row));
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    grad[c] = column + c < columns ? scale * params.grad_context.at(b, row, column + c) : T(0);
  // The gradient of a weight is a sum over all columns; the strength counts once.
  grad_strength =
      column == 0 && params.grad_strength ? scale * params.grad_strength.at(b, row) : T(0);
}

template <int kColumns, class T>
__device__ __forceinline__ T dot(const T* a, const T* b, T start) {
#pragma unroll
  for (int c = kColumns - 1; c >= 0; --c) start = multiply_add(a[c], b[c], start);
  return start;
}

template <class T, template <class> class Kind, bool kOwnValues>
struct Backward {
  using Scalar = T;
  using Pair = Kind<T>;
  using Params = InteractBackwardParams<T>;
  static constexpr int kColumns = Traits<T, kOwnValues>::kColumns;
  static constexpr bool kLoopsColumns = kOwnValues;

  const Params& params;
  int64_t b;
  PairOf<Pair> pair;

  __device__ __forceinline__ Backward(const Params& p, int64_t sequence)
      : params(p), b(sequence), pair(p.pair, sequence) {}
  __device__ __forceinline__ Visibility visibility() const { return params.pair.visibility(b); }

  QFLUX_INLINE static int64_t columns(const Params& p) {
    return kOwnValues ? p.pair.depth : kColumns;
  }
  __device__ __forceinline__ T limit(int row) const {
    return kHasThreshold<Pair> ? params.threshold.at(b, row) : T(0);
  }
  __device__ __forceinline__ T value(int key, int column) const {
    return column < params.pair.depth ? params.pair.values.at(b, key, column) : T(0);
  }
};

template <class T, template <class> class Kind, bool kOwnValues>
struct RowPass : Backward<T, Kind, kOwnValues> {
  using Base = Backward<T, Kind, kOwnValues>;
  using Pair = Kind<T>;
  using Params = InteractBackwardParams<T>;
  using Sizes = TileTraits<T, kOwnValues, kOwnValues ? 2 + Base::kColumns : 2>;
  static constexpr int kColumnSums = 0, kSums = kLimitHasGradient<Pair> ? 3 : 2;
  using Base::b, Base::kColumns, Base::pair, Base::params, Base::visibility;

  struct Owner {
    Point<T> query;
    T limit, grad_strength, grad[kColumns];
  };

  __device__ __forceinline__ RowPass(const Params& p, int64_t sequence) : Base(p, sequence) {}
  QFLUX_INLINE static int64_t owners(const Params& p) { return p.pair.rows; }
  QFLUX_INLINE static int64_t others(const Params& p) { return p.pair.keys; }

  __device__ __forceinline__ int valid() const { return static_cast<int>(visibility().row_end); }
  __device__ __forceinline__ Range range(int row) const {
    return {0, static_cast<int>(visibility().visible_keys(row))};
  }
  __device__ __forceinline__ Owner load(int row, int column) const {
    Owner owner{query<Pair>(params.pair, b, row), this->limit(row), T(0), {}};
    load_gradients<T, kColumns>(params, b, row, visibility(), column, this->columns(params),
                                owner.grad, owner.grad_strength);
    return owner;
  }
  __device__ __forceinline__ void fetch(int key, int column, T (&record)[Sizes::kWidth]) const {
    const Point<T> point = load_point(params.pair.key_points, b, key);
    record[0] = point.x;
    record[1] = point.y;
    if constexpr (kOwnValues) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) record[2 + c] = this->value(key, column + c);
    }
  }
  __device__ __forceinline__ void accumulate(const Owner& row, const T (&record)[Sizes::kWidth],
                                             bool visible, T (&sums)[kSums]) const {
    const T p =
        inner_product(row.query.x, row.query.y, record[0], record[1], static_cast<T>(Pair::kBias));
    const T grad_weight = dot<kColumns>(row.grad, record + (kOwnValues ? 2 : 0), row.grad_strength);
    const Pair scored = pair(row.limit);
    if (!(visible & scored.kept(p))) return;
    const T grad = scored.derivative(p, grad_weight);
    sums[0] = multiply_add(grad, record[0], sums[0]);
    sums[1] = multiply_add(grad, record[1], sums[1]);
    if constexpr (kLimitHasGradient<Pair>) sums[2] += grad;
  }
  __device__ __forceinline__ void store(int row, int /*column*/, bool last,
                                        const T (&sums)[kSums]) const {
    if (!last) return;
    const bool inside = row < visibility().row_end;
    const Point<T> grad{inside ? sums[0] : T(0), inside ? sums[1] : T(0)};
    if constexpr (kLimitHasGradient<Pair>)
      if (params.grad_threshold) params.grad_threshold.at(b, row) = inside ? -sums[2] : T(0);
    if constexpr (!kHasThreshold<Pair>) {
      if (params.grad_alpha && inside)
        params.grad_alpha.at(b, row) +=
            Pair::alpha_vjp(grad, load_point(params.pair.states, b, row));
    }
    if (!params.grad_states) return;
    Point<T> pulled = Pair::query_vjp(grad, params.pair.coefficient[b]);
    if (params.accumulate) {
      const Point<T> old = load_point(as_const(params.grad_states), b, row);
      pulled = {old.x + pulled.x, old.y + pulled.y};
    }
    store_point(params.grad_states, b, row, pulled);
  }
};

template <class T, template <class> class Kind, bool kOwnValues>
struct KeyPass : Backward<T, Kind, kOwnValues> {
  using Base = Backward<T, Kind, kOwnValues>;
  using Pair = Kind<T>;
  using Params = InteractBackwardParams<T>;
  using Base::b, Base::kColumns, Base::pair, Base::params, Base::visibility;
  // A row's query, limit and gradient of the strength, then of the context.
  using Sizes = TileTraits<T, kOwnValues, 4 + Base::kColumns>;
  static constexpr int kColumnSums = kOwnValues ? kColumns : 0, kSums = kColumnSums + 2;

  struct Owner {
    T point[2];
    T value[kOwnValues ? kColumns : 1];
  };

  __device__ __forceinline__ KeyPass(const Params& p, int64_t sequence) : Base(p, sequence) {}
  QFLUX_INLINE static int64_t owners(const Params& p) { return p.pair.keys; }
  QFLUX_INLINE static int64_t others(const Params& p) { return p.pair.rows; }

  __device__ __forceinline__ int valid() const { return static_cast<int>(visibility().key_end); }
  __device__ __forceinline__ Range range(int key) const {
    const Visibility v = visibility();
    return {static_cast<int>(v.first_row(key)), static_cast<int>(v.row_end)};
  }
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
    const Point<T> q = query<Pair>(params.pair, b, row);
    record[0] = q.x;
    record[1] = q.y;
    record[2] = this->limit(row);
    load_gradients<T, kColumns>(params, b, row, visibility(), column, this->columns(params),
                                record + 4, record[3]);
  }
  __device__ __forceinline__ void accumulate(const Owner& key, const T (&record)[Sizes::kWidth],
                                             bool visible, T (&sums)[kSums]) const {
    const T p = inner_product(record[0], record[1], key.point[0], key.point[1],
                              static_cast<T>(Pair::kBias));
    const Pair scored = pair(record[2]);
    const T grad_weight = dot<kColumns>(record + 4, kOwnValues ? key.value : key.point, record[3]);
    if (!(visible & scored.kept(p))) return;
    const T grad = scored.derivative(p, grad_weight), w = scored.weight(p);
    T& x = sums[kColumnSums];
    T& y = sums[kColumnSums + 1];
    x = multiply_add(grad, record[0], x);
    y = multiply_add(grad, record[1], y);
    if constexpr (kOwnValues) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c] = multiply_add(w, record[4 + c], sums[c]);
    } else {
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
        if (params.grad_values && column + c < params.pair.depth)
          params.grad_values.at(b, key, column + c) = inside ? sums[c] : T(0);
    }
    if (!last || !params.grad_keys) return;
    Point<T> grad{inside ? sums[kColumnSums] : T(0), inside ? sums[kColumnSums + 1] : T(0)};
    if (params.keys_are_states) {
      const Point<T> old = load_point(as_const(params.grad_keys), b, key);
      grad = {old.x + grad.x, old.y + grad.y};
    }
    store_point(params.grad_keys, b, key, grad);
  }
};

}  // namespace qflux::cuda
