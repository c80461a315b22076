// The pair loops over one staged sequence.
#pragma once

#include "../../params.h"

namespace qflux::cpu {

// Planes are padded to this many elements, a whole group of owners on every instruction set.
constexpr int64_t kPadding = 32;
// Rows (or keys, in the key pass) that one thread owns at a time.
constexpr int64_t kBlock = 64;
// One sequence in the layouts the loops want: a plane for each component, zero-padded, for the side
// that owns, and a record for each token where many columns are broadcast.
template <class T>
struct Sequence {
  Visibility visibility;
  int64_t value_dim;  // columns of the values; the fast path (values == nullptr) has 2
  ScoreKind score;
  T eps, min_gate;
  bool whole_window;
  const T *query_x, *query_y;     // [row_stride]
  const T* limit;                 // [row_stride]: zero for a score that is not thresholded
  const T* limit_rest = nullptr;  // [row_stride]: forward of scores with kMass only
  const T *key_x, *key_y;         // [key_stride]
  const T* values = nullptr;      // [keys][value_stride] records of `value_dim`; null: the keys
  int64_t value_stride;
  // Backward only.
  const T* grad = nullptr;           // [value_dim][row_stride]: of the context, reduction applied
  const T* grad_strength = nullptr;  // [row_stride]
  const T* grad_records = nullptr;   // [rows][value_dim]: the same as grad; general path only
  const T* value_planes = nullptr;   // [value_dim][key_stride]; general path only
  int64_t row_stride, key_stride;
};

// Results of a block, as sums before the reduction, in owner order.
template <class T>
struct ForwardBlock {
  T* context;       // [kBlock][value_dim]
  T* strength;      // [kBlock]
  int32_t* degree;  // [kBlock], or null
  // The sequence's own, which scores with kMass fill.
  T *limit = nullptr, *limit_rest = nullptr;
};
template <class T>
struct BackwardBlock {
  T* point;   // [kBlock][2]: gradient of the query, or of the key
  T* values;  // [kBlock][value_dim]: gradient of the values; key pass of the general path only
  // [kBlock], row pass only: the gradient of the limit with kLimitVjp, and with kMass what the key
  // pass takes for the gradient of the strength.
  T* limit = nullptr;
};

template <class T>
struct DenseLoops {
  // Owners first .. last - 1, at most kBlock of them, all inside the sequence.
  void (*forward)(const Sequence<T>&, int64_t first, int64_t last, const ForwardBlock<T>&);
  void (*backward_rows)(const Sequence<T>&, int64_t first, int64_t last, const BackwardBlock<T>&);
  void (*backward_keys)(const Sequence<T>&, int64_t first, int64_t last, const BackwardBlock<T>&);
};

}  // namespace qflux::cpu
