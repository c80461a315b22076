// Pairs of rows and keys of a tree that are met one by one, a key in each lane.
#pragma once

#include "../../math/score.h"
#include "../../math/tree.h"
#include "simd.h"
#include "tree.h"

namespace qflux::cpu {
namespace {
namespace tree {

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
  constexpr int kWidth = Vector<T>::kWidth;
  T lane[kWidth];
  store(lane, v);
  double sum[kWidth];
  for (int l = 0; l < kWidth; ++l) sum[l] = lane[l];
  return fold<kWidth>(sum, [](double a, double b) QFLUX_INLINE_LAMBDA { return a + b; });
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
  if (columns == 4) return body(Constant<4>());
  if (columns == 2) return body(Constant<2>());
  body(Constant<0>());
}

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
  out->top = largest_lane(top);
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

}  // namespace tree
}  // namespace
}  // namespace qflux::cpu
