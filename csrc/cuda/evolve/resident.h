// Whole stacks of steps in one launch, by blocks that each hold one sequence.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// Whether a sequence of these fits a block of the current device: its length, and its score, whose
// limit must not be by mass, for that takes steps of its own, and backward must have no gradient,
// for that needs sums over the block's rows and keys.
template <class T>
bool fits_block(const EvolveParams<T>& params);
template <class T>
bool fits_block(const EvolveBackwardParams<T>& params);

// evolve and evolve_backward of launch.h, for what fits. Either reads the tape of any path.
const char* evolve_resident(const EvolveParams<float>& params, void* stream);
const char* evolve_resident(const EvolveParams<double>& params, void* stream);
const char* evolve_resident(const EvolveBackwardParams<float>& params, void* stream);
const char* evolve_resident(const EvolveBackwardParams<double>& params, void* stream);

}  // namespace qflux::cuda
