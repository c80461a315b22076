// The passes of a layer's attention over tokens: points by pairs, rows a vector at a time.
#pragma once

#include "../../math/gate.h"
#include "../../math/turn.h"
#include "attention.h"
#include "simd.h"

namespace qflux::cpu {
namespace {
namespace attention {

template <class T>
void turn(const AttentionParams<T>& p, int64_t b, int64_t first, int64_t last, T* points) {
  const int64_t columns = p.columns(), count = last - first;
  const T* const from = p.projected + (b * p.tokens + first) * columns;
  for (int64_t which = 0; which < 2; ++which)
    for (int64_t c = 0; c < p.cylinders; ++c) {
      const T* const in = from + 2 * (which * p.cylinders + c);
      const T* const turns = p.turns + 2 * (c * p.tokens + first);
      T* const out =
          points + which * p.points_size() + 2 * ((b * p.cylinders + c) * p.tokens + first);
      for (int64_t n = 0; n < count; ++n) {
        const Point<T> q =
            turned(Point<T>{in[n * columns], in[n * columns + 1]}, turns[2 * n], turns[2 * n + 1]);
        out[2 * n] = q.x;
        out[2 * n + 1] = q.y;
      }
    }
}

// Calls body(numbers of a token and cylinder in rows, the same when packed).
template <class T, class Rows, class Packed, class Body>
QFLUX_INLINE void each_packed(const AttentionParams<T>& p, int64_t b, int64_t first, int64_t last,
                              Rows* rows, int64_t stride, Packed* packed, const Body& body) {
  const int64_t dim = p.value_dim;
  for (int64_t c = 0; c < p.cylinders; ++c)
    for (int64_t i = first; i < last; ++i)
      body(rows + (b * p.tokens + i) * stride + c * dim, packed + (c * p.tokens + i) * dim);
}

// A number of columns that the compiler knows is copied by a move or two.
template <class Body>
QFLUX_INLINE void with_columns(int64_t count, const Body& body) {
  if (count == 4) return body(Constant<4>());
  body(count);
}

template <class T>
void pack(const AttentionParams<T>& p, int64_t b, int64_t first, int64_t last, const T* rows,
          int64_t stride, T* packed) {
  with_columns(p.value_dim, [&](auto dim) QFLUX_INLINE_LAMBDA {
    each_packed(p, b, first, last, rows, stride, packed,
                [&](const T* row, T* to) QFLUX_INLINE_LAMBDA {
                  for (int64_t d = 0; d < dim; ++d) to[d] = row[d];
                });
  });
}

template <class T>
void unpack(const AttentionParams<T>& p, int64_t b, int64_t first, int64_t last, const T* packed,
            const T* more, T* rows, int64_t stride) {
  with_columns(p.value_dim, [&](auto dim) QFLUX_INLINE_LAMBDA {
    each_packed(p, b, first, last, rows, stride, packed,
                [&](T* row, const T* from) QFLUX_INLINE_LAMBDA {
                  for (int64_t d = 0; d < dim; ++d)
                    row[d] = more ? from[d] + more[from - packed + d] : from[d];
                });
  });
}

template <class T>
void turn_back(const AttentionParams<T>& p, int64_t b, int64_t first, int64_t last, const T* turned,
               const T* queries, const T* keys, T* projected, double* angle) {
  const int64_t columns = p.columns();
  T* const rows = projected + b * p.tokens * columns;
  for (int64_t c = 0; c < p.cylinders; ++c) {
    const T* const turns = p.turns + 2 * c * p.tokens;
    double* const of_angle = angle + c * p.tokens;
    for (int64_t which = 0; which < 2; ++which) {
      const T* const grads = (which ? keys : queries) + 2 * c * p.tokens;
      const T* const points =
          turned + which * p.points_size() + 2 * (b * p.cylinders + c) * p.tokens;
      T* const to = rows + 2 * (which * p.cylinders + c);
      for (int64_t i = first; i < last; ++i) {
        const Point<T> grad{grads[2 * i], grads[2 * i + 1]};
        const Point<T> back = turn_vjp(grad, turns[2 * i], turns[2 * i + 1]);
        to[i * columns] = back.x;
        to[i * columns + 1] = back.y;
        of_angle[i] += angle_vjp(grad, Point<T>{points[2 * i], points[2 * i + 1]});
      }
    }
  }
}

// Up to a vector of a row, of which `left` numbers are left; zero behind them.
template <class T>
QFLUX_INLINE Vector<T> load_part(const T* from, int64_t left) {
  if (left >= Vector<T>::kWidth) return load(from);
  Vector<T> v(T(0));
  std::memcpy(&v.raw, from, static_cast<size_t>(left) * sizeof(T));
  return v;
}
template <class T>
QFLUX_INLINE void store_part(T* to, Vector<T> v, int64_t left) {
  if (left >= Vector<T>::kWidth) return store(to, v);
  std::memcpy(to, &v.raw, static_cast<size_t>(left) * sizeof(T));
}

template <class T>
void gate(const AttentionParams<T>& p, int64_t first, int64_t last,
          const AttentionResults<T>& results) {
  using V = Vector<T>;
  const int64_t width = p.width(), columns = p.columns();
  for (int64_t row = first; row < last; ++row) {
    const T *const own = p.own_of(row), *const gates = p.projected + row * columns + p.gates_at();
    T* const x = results.gathered + row * width;
    V sum(T(0)), squares(T(0));
    for (int64_t k = 0; k < width; k += V::kWidth) {
      const int64_t left = width - k;
      const V v = load_part(x + k, left) + load_part(own + k, left);
      store_part(x + k, v, left);
      sum = sum + v;
    }
    const T mean = across(sum) / static_cast<T>(width);
    for (int64_t k = 0; k < width; k += V::kWidth) {
      const int64_t left = width - k;
      const V d = where(lanes_between<T>(0, left), load_part(x + k, left) - V(mean));
      squares = multiply_add(d, d, squares);
    }
    const T variance = across(squares) / static_cast<T>(width);
    const T inverse = T(1) / qflux::square_root(variance + static_cast<T>(p.eps));
    for (int64_t k = 0; k < width; k += V::kWidth) {
      const int64_t left = width - k;
      const V normal = (load_part(x + k, left) - V(mean)) * V(inverse);
      const V y = multiply_add(load_part(p.norm_scale + k, left), normal,
                               load_part(p.norm_shift + k, left));
      store_part(results.out + row * width + k, y * silu(load_part(gates + k, left)), left);
    }
    results.moments[2 * row] = mean;
    results.moments[2 * row + 1] = inverse;
  }
}

// Rows whose sums are taken in T from zero: their rounding stays below that of a gradient.
constexpr int64_t kTile = 64;

template <class T>
void gate_back(const AttentionParams<T>& p, int64_t first, int64_t last,
               const AttentionResults<T>& results, const AttentionGradients<T>& grads, T* to,
               int64_t stride, double* sums) {
  using V = Vector<T>;
  const int64_t width = p.width(), columns = p.columns();
  const Array<T> tile(2 * width);
  T *const of_scale = tile.get(), *const of_shift = tile.get() + width;
  for (int64_t row = first; row < last; ++row) {
    const T* const x = results.gathered + row * width;
    const T* const gates = p.projected + row * columns + p.gates_at();
    const T* const grad = grads.out + row * width;
    T* const grad_gates = grads.projected + row * columns + p.gates_at();
    T* const out = to + row * stride;
    const V mean(results.moments[2 * row]), inverse(results.moments[2 * row + 1]);
    V sum(T(0)), with_normal(T(0));
    for (int64_t k = 0; k < width; k += V::kWidth) {
      const int64_t left = width - k;
      const V g = load_part(grad + k, left), gate = load_part(gates + k, left);
      const V normal = (load_part(x + k, left) - mean) * inverse;
      const V scale = load_part(p.norm_scale + k, left);
      const V y = multiply_add(scale, normal, load_part(p.norm_shift + k, left));
      const V s = sigmoid(gate);
      store_part(grad_gates + k, g * y * silu_vjp(gate, s), left);
      const V h = g * gate * s, scaled = scale * h;
      store_part(of_scale + k, multiply_add(h, normal, load_part(of_scale + k, left)), left);
      store_part(of_shift + k, load_part(of_shift + k, left) + h, left);
      store_part(out + k, scaled, left);
      sum = sum + scaled;
      with_normal = multiply_add(scaled, normal, with_normal);
    }
    const V scaled_mean(across(sum) / static_cast<T>(width));
    const V normal_mean(across(with_normal) / static_cast<T>(width));
    for (int64_t k = 0; k < width; k += V::kWidth) {
      const int64_t left = width - k;
      const V normal = (load_part(x + k, left) - mean) * inverse;
      const V grad_x =
          norm_vjp(load_part(out + k, left), normal, inverse, scaled_mean, normal_mean);
      store_part(out + k, grad_x, left);
    }
    if (row + 1 < last && (row + 1 - first) % kTile > 0) continue;
    for (int64_t k = 0; k < 2 * width; ++k) {
      sums[k] += tile[k];
      tile[k] = 0;
    }
  }
}

template <class T>
constexpr AttentionLoops<T> kLoops = {turn<T>,      pack<T>, unpack<T>,
                                      turn_back<T>, gate<T>, gate_back<T>};

}  // namespace attention
}  // namespace
}  // namespace qflux::cpu
