// The forward of wide values on tensor cores.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// Whether the forward of these pairs is theirs.
bool takes_products(const PairParams<float>& pair);

// From the thresholds that the rows have already, where the score has any.
const char* interact_products(const InteractParams<float>& params, void* stream);
// Numbers of `partials` that it needs.
int64_t product_partial_numbers(const PairParams<float>& pair);

}  // namespace qflux::cuda
