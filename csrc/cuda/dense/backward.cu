// Every visible pair, backward: a pass over rows, then one over keys.
#include "../common/launch.h"
#include "../sweep/sweep.h"
#include "backward.cuh"

namespace qflux::cuda {
namespace {

template <class T, template <class> class Kind, bool kOwnValues>
const char* launch_passes(const InteractBackwardParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.pair;
  const bool row_pass = (params.grad_states || params.grad_alpha) && pair.rows > 0;
  const bool key_pass = (params.grad_keys || params.grad_values) && pair.keys > 0;
  const char* error = nullptr;
  if (row_pass) error = launch_gather<RowPass<T, Kind, kOwnValues>>(params, pair.causal, stream);
  if (key_pass && error == nullptr)
    error = launch_gather<KeyPass<T, Kind, kOwnValues>>(params, false, stream);
  return error;
}

template <class T>
const char* run(const InteractBackwardParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.pair;
  if (pair.batch == 0) return nullptr;
  if (pair.score == Score::kInverseGate)
    return pair.values ? launch_passes<T, GatePair, true>(params, stream)
                       : launch_passes<T, GatePair, false>(params, stream);
  if (pair.score == Score::kExcess)
    return pair.values ? launch_passes<T, ExcessPair, true>(params, stream)
                       : launch_passes<T, ExcessPair, false>(params, stream);
  return pair.values ? launch_passes<T, ThresholdPair, true>(params, stream)
                     : launch_passes<T, ThresholdPair, false>(params, stream);
}

}  // namespace

const char* interact_backward(const InteractBackwardParams<float>& params, void* stream,
                              void* scratch) {
  return scratch ? interact_backward_by(kSweepBase, params, scratch, stream) : run(params, stream);
}
const char* interact_backward(const InteractBackwardParams<double>& params, void* stream,
                              void* scratch) {
  return scratch ? interact_backward_by(kSweepBase, params, scratch, stream) : run(params, stream);
}

}  // namespace qflux::cuda
