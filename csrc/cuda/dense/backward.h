// What the backward tells of itself.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// Numbers of `partials` that its passes need.
int64_t backward_partial_numbers(const PairParams<float>& pair);
int64_t backward_partial_numbers(const PairParams<double>& pair);

}  // namespace qflux::cuda
