// What the attention of a language model's layer hands to its kernels: all that happens between the
// linear map in front of it and the one behind it.
//
// A token's projections are a query and a key of each cylinder, values, gates and own values, which
// may also be given apart, or be the values themselves. Queries and keys are turned by the token's
// position; with the weights of a sparsemax each cylinder gathers values, to which the own ones are
// added; LayerNorm follows, and the gates.
#pragma once

#include "math/scalar.h"
#include "params.h"

namespace qflux {

template <class T>
struct AttentionParams {
  int64_t batch, tokens, cylinders, value_dim;
  bool projects_own;  // whether own values are among the projections
  Algorithm algorithm;
  double eps;  // of LayerNorm
  const T*
      projected;   // [batch][tokens][columns()]: (query, key)(cylinder)(x, y), values, gates, own
  const T* own;    // [batch][tokens][width()]: own values, or null: they are in `projected`
  const T* turns;  // [cylinders][tokens][2]: cosine and sine
  const T* scale;  // [cylinders]
  const T* norm_scale;  // [width()], or null: one
  const T* norm_shift;  // [width()], or null: zero

  QFLUX_INLINE int64_t width() const { return cylinders * value_dim; }
  QFLUX_INLINE int64_t rows() const { return batch * tokens; }
  QFLUX_INLINE int64_t values_at() const { return 4 * cylinders; }
  QFLUX_INLINE int64_t gates_at() const { return values_at() + width(); }
  QFLUX_INLINE int64_t own_at() const { return projects_own ? gates_at() + width() : values_at(); }
  QFLUX_INLINE int64_t columns() const { return gates_at() + (projects_own ? 2 : 1) * width(); }
  QFLUX_INLINE bool shares_values() const { return !projects_own && !own; }
  QFLUX_INLINE const T* own_of(int64_t row) const {
    return own ? own + row * width() : projected + row * columns() + own_at();
  }
  // Numbers [batch][tokens][width()].
  template <class U>
  View<U> of_cylinders(U* data) const {
    return {data, tokens * width(), value_dim, width(), 1};
  }
  // Numbers [batch][cylinders][tokens][count].
  template <class U>
  View<U> packed(U* data, int64_t count) const {
    return {data, cylinders * tokens * count, tokens * count, count, 1};
  }
  // Numbers [batch][cylinders][tokens].
  template <class U>
  View<U> of_rows(U* data) const {
    return {data, cylinders * tokens, tokens, 1, 0};
  }
  QFLUX_INLINE int64_t points_size() const { return rows() * cylinders * 2; }
};

// What a forward leaves for the backward, and its output.
template <class T>
struct AttentionResults {
  T* out;        // [batch][tokens][width]
  T* points;     // [query, key][batch][cylinders][tokens][2], turned
  T* threshold;  // [batch][cylinders][tokens]
  T* gathered;   // [batch][tokens][width], with own values
  T* moments;    // [batch][tokens][2]: mean and inverse deviation of `gathered`
};

template <class T>
struct AttentionGradients {
  const T* out;   // [batch][tokens][width], given
  T* projected;   // as in the params
  T* own;         // as in the params
  T* angle;       // [cylinders][tokens]
  T* scale;       // [cylinders]
  T* norm_scale;  // [width]
  T* norm_shift;  // [width]
};

}  // namespace qflux
