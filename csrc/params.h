// Plain structs that cross from the ops into the kernels: pointers, strides, sizes, options.
#pragma once

#include <cstdint>

#include "math/step.h"

namespace qflux {

enum class Score : int64_t { kThreshold = 0, kInverseGate = 1, kExcess = 2 };
QFLUX_INLINE bool has_threshold(Score score) { return score != Score::kInverseGate; }

// How the pairs of the threshold score are met: as measured to be faster, one by one, or by sweep.
enum class Algorithm : int64_t { kAuto = 0, kDense = 1, kSweep = 2 };

// A tensor [batch][token][component] of any layout. Offsets are 64-bit throughout.
template <class T>
struct View {
  T* data = nullptr;
  int64_t batch = 0, token = 0, component = 0;  // strides in elements

  QFLUX_INLINE T& at(int64_t b, int64_t i, int64_t c = 0) const {
    return data[b * batch + i * token + c * component];
  }
  QFLUX_INLINE explicit operator bool() const { return data != nullptr; }
};

template <class T>
QFLUX_INLINE Point<T> load_point(const View<const T>& view, int64_t b, int64_t i) {
  return {view.at(b, i, 0), view.at(b, i, 1)};
}

template <class T>
QFLUX_INLINE void store_point(const View<T>& view, int64_t b, int64_t i, Point<T> p) {
  view.at(b, i, 0) = p.x;
  view.at(b, i, 1) = p.y;
}

// One number for all sequences, or one for each.
template <class T>
struct PerSequence {
  const T* data = nullptr;  // [batch]
  T value = 0;

  QFLUX_INLINE T operator[](int64_t b) const { return data ? data[b] : value; }
};

// Who sees whom: row i of a sequence sees keys 0 .. visible_keys(i) - 1, and key j is seen by rows
// first_row(j) .. row_end - 1.
struct Visibility {
  int64_t row_end, key_end, shift;  // valid rows and keys of the sequence; keys - rows
  bool causal;

  QFLUX_INLINE int64_t visible_keys(int64_t row) const {
    if (row >= row_end) return 0;
    const int64_t limit = row + shift + 1;
    return !causal || limit > key_end ? key_end : limit < 0 ? 0 : limit;
  }
  QFLUX_INLINE int64_t first_row(int64_t key) const {
    const int64_t first = key - shift;
    return !causal || first < 0 ? 0 : first;
  }
};

template <class T>
struct PairParams {
  int64_t batch, rows, keys, depth;  // depth: columns of the values
  Score score;
  double eps;
  bool row_window, causal, mean;
  Algorithm algorithm;
  PerSequence<T> coefficient;  // sigma or alpha
  PerSequence<T> min_gate;
  const int64_t* lengths = nullptr;  // [batch], or null for full sequences
  View<const T> states;              // [batch][rows][2]
  View<const T> key_points;          // [batch][keys][2]
  View<const T> values;              // [batch][keys][depth]; null: the keys, depth 2

  QFLUX_INLINE Visibility visibility(int64_t b) const {
    int64_t length = lengths ? lengths[b] : keys;
    length = length < 0 ? 0 : length > keys ? keys : length;
    return {lengths ? length : rows, length, keys - rows, causal};
  }
  // The factor of reduction="mean", by the number of keys a row sees.
  QFLUX_INLINE T reduction_scale(int64_t visible) const {
    return mean && visible > 0 ? T(1) / T(visible) : T(1);
  }
};

template <class T>
struct InteractParams {
  PairParams<T> pair;
  View<T> context;       // [batch][rows][depth]
  View<T> strength;      // [batch][rows]
  View<int32_t> degree;  // [batch][rows]; null: not wanted
  View<T> threshold;     // [batch][rows]: tau, for the backward; zero for the inverse gate
  // Counts of pairs that a sweep met one by one, added to: [0] densely, [1] in bands. Null: none.
  int64_t* work = nullptr;
};

template <class T>
struct InteractBackwardParams {
  PairParams<T> pair;
  View<const T> grad_context;   // [batch][rows][depth]
  View<const T> grad_strength;  // [batch][rows]; null: zero
  View<const T> threshold;      // as the forward left it
  // What to compute. Each is written unless `accumulate`, which adds to grad_states. When keys are
  // the states, grad_keys is grad_states and the key pass adds to what the row pass left there.
  View<T> grad_states;  // [batch][rows][2]; null: no row pass
  View<T> grad_keys;    // [batch][keys][2]; null: no key pass
  View<T> grad_values;  // [batch][keys][depth]; null when values are the keys
  // [batch][rows] share of each row in the gradient of alpha; null: not wanted.
  View<T> grad_alpha;
  View<T> grad_threshold;  // [batch][rows]: of tau, by the row pass; kExcess only, else null
  bool accumulate = false;
  bool keys_are_states = false;
};

// The gradient of tau on its way to what it was computed from.
template <class T>
struct ThresholdBackwardParams {
  PairParams<T> pair;
  View<const T> grad_threshold;  // [batch][rows]
  View<T> grad_states;           // [batch][rows][2], zero on entry
  View<T> grad_keys;             // [batch][keys][2], zero on entry; may be grad_states
  T* grad_sigma;                 // [batch]
};

// What a step leaves on the tape for each token, as planes [steps][plane][batch][length].
enum TapePlane : int64_t {
  kTapeState = 0,          // x, y
  kTapeMiddle = 2,         // x + k1
  kTapeContext = 4,        // context(x)
  kTapeMiddleContext = 6,  // context(x + k1)
  kTapeStrength = 8,
  kTapeThreshold = 9,
  kTapeMiddleThreshold = 10,
  kTapePlanes = 11,
};

// dt or skip: one number, or [steps or 1][batch][length].
template <class T>
struct PerToken {
  const T* data = nullptr;
  T value = 0;
  int64_t step = 0, batch = 0;  // strides

  QFLUX_INLINE T at(int64_t s, int64_t b, int64_t i) const {
    return data ? data[s * step + b * batch + i] : value;
  }
};

template <class T>
struct EvolveParams {
  PairParams<T> pair;  // rows == keys, no values; its states are the first step's
  int64_t steps;
  RadiusRule<T> radius;
  PerToken<T> dt, skip;
  View<T> out;           // [batch][rows][2]
  View<T> strength;      // [batch][rows]
  View<int32_t> degree;  // [batch][rows]
  // [steps or 1][kTapePlanes][batch][length]: one step's worth is scratch when nothing is saved.
  T* tape;
  bool save;

  QFLUX_INLINE View<T> plane(int64_t step, int64_t which) const {
    const int64_t size = pair.batch * pair.rows;
    return {tape + ((save ? step : 0) * kTapePlanes + which) * size, pair.rows, 1, size};
  }
};

template <class T>
struct EvolveBackwardParams {
  EvolveParams<T> forward;      // its tape is read; out, strength and degree are unused
  View<const T> grad_out;       // [batch][rows][2]
  View<const T> grad_strength;  // [batch][rows]
  View<T> grad_states;          // [batch][rows][2]
  T* grad_dt = nullptr;         // like dt, or null
  T* grad_skip = nullptr;       // like skip, or null
  View<T> grad_alpha;           // [batch][rows], or null
  T* scratch;                   // [kScratchPlanes][batch][length]
};

template <class T>
QFLUX_INLINE View<const T> as_const(const View<T>& view) {
  return {view.data, view.batch, view.token, view.component};
}

}  // namespace qflux
