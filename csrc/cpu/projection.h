// project_norm on the CPU: the calls of the ops, and the loops compiled once per instruction set.
#pragma once

#include "../math/sums.h"
#include "../projection.h"

namespace qflux::cpu {

template <class T>
void project(const ProjectionParams<T>& params, T* out);
template <class T>
void project_backward(const ProjectionParams<T>& params, const ProjectionGradients<T>& grads);

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

struct ProjectionSet {
  ProjectionLoops<float> single;
  ProjectionLoops<double> twice;
};

extern const ProjectionSet kProjectionBaseline;
#if defined(QFLUX_X86)
extern const ProjectionSet kProjectionAvx2;
extern const ProjectionSet kProjectionAvx512;
#endif

}  // namespace qflux::cpu
