// The CUDA runtime, or its stand-in on the CPU where no CUDA compiler reads this, and launching.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define QFLUX_SHARED(type, name) __shared__ type name
// As many bytes as the launch asked for, from a 16-byte boundary on.
#define QFLUX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "../../emulator/emulator.h"
#endif

#include <cstdint>

#include "traits.h"

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

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;  // dynamic
};

#if defined(__CUDACC__)
// Dynamic shared memory that a block of the current device may ask for.
inline int64_t max_shared_bytes() {
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            device) == cudaSuccess;
  return known ? bytes : 0;
}

// Whether the current device multiplies matrices of bfloat16 (compute capability 8.0).
inline bool has_tensor_cores() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 8;
}

// Beyond 48 KB of static and dynamic shared memory a kernel has to ask first, and the two together
// must fit the device's limit. Always asks for all that fits: a smaller number could undercut a
// launch of another thread.
template <class Kernel>
cudaError_t allow_dynamic_shared(Kernel* kernel, int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  const int64_t fixed = static_cast<int64_t>(attributes.sharedSizeBytes);
  if (error != cudaSuccess || fixed + bytes <= kSharedBytes) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(max_shared_bytes() - fixed));
}

template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
                   const Parameters&... arguments) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks < kMaxBlocks ? grid.blocks : kMaxBlocks));
  cudaError_t error = allow_dynamic_shared(kernel, grid.shared_bytes);
  if (error == cudaSuccess)
    kernel<<<blocks, grid.threads, static_cast<size_t>(grid.shared_bytes),
             static_cast<cudaStream_t>(stream)>>>(arguments...);
  // Also takes an error from the calls before it, which the next launch would otherwise report.
  const cudaError_t latest = cudaGetLastError();
  error = error == cudaSuccess ? latest : error;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
inline int64_t max_shared_bytes() { return emulator::max_shared_bytes(); }
inline bool has_tensor_cores() { return emulator::machine().tensor_cores; }

template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, void* /*stream*/,
                   const Parameters&... arguments) {
  return emulator::run(grid.blocks < emulator::max_blocks() ? grid.blocks : emulator::max_blocks(),
                       grid.threads, grid.shared_bytes, [&] { kernel(arguments...); });
}
#endif

// Enqueues on one stream, in order; what follows the first error is skipped.
class Queue {
 public:
  explicit Queue(void* stream) : stream_(stream) {}

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), const Grid& grid, const Parameters&... arguments) {
    then([&](void* stream) { return cuda::launch(kernel, grid, stream, arguments...); });
  }
  // enqueue(stream) returns its first error, or null.
  template <class Enqueue>
  void then(const Enqueue& enqueue) {
    if (error_ == nullptr) error_ = enqueue(stream_);
  }
  const char* error() const { return error_; }

 private:
  void* stream_;
  const char* error_ = nullptr;
};

}  // namespace qflux::cuda
