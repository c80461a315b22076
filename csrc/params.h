// Plain structs that cross from the ops into the kernels: pointers, strides, sizes, options.
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/kept.h"
#include "math/score.h"
#include "math/step.h"
#include "math/storage.h"
#include "math/visibility.h"

namespace qflux {

// How the pairs of an affine score are met: as measured to be faster, one by one, or by sweep. In
// the order of `ALGORITHMS` in qflux_kernels/options.py.
enum class Algorithm : int64_t { kAuto = 0, kDense = 1, kSweep = 2 };
constexpr const char* kAlgorithmNames = "auto,dense,sweep";
constexpr int64_t kAlgorithms = 3;

// A sequence of a batch: any number of batch dimensions arrive as two.
struct BatchIndex {
  int64_t outer, inner;
};

// A tensor [batch][token][component] of any layout. Offsets are 64-bit throughout.
template <class T>
struct View {
  T* data = nullptr;
  int64_t outer = 0, inner = 0, token = 0, component = 0;  // strides in elements
  // Of points, values, contexts, strengths and their gradients. Half precision is at `data` in the
  // place of floats, and load and store alone may be used then.
  Storage storage = Storage::kSame;

  QFLUX_INLINE int64_t offset(BatchIndex b, int64_t i, int64_t c) const {
    return b.outer * outer + b.inner * inner + i * token + c * component;
  }
  QFLUX_INLINE T* sequence(BatchIndex b) const { return data + b.outer * outer + b.inner * inner; }
  QFLUX_INLINE T& at(BatchIndex b, int64_t i, int64_t c = 0) const {
    return sequence(b)[i * token + c * component];
  }
  using Number = std::remove_const_t<T>;
  QFLUX_INLINE Number load(BatchIndex b, int64_t i, int64_t c = 0) const {
    if constexpr (std::is_same_v<Number, float>) {
      if (storage != Storage::kSame)
        return widen(reinterpret_cast<const uint16_t*>(data)[offset(b, i, c)], storage);
    }
    return at(b, i, c);
  }
  QFLUX_INLINE void store(BatchIndex b, int64_t i, int64_t c, Number number) const {
    if constexpr (std::is_same_v<Number, float>) {
      if (storage != Storage::kSame) {
        reinterpret_cast<uint16_t*>(data)[offset(b, i, c)] = narrow(number, storage);
        return;
      }
    }
    at(b, i, c) = number;
  }
  QFLUX_INLINE explicit operator bool() const { return data != nullptr; }
};

template <class T>
QFLUX_INLINE View<const T> as_const(const View<T>& view) {
  return {view.data, view.outer, view.inner, view.token, view.component, view.storage};
}

template <class T>
QFLUX_INLINE Point<T> load_point(const View<const T>& view, BatchIndex b, int64_t i) {
  return {view.load(b, i, 0), view.load(b, i, 1)};
}

template <class T>
QFLUX_INLINE void store_point(const View<T>& view, BatchIndex b, int64_t i, Point<T> p) {
  view.store(b, i, 0, p.x);
  view.store(b, i, 1, p.y);
}

template <class T>
QFLUX_INLINE void add_point(const View<T>& view, BatchIndex b, int64_t i, Point<T> p) {
  view.at(b, i, 0) += p.x;
  view.at(b, i, 1) += p.y;
}

// One number for all sequences, or one for each.
template <class T>
struct PerSequence {
  const T* data = nullptr;  // [batch]
  T value = 0;
  int64_t outer = 0, inner = 0;  // strides

  QFLUX_INLINE T operator[](BatchIndex b) const {
    return data ? data[b.outer * outer + b.inner * inner] : value;
  }
  QFLUX_INLINE explicit operator bool() const { return data != nullptr; }
};

template <class T>
struct PairParams {
  int64_t outer, inner, rows, keys;  // outer x inner sequences
  int64_t value_dim;                 // columns of the values
  ScoreKind score;
  double eps;
  // Whether the statistics of a thresholded row are over all keys of its sequence, or over those
  // that it sees.
  bool whole_window;
  bool causal, mean;
  Algorithm algorithm;
  PerSequence<T> coefficient;    // sigma or alpha
  PerSequence<T> min_gate;       // of the inverse gate
  PerSequence<int64_t> lengths;  // without data: full sequences
  View<const T> states;          // [batch][rows][2]
  View<const T> key_points;      // [batch][keys][2]
  View<const T> values;          // [batch][keys][value_dim]; null: the keys, value_dim 2
  // [batch][rows], scratch of a score with kMass on a GPU: what tau lost by rounding in a forward,
  // and the gradient that the key pass takes for that of the strength in a backward.
  T* row_scratch = nullptr;
  // Scratch of partial_bytes() (cuda/common/launch.h), so that a GPU may divide the sources of a
  // pass among blocks. Null: it does not.
  T* partials = nullptr;

  QFLUX_INLINE int64_t batch() const { return outer * inner; }
  QFLUX_INLINE BatchIndex index(int64_t n) const { return {n / inner, n % inner}; }
  QFLUX_INLINE int64_t flat(BatchIndex b) const { return b.outer * inner + b.inner; }
  // Planes [plane][batch][rows], one of `size` numbers after the other.
  template <class U>
  QFLUX_INLINE View<U> plane(U* data, int64_t which) const {
    const int64_t size = batch() * rows;
    return {data + which * size, inner * rows, rows, 1, size};
  }
  QFLUX_INLINE View<T> row_plane() const { return plane(row_scratch, 0); }

