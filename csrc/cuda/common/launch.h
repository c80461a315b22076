// What the ops call. Free of CUDA and torch headers, so that a build without a toolkit can read it.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

// Each enqueues its kernels on `stream` (a cudaStream_t) and returns nullptr, or the text of the
// first launch error. None allocates, synchronises or leaves the current device, so all of them
// may run under CUDA-graph capture.
//
// With scratch, of sweep_bytes() from a 256-byte boundary on, the pairs of the hard threshold are
// met by sweep (sweep.h); without, one by one.
const char* interact(const InteractParams<float>& params, void* stream, void* scratch = nullptr);
const char* interact(const InteractParams<double>& params, void* stream, void* scratch = nullptr);
const char* interact_backward(const InteractBackwardParams<float>& params, void* stream,
                              void* scratch = nullptr);
const char* interact_backward(const InteractBackwardParams<double>& params, void* stream,
                              void* scratch = nullptr);
// Two kernels whose sums have a fixed order; `window_grads` of the params is theirs.
const char* threshold_backward(const ThresholdBackwardParams<float>& params, void* stream);
const char* threshold_backward(const ThresholdBackwardParams<double>& params, void* stream);
const char* evolve(const EvolveParams<float>& params, void* stream, void* scratch = nullptr);
const char* evolve(const EvolveParams<double>& params, void* stream, void* scratch = nullptr);
const char* evolve_backward(const EvolveBackwardParams<float>& params, void* stream,
                            void* scratch = nullptr);
const char* evolve_backward(const EvolveBackwardParams<double>& params, void* stream,
                            void* scratch = nullptr);

// Bytes of `partials` in the params of a forward or a backward that meets the pairs one by one; 0
// where no pass divides its sources.
int64_t partial_bytes(const PairParams<float>& pair, bool backward);
int64_t partial_bytes(const PairParams<double>& pair, bool backward);

// The same for all stages of an evolution; 0 where the dense kernels do everything.
int64_t sweep_bytes(const PairParams<float>& pair, bool backward);
int64_t sweep_bytes(const PairParams<double>& pair, bool backward);

// Space-separated, as the build passed them in QFLUX_CUDA_ARCHITECTURES.
const char* architectures();

}  // namespace qflux::cuda
