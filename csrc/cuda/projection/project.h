// project_norm on a GPU. Free of CUDA and torch headers.
#pragma once

#include "../../projection.h"

namespace qflux::cuda {

// Scratch that the caller allocates.
template <class T>
struct ProjectionScratch {
  T* planes;     // [columns][width]: A by columns
  double* gram;  // [columns][columns]
  // Backward only.
  double* tokens = nullptr;   // [2][tokens]: r and v
  double* partial = nullptr;  // [chunks][sums], or null: no gradients of parameters
  double* totals = nullptr;   // [sums]
};

// Like launch.h: enqueued on `stream`; nullptr, or the text of the first launch error.
const char* project(const ProjectionParams<float>& params, const ProjectionScratch<float>& scratch,
                    float* out, void* stream);
const char* project(const ProjectionParams<double>& params,
                    const ProjectionScratch<double>& scratch, double* out, void* stream);
const char* project_backward(const ProjectionParams<float>& params,
                             const ProjectionScratch<float>& scratch,
                             const ProjectionGradients<float>& grads, void* stream);
const char* project_backward(const ProjectionParams<double>& params,
                             const ProjectionScratch<double>& scratch,
                             const ProjectionGradients<double>& grads, void* stream);

}  // namespace qflux::cuda
