// The hard threshold by sweep: sub-quadratic, the same kept pairs as met one by one.
//
// Keys near a row, in its own base block, are met by the dense kernels. The keys before it divide
// into dyadic rectangles of rows and keys, one level after the other, in which math/sweep.h says
// for whole blocks of rows which keys they keep for certain; moments stand for these, and what is
// left is met pair by pair. Without a causal mask all pairs are one rectangle.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// Rows and keys in front of which the dense kernels are as fast. Not measured on a GPU yet.
constexpr int64_t kSweepBase = 1024;

// The functions of launch.h with base blocks of `base` keys, a power of two; zero bytes for what
// has no sweep.
template <class T>
int64_t sweep_bytes_by(int64_t base, const PairParams<T>& pair, bool backward);
template <class T>
const char* interact_by(int64_t base, const InteractParams<T>& params, void* scratch, void* stream);
template <class T>
const char* interact_backward_by(int64_t base, const InteractBackwardParams<T>& params,
                                 void* scratch, void* stream);

}  // namespace qflux::cuda
