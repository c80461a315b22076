// Thresholds by mass of all rows, the first kernel of an interaction whose score has them.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// tau of every row into `threshold`, zero for those that see nothing, and into the pair's row plane
// what tau lost when it was rounded; returns like the functions of launch.h.
const char* mass_thresholds(const InteractParams<float>& params, void* stream);
const char* mass_thresholds(const InteractParams<double>& params, void* stream);

}  // namespace qflux::cuda
