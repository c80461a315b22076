// Wide values on tensor cores: the forward, and the row pass of the backward.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// Whether these pairs are theirs.
bool takes_products(const PairParams<float>& pair);

// From the thresholds that the rows have already, where the score has any.
const char* interact_products(const InteractParams<float>& params, void* stream);
// Numbers of `partials` that it needs.
int64_t product_partial_numbers(const PairParams<float>& pair);

const char* row_products(const InteractBackwardParams<float>& params, void* stream);
int64_t row_product_partial_numbers(const InteractBackwardParams<float>& params);

}  // namespace qflux::cuda
