// The passes of project_norm over tokens.
#pragma once

#include "../../math/sums.h"
#include "../../projection.h"

namespace qflux::cpu {

// The matrix as the loops want it: columns of scale * A, and the shift, padded to whole vectors.
template <class T>
struct ProjectionPlanes {
  const T* columns;    // [columns][stride]
  const T* shift;      // [stride]
  const double* gram;  // [columns][columns]
  int64_t stride;
};

template <class T>
struct ProjectionLoops {
  void (*forward)(const ProjectionParams<T>&, const ProjectionPlanes<T>&, int64_t first,
                  int64_t last, T* out);
  // Writes the features' gradients unless null, and adds to the `sums()` sums unless null.
  void (*backward)(const ProjectionParams<T>&, const ProjectionPlanes<T>&, int64_t first,
                   int64_t last, T* grad_features, CompensatedSum<double>* sums);
};

}  // namespace qflux::cpu
