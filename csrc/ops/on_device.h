// From a tensor to the precision and the device that serve it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cpu/device.h"
#include "checks.h"

// Absent from a CPU-only torch, where no CUDA tensor can reach it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace qflux {

#if defined(QFLUX_CUDA)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Calls body(T()) with T the dtype in which the states compute.
template <class Body>
void with_dtype(const Tensor& states, const Body& body) {
  if (compute_dtype(states) == ScalarType::Float)
    body(float());
  else
    body(double());
}

inline void raise_if(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "qflux_kernels: CUDA: ", error);
}

inline void* current_stream(const Tensor& states) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "qflux_kernels: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(states.get_device_index(), &stream));
  return stream;
}

// Runs on_cpu(device) or on_cuda(stream), as the states demand. A build without CUDA code never
// instantiates `on_cuda`, which has to be a generic lambda for that.
template <class OnCpu, class OnCuda>
void on_device(const Tensor& states, const OnCpu& on_cpu, const OnCuda& on_cuda) {
  if (!states.is_cuda()) {
    cpu::Device device;
    return on_cpu(device);
  }
  if constexpr (kHasCuda) {
    const torch::stable::accelerator::DeviceGuard guard(states.get_device_index());
    on_cuda(current_stream(states));
  } else {
    STD_TORCH_CHECK(false, "qflux_kernels: this build has no CUDA code");
  }
}

}  // namespace qflux
