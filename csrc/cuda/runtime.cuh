// The CUDA runtime, or its stand-in on the CPU where no CUDA compiler reads this, and launching.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define QFLUX_SHARED(type, name) __shared__ type name
#else
#include "../emulator/emulator.h"
#endif

#include <cstdint>

namespace qflux::cuda {

constexpr int64_t kMaxBlocks = 2147483647;  // of grid.x; kernels loop over the work beyond

#if defined(__CUDACC__)
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                   const Parameters&... arguments) {
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* /*stream*/,
                   const Parameters&... arguments) {
  return emulator::run(blocks < emulator::max_blocks() ? blocks : emulator::max_blocks(), threads,
                       [&] { kernel(arguments...); });
}
#endif

}  // namespace qflux::cuda