  QFLUX_INLINE Visibility visibility(BatchIndex b) const {
    int64_t length = lengths ? lengths[b] : keys;
    length = length < 0 ? 0 : length > keys ? keys : length;
    return {lengths ? length : rows, length, keys - rows, causal};
  }
  // The factor of reduction="mean", by the number of keys a row sees.
  QFLUX_INLINE T reduction_scale(int64_t visible) const {
    return mean && visible > 0 ? T(1) / T(visible) : T(1);
  }
};

// Moments of the keys that a row keeps: their number, and the sums of x and of y.
constexpr int64_t kKeptMoments = 3;

template <class T>
struct InteractParams {
  PairParams<T> pair;
  View<T> context;       // [batch][rows][value_dim]
  View<T> strength;      // [batch][rows]
  View<int32_t> degree;  // [batch][rows]; null: not wanted
  View<T> threshold;     // [batch][rows]: the limit, for the backward; zero
                         // for a score that is not thresholded
  // For the backward, on a GPU; null: not wanted. [batch][rows][kKeptMoments] of a score with kMass
  // over values of their own, [batch][rows][kKeptSums] of one that has these where values are the
  // keys.
  View<T> moments;
  // Counts of pairs that a sweep met one by one, added to: [0] densely, [1] in bands. Null: none.
  int64_t* work = nullptr;
};

template <class T>
struct InteractBackwardParams {
  PairParams<T> pair;
  View<const T> grad_context;   // [batch][rows][value_dim]
  View<const T> grad_strength;  // [batch][rows]; null: zero
  View<const T> threshold;      // as the forward left it
  // The same; null where it left none, for which a row pass over keys as values has to meet pairs.
  View<const T> moments;
  // What to compute. Each is written unless `accumulate`, which adds to grad_states. When keys are
  // the states, grad_keys is grad_states and the key pass adds to what the row pass left there.
  View<T> grad_states;  // [batch][rows][2]; null: no row pass
  View<T> grad_keys;    // [batch][keys][2]; null: no key pass
  View<T> grad_values;  // [batch][keys][value_dim]; null when values are the keys
  // [batch][rows], added to: what each row adds to the gradient of the coefficient through its
  // query; null: not wanted.
  View<T> grad_coefficient;
  // [batch][rows]: of the limit, by the row pass; null unless the score has kLimitVjp.
  View<T> grad_threshold;
  bool accumulate = false;
  bool keys_are_states = false;
};

// Numbers that a row passes to the keys of its window: the gradients of the five sums of `Moments`.
constexpr int64_t kWindowSums = 5;

// The gradient of tau on its way to what it was computed from. All outputs are added to, in an
// order that depends on the sizes alone.
template <class T>
struct ThresholdBackwardParams {
  PairParams<T> pair;
  View<const T> grad_threshold;  // [batch][rows]
  View<T> grad_states;           // [batch][rows][2]
  View<T> grad_keys;             // [batch][keys][2]; may be grad_states
  View<T> grad_coefficient;      // [batch][rows]; null: not wanted
  double* window_grads;          // scratch [batch][rows][kWindowSums]
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
  // With what rows keep for the backward, the KeptSums of both stages.
  kTapeKept = 11,
  kTapeMiddleKept = kTapeKept + kKeptSums,
  kTapeKeptPlanes = kTapeMiddleKept + kKeptSums,
};

// dt or skip: one number, or [steps or 1][batch][length].
template <class T>
struct PerToken {
  const T* data = nullptr;
  T value = 0;
  bool per_step = false;                              // whether the first dimension is `steps`
  int64_t step = 0, outer = 0, inner = 0, token = 0;  // strides

  QFLUX_INLINE T at(int64_t s, BatchIndex b, int64_t i) const {
    return data ? data[s * step + b.outer * outer + b.inner * inner + i * token] : value;
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
  // [steps or 1][planes][batch][length]: one step's worth is scratch when nothing is saved.
  T* tape;
  bool save;
  int64_t planes = kTapePlanes;  // or kTapeKeptPlanes

  QFLUX_INLINE bool keeps_sums() const { return planes == kTapeKeptPlanes; }
  QFLUX_INLINE View<T> plane(int64_t step, int64_t which) const {
    return pair.plane(tape, (save ? step : 0) * planes + which);
  }
};

template <class T>
struct EvolveBackwardParams {
  EvolveParams<T> forward;      // its tape is read; out, strength and degree are unused
  View<const T> grad_out;       // [batch][rows][2]
  View<const T> grad_strength;  // [batch][rows]
  View<T> grad_states;          // [batch][rows][2]
  T* grad_dt = nullptr;         // [steps or 1][batch][length] like dt, added to; or null
  T* grad_skip = nullptr;       // the same like skip
  View<T> grad_coefficient;     // [batch][rows], added to; or null
  T* scratch;                   // [kScratchPlanes][batch][length]
  double* window_grads;         // as in ThresholdBackwardParams, for scores with kLimitVjp

  QFLUX_INLINE T& token_grad(T* grads, const PerToken<T>& of, int64_t step, BatchIndex b,
                             int64_t i) const {
    const auto& pair = forward.pair;
    const int64_t first = of.per_step ? step * pair.batch() : 0;
    return grads[(first + pair.flat(b)) * pair.rows + i];
  }
};

}  // namespace qflux
