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

// The same number, unknown to the compiler. Without it the addresses of all owners of a thread are
// computed ahead of the loops and take the registers that the loops need.
#if defined(__CUDACC__)
__device__ __forceinline__ int opaque(int n) {
  asm volatile("" : "+r"(n));
  return n;
}
__device__ __forceinline__ int64_t opaque(int64_t n) {
  asm volatile("" : "+l"(n));
  return n;
}
#else
inline int opaque(int n) { return n; }
inline int64_t opaque(int64_t n) { return n; }
#endif

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
