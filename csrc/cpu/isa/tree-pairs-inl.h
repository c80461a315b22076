// Pairs of rows and keys of a tree that are met one by one, a key in each lane.
#pragma once

#include "../../math/score.h"
#include "../../math/tree.h"
#include "simd.h"
#include "tree.h"

namespace qflux::cpu {
namespace {
namespace tree {

// Vectors of a leaf that are met together, with sums of their own, as registers allow: no sum waits
// for the one before, and of a row is read once what they have in common.
#if defined(__AVX512F__)
constexpr int kTogether = 2;
#else
constexpr int kTogether = 1;
#endif

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
QFLUX_INLINE double total(Vector<T> v) {
  Vector<double> sum(0.0);
  each_wide(v, [&](int, Vector<double> part) QFLUX_INLINE_LAMBDA { sum = sum + part; });
  return across(sum);
}

template <class T>
QFLUX_INLINE double total_count(typename Vector<T>::Bits counter) {
  typename Vector<T>::Integer lane[Vector<T>::kWidth];
  std::memcpy(lane, &counter, sizeof(counter));
  return static_cast<double>(
      fold<Vector<T>::kWidth>(lane, [](auto a, auto b) QFLUX_INLINE_LAMBDA { return a + b; }));
}

template <class T>
QFLUX_INLINE T largest_lane(Vector<T> v) {
  T lane[Vector<T>::kWidth];
  store(lane, v);
  return fold<Vector<T>::kWidth>(lane, [](T a, T b) QFLUX_INLINE_LAMBDA { return a > b ? a : b; });
}

// Calls body(columns) with the number of columns as a type where it is a usual one, else 0.
template <class Body>
QFLUX_INLINE void visit_columns(int64_t columns, const Body& body) {
  if (columns == 8) return body(Constant<8>());
  if (columns == 4) return body(Constant<4>());
  if (columns == 2) return body(Constant<2>());
  body(Constant<0>());
}

// Runs of `size` keys, of which the numbers tell the places, in steps; without numbers one, in
// front.
struct Runs {
  const int32_t* place;
  int64_t count, size, step;
};

// Calls body(p, key, r) for the vectors of products of a row with the keys of runs, r below
// kTogether in turn; lanes behind a run are NaN.
template <class T, class Body>
QFLUX_INLINE void each_product(const KeyPlanes<T>& keys, const Runs& runs, const T* record,
                               const Body& body) {
  using V = Vector<T>;
  const V qx(record[0]), qy(record[1]), zero(T(0));
  const auto product = [&](int64_t k) QFLUX_INLINE_LAMBDA {
    return inner_product(qx, qy, load(keys.x + k), load(keys.y + k), zero);
  };
  if (runs.place) {
    for (int64_t n = 0; n < runs.count; ++n) {
      const int64_t begin = runs.place[n] * runs.step;
      for (int64_t k = begin; k < begin + kLeaf; k += kTogether * V::kWidth)
        each_column<kTogether>([&](auto r) QFLUX_INLINE_LAMBDA {
          body(product(k + r * V::kWidth), k + r * V::kWidth, r);
        });
    }
    return;
  }
  int64_t k = 0;
  for (; k + kTogether * V::kWidth <= runs.size; k += kTogether * V::kWidth)
    each_column<kTogether>([&](auto r) QFLUX_INLINE_LAMBDA {
      body(product(k + r * V::kWidth), k + r * V::kWidth, r);
    });
  for (; k < runs.size; k += V::kWidth)
    body(select(lanes_between<T>(0, runs.size - k), product(k), V(T(NAN))), k, Constant<0>());
}

// Of sums that were taken in turn.
template <class S>
QFLUX_INLINE S sum_of(const S (&parts)[kTogether]) {
  S sum = parts[0];
  for (int r = 1; r < kTogether; ++r) sum = sum + parts[r];
  return sum;
}

// The weights of a row's pairs, and their sum; NaN has none. Many weights share what tau loses when
// it is rounded to T: the rest.
template <class T>
struct Excess {
  using V = Vector<T>;
  const V tau, rest;
  V sum[kTogether];
  typename V::Bits counter[kTogether];

