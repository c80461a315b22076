// Heun-Euler steps: the sequence of evolve.h, all of it enqueued on one stream or, for many short
// sequences, inside one launch.
#include "../../evolve.h"
#include "../common/launch.h"
#include "../common/runtime.cuh"
#include "../common/traits.h"
#include "../sweep/sweep.h"
#include "resident.h"
#include "step.h"

namespace qflux::cuda {
namespace {

constexpr int kTokenThreads = 256;

template <class Rule>
__global__ void __launch_bounds__(kTokenThreads)
    apply(Rule rule, int64_t tokens, int64_t rows, int64_t inner) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTokenThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x; n < tokens;
       n += stride) {
    const int64_t sequence = n / rows, outer = sequence / inner;
    rule(BatchIndex{outer, sequence - outer * inner}, n - sequence * rows);
  }
}

class Device {
 public:
  Device(void* stream, SweepScratch scratch) : queue_(stream), scratch_(scratch) {}

  template <class T>
  void interact(const InteractParams<T>& params) {
    queue_.then([&](void* stream) {
      return scratch_.memory ? interact_by(scratch_.base, params, scratch_.memory, stream)
                             : cuda::interact(params, stream);
    });
  }
  template <class T>
  void interact_backward(const InteractBackwardParams<T>& params) {
    queue_.then([&](void* stream) {
      return scratch_.memory ? interact_backward_by(scratch_.base, params, scratch_.memory, stream)
                             : cuda::interact_backward(params, stream);
    });
  }
  template <class T>
  void threshold_backward(const ThresholdBackwardParams<T>& params) {
    queue_.then([&](void* stream) { return cuda::threshold_backward(params, stream); });
  }
  template <class T, class Rule>
  void for_each_token(const PairParams<T>& pair, const Rule& rule) {
    const int64_t tokens = pair.batch() * pair.rows;
    if (tokens == 0) return;
    const int64_t blocks = (tokens + kTokenThreads - 1) / kTokenThreads;
    queue_.launch(apply<Rule>, {blocks, kTokenThreads}, rule, tokens, pair.rows, pair.inner);
  }

  const char* error() const { return queue_.error(); }

 private:
  Queue queue_;
  SweepScratch scratch_;
};

template <class T>
void enqueue(Device& device, const EvolveParams<T>& params) {
  evolve_forward(device, params);
}
template <class T>
void enqueue(Device& device, const EvolveBackwardParams<T>& params) {
  evolve_backward(device, params);
}

template <class T>
const PairParams<T>& pair_of(const EvolveParams<T>& params) {
  return params.pair;
}
template <class T>
const PairParams<T>& pair_of(const EvolveBackwardParams<T>& params) {
  return params.forward.pair;
}

template <class Params>
const char* run(const Params& params, void* stream, Launches launches, SweepScratch scratch) {
  const auto& pair = pair_of(params);
  if (scratch.memory) launches = Launches::kMany;
  if (launches == Launches::kAuto) {
    const bool short_and_many = pair.rows <= kResidentLength && pair.batch() >= kResidentBatch;
    launches = short_and_many && fits_block(params) ? Launches::kOne : Launches::kMany;
  }
  if (launches == Launches::kOne) return evolve_resident(params, stream);
  Device device(stream, scratch);
  enqueue(device, params);
  return device.error();
}

}  // namespace

const char* evolve_by(Launches launches, const EvolveParams<float>& params, void* stream,
                      SweepScratch scratch) {
  return run(params, stream, launches, scratch);
}
const char* evolve_by(Launches launches, const EvolveParams<double>& params, void* stream,
                      SweepScratch scratch) {
  return run(params, stream, launches, scratch);
}
const char* evolve_by(Launches launches, const EvolveBackwardParams<float>& params, void* stream,
                      SweepScratch scratch) {
  return run(params, stream, launches, scratch);
}
const char* evolve_by(Launches launches, const EvolveBackwardParams<double>& params, void* stream,
                      SweepScratch scratch) {
  return run(params, stream, launches, scratch);
}

const char* evolve(const EvolveParams<float>& params, void* stream, void* scratch) {
  return run(params, stream, Launches::kAuto, {scratch, kSweepBase});
}
const char* evolve(const EvolveParams<double>& params, void* stream, void* scratch) {
  return run(params, stream, Launches::kAuto, {scratch, kSweepBase});
}
const char* evolve_backward(const EvolveBackwardParams<float>& params, void* stream,
                            void* scratch) {
  return run(params, stream, Launches::kAuto, {scratch, kSweepBase});
}
const char* evolve_backward(const EvolveBackwardParams<double>& params, void* stream,
                            void* scratch) {
  return run(params, stream, Launches::kAuto, {scratch, kSweepBase});
}

const char* architectures() { return QFLUX_CUDA_ARCHITECTURES; }

}  // namespace qflux::cuda
