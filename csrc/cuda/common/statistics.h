// Thresholds of all rows, the first kernel of an interaction.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// tau of every row of `params` that sees a key, and zero for the others, into `out`; returns like
// the functions of launch.h.
const char* thresholds(const PairParams<float>& params, const View<float>& out, void* stream);
const char* thresholds(const PairParams<double>& params, const View<double>& out, void* stream);

}  // namespace qflux::cuda
