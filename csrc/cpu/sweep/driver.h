// An affine score of one long sequence in about O(S log S): see math/sweep.h for the geometry.
#pragma once

#include "../isa/dispatch.h"

namespace qflux::cpu {

// Sums of each row before the reduction, zero on entry.
struct SweptRows {
  double* context;   // [rows][value_dim]
  double* strength;  // [rows]
  int32_t* degree;   // [rows]
  int64_t* work;     // as in InteractParams
};
// Gradients, zero on entry. A null pointer leaves its part out; rows and keys are independent.
struct SweptGradients {
  double* query;   // [rows][2]
  double* key;     // [keys][2]: with values that are the keys, as keys and as values
  double* values;  // [keys][value_dim]
  double* limit;   // [rows], with `query`: of the thresholds, scores with kLimitVjp only
};

// Both return false, having written nothing, where the geometry does not pay (short sequences) or
// does not apply: states, values or gradients that are not finite or too large to square.
template <class T>
bool sweep_forward(const Loops<T>&, const Sequence<T>&, const SweptRows&);
template <class T>
bool sweep_backward(const Loops<T>&, const Sequence<T>&, const SweptGradients&);

}  // namespace qflux::cpu
