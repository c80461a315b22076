// Sparsemax of one long sequence below O(S^2): see tree.h and docs/subquadratic.md.
#pragma once

#include "../isa/dispatch.h"

namespace qflux::cpu {

// Results of each row, zero on entry.
template <class T>
struct MassRows {
  double* context;  // [rows][value_dim]
  int32_t* degree;  // [rows]
  T* tau;           // [rows]
  int64_t* work;    // as in InteractParams
};
// Gradients, zero on entry. A null pointer leaves its part out.
struct MassGradients {
  double* query;   // [rows][2]
  double* key;     // [keys][2]: with values that are the keys, as keys and as values
  double* values;  // [keys][value_dim], with `key`
};

// Both return false, and what they wrote is void, where the geometry does not pay (short sequences,
// thresholds on which many pairs stand) or does not apply: states, values or gradients that are not
// finite or very large.
template <class T>
bool tree_forward(const Loops<T>&, const Sequence<T>&, const MassRows<T>&);
template <class T>
bool tree_backward(const Loops<T>&, const Sequence<T>&, const MassGradients&);

}  // namespace qflux::cpu
