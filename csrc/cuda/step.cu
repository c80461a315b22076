// Heun-Euler steps: the sequence of evolve.h, all of it enqueued on one stream.
#include "../evolve.h"
#include "launch.h"
#include "runtime.cuh"

namespace qflux::cuda {
namespace {

constexpr int kTokenThreads = 256;

template <class Rule>
__global__ void __launch_bounds__(kTokenThreads) apply(Rule rule, int64_t tokens, int64_t rows) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTokenThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x; n < tokens;
       n += stride)
    rule(n / rows, n % rows);
}

// Remembers the first launch error and skips the launches after it.
class Device {
 public:
  explicit Device(void* stream) : stream_(stream) {}

  template <class T>
  void interact(const InteractParams<T>& params) {
    if (error_ == nullptr) error_ = cuda::interact(params, stream_);
  }
  template <class T>
  void interact_backward(const InteractBackwardParams<T>& params) {
    if (error_ == nullptr) error_ = cuda::interact_backward(params, stream_);
  }
  template <class Rule>
  void for_each_token(int64_t batch, int64_t rows, const Rule& rule) {
    const int64_t tokens = batch * rows;
    if (error_ != nullptr || tokens == 0) return;
    const int64_t blocks = (tokens + kTokenThreads - 1) / kTokenThreads;
    error_ = launch(apply<Rule>, blocks, kTokenThreads, stream_, rule, tokens, rows);
  }

  const char* error() const { return error_; }

 private:
  void* stream_;
  const char* error_ = nullptr;
};

template <class T>
const char* run(const EvolveParams<T>& params, void* stream) {
  Device device(stream);
  evolve_forward(device, params);
  return device.error();
}

template <class T>
const char* run(const EvolveBackwardParams<T>& params, void* stream) {
  Device device(stream);
  evolve_backward(device, params);
  return device.error();
}

}  // namespace

const char* evolve(const EvolveParams<float>& params, void* stream) { return run(params, stream); }
const char* evolve(const EvolveParams<double>& params, void* stream) { return run(params, stream); }
const char* evolve_backward(const EvolveBackwardParams<float>& params, void* stream) {
  return run(params, stream);
}
const char* evolve_backward(const EvolveBackwardParams<double>& params, void* stream) {
  return run(params, stream);
}

const char* architectures() { return QFLUX_CUDA_ARCHITECTURES; }

}  // namespace qflux::cuda