  explicit Excess(const T* record) : tau(record[2]), rest(record[3]) {
    each_column<kTogether>([&](auto r) QFLUX_INLINE_LAMBDA {
      sum[r] = V(T(0));
      counter[r] = typename V::Bits{};
    });
  }
  template <class Index>
  QFLUX_INLINE V add(V p, Index r) {
    const Mask<T> kept = less(tau, p);
    const V w = where(kept, (p - tau) - rest);
    sum[r] = sum[r] + w;
    count(kept, counter[r]);
    return w;
  }
  void take(Mass<T>* out) const {
    out->excess += total(sum_of(sum));
    out->count += total_count<T>(sum_of(counter));
  }
};

template <class T>
void mass_of(const KeyPlanes<T>& keys, const Runs& runs, const T* record, Mass<T>* out) {
  using V = Vector<T>;
  Excess<T> excess(record);
  V top(out->top);
  each_product<T>(keys, runs, record, [&](V p, int64_t, auto r) QFLUX_INLINE_LAMBDA {
    top = larger(p, top);
    excess.add(p, r);
  });
  excess.take(out);
  out->top = largest_lane(top);
}

template <class T, int kColumns>
void context_columns(const KeyPlanes<T>& keys, const Runs& runs, const T* record, Mass<T>* out,
                     const T* values, double* context) {
  using V = Vector<T>;
  Excess<T> excess(record);
  V sums[kColumns][kTogether];
  for (auto& column : sums)
    for (V& sum : column) sum = V(T(0));
  each_product<T>(keys, runs, record, [&](V p, int64_t k, auto r) QFLUX_INLINE_LAMBDA {
    const V w = excess.add(p, r);
    each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA {
      sums[c][r] = multiply_add(w, load(values + c * keys.stride + k), sums[c][r]);
    });
  });
  if (out) excess.take(out);
  for (int c = 0; c < kColumns; ++c) context[c] += total(sum_of(sums[c]));
}

template <class T>
void context_of(const KeyPlanes<T>& keys, const Runs& runs, const T* record, Mass<T>* out,
                double* context) {
  int64_t c = 0;
  if constexpr (kTogether > 1)
    for (; c + 8 <= keys.value_dim; c += 8)
      context_columns<T, 8>(keys, runs, record, c == 0 ? out : nullptr,
                            keys.values + c * keys.stride, context + c);
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
  V su[kTogether], sx[kTogether], sy[kTogether], sux[kTogether], suy[kTogether];
  typename V::Bits counter[kTogether];
  each_column<kTogether>([&](auto r) QFLUX_INLINE_LAMBDA {
    su[r] = sx[r] = sy[r] = sux[r] = suy[r] = zero;
    counter[r] = typename V::Bits{};
  });
  each_product<T>(keys, runs, record, [&](V p, int64_t k, auto r) QFLUX_INLINE_LAMBDA {
    const Mask<T> kept = less(tau, p);
    const V x = load(keys.x + k), y = load(keys.y + k);
    V u = zero;
    for (int64_t c = 0; c < columns; ++c)
      u = multiply_add(V(grad[c]), load(keys.values + c * keys.stride + k), u);
    count(kept, counter[r]);
    su[r] = add_where(kept, u, su[r]);
    sx[r] = add_where(kept, x, sx[r]);
    sy[r] = add_where(kept, y, sy[r]);
    sux[r] = multiply_add_where(kept, x, u, sux[r]);
    suy[r] = multiply_add_where(kept, y, u, suy[r]);
  });
  out->count += total_count<T>(sum_of(counter));
  out->u += total(sum_of(su));
  out->x += total(sum_of(sx));
  out->y += total(sum_of(sy));
  out->ux += total(sum_of(sux));
  out->uy += total(sum_of(suy));
}

template <class T>
void kept_sums_of(const KeyPlanes<T>& keys, const Runs& runs, const T* record, KeptSums* out) {
  visit_columns(keys.value_dim, [&](auto columns) {
    kept_sums<T, decltype(columns)::kValue>(keys, runs, record, out);
  });
}

// Adds what kTogether vectors of keys from `k` on get from rows, numbered by `list` or 0 on:
// add(component, key, vector) takes keys' x, y, then values. Row n sees lanes below visible + n.
template <int kColumns, bool kCausal, int kTogether, class T, class Add>
QFLUX_INLINE void meet_rows(const KeyPlanes<T>& keys, int64_t k, const TreeRows<T>& rows,
                            const int32_t* list, int64_t count, int64_t visible, const Add& add) {
  using V = Vector<T>;
  static_assert(!kCausal || kTogether == 1, "lanes of one vector");
  const int64_t columns = kColumns ? kColumns : keys.value_dim;
  const V zero(T(0));
  V kx[kTogether], ky[kTogether], ax[kTogether], ay[kTogether];
  V weights[kColumns ? 1 : kRowsAtOnce][kTogether];
  V values[kColumns ? kColumns : 1][kTogether], sums[kColumns ? kColumns : 1][kTogether];
  each_column<kTogether>([&](auto r) QFLUX_INLINE_LAMBDA {
    kx[r] = load(keys.x + k + r * V::kWidth);
    ky[r] = load(keys.y + k + r * V::kWidth);
    ax[r] = ay[r] = zero;
    each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA {
      values[c][r] = load(keys.values + c * keys.stride + k + r * V::kWidth);
      sums[c][r] = zero;
    });
  });
  for (int64_t n = 0; n < count; ++n) {
    const T* q = rows.at(list ? list[n] : n);
    const T* grad = q + kRowNumbers;
    const V qx(q[0]), qy(q[1]), tau(q[2]), mean(q[3]);
    each_column<kTogether>([&](auto r) QFLUX_INLINE_LAMBDA {
      const V p = inner_product(qx, qy, kx[r], ky[r], zero);
      Mask<T> kept = less(tau, p);
      if constexpr (kCausal) kept = both(kept, lanes_between<T>(0, visible + n));
      const V w = where(kept, p - tau);
      V u = mean;
      if constexpr (kColumns > 0) {
        each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA {
          const V g(grad[c]);
          u = multiply_add(values[c][r], g, u);
          sums[c][r] = multiply_add(w, g, sums[c][r]);
        });
      } else {
        for (int64_t c = 0; c < columns; ++c)
          u = multiply_add(load(keys.values + c * keys.stride + k + r * V::kWidth), V(grad[c]), u);
        weights[n][r] = w;
      }
      ax[r] = multiply_add_where(kept, u, qx, ax[r]);
      ay[r] = multiply_add_where(kept, u, qy, ay[r]);
    });
  }
  each_column<kTogether>([&](auto r) QFLUX_INLINE_LAMBDA {
    const int64_t at = k + r * V::kWidth;
    add(0, at, ax[r]);
    add(1, at, ay[r]);
    if constexpr (kColumns > 0) {
      each_column<kColumns>([&](auto c) QFLUX_INLINE_LAMBDA { add(2 + c, at, sums[c][r]); });
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        V sum = zero;
        for (int64_t n = 0; n < count; ++n)
          sum = multiply_add(weights[n][r], V(rows.at(list ? list[n] : n)[kRowNumbers + c]), sum);
        add(2 + c, at, sum);
      }
    }
  });
}

}  // namespace tree
}  // namespace
}  // namespace qflux::cpu
