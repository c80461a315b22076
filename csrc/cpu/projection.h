// project_norm on the CPU, on torch's thread pool.
#pragma once

#include "../projection.h"

namespace qflux::cpu {

template <class T>
void project(const ProjectionParams<T>& params, T* out);
template <class T>
void project_backward(const ProjectionParams<T>& params, const ProjectionGradients<T>& grads);

}  // namespace qflux::cpu
