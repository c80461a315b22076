// Every visible pair, forward: each row gathers its context, strength and degree over its keys.
#include "../common/launch.h"
#include "../common/statistics.h"
#include "../sweep/sweep.h"
#include "forward.cuh"

namespace qflux::cuda {
namespace {

template <class Pass>
const char* launch_forward(const typename Pass::Params& params, void* stream) {
  return launch_gather<Pass>(params, params.pair.causal, stream);
}

template <class T>
const char* run(const InteractParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.pair;
  if (pair.batch == 0 || pair.rows == 0) return nullptr;
  if (pair.score == Score::kInverseGate)
    return pair.values ? launch_forward<Forward<T, GatePair, true, true>>(params, stream)
                       : launch_forward<Forward<T, GatePair, false, true>>(params, stream);
  if (const char* error = thresholds(pair, params.threshold, stream)) return error;
  if (pair.score == Score::kExcess)
    return pair.values ? launch_forward<Forward<T, ExcessPair, true, true>>(params, stream)
                       : launch_forward<Forward<T, ExcessPair, false, true>>(params, stream);
  if (pair.values) return launch_forward<Forward<T, ThresholdPair, true, true>>(params, stream);
  return params.strength || params.degree
             ? launch_forward<Forward<T, ThresholdPair, false, true>>(params, stream)
             : launch_forward<Forward<T, ThresholdPair, false, false>>(params, stream);
}

}  // namespace

const char* interact(const InteractParams<float>& params, void* stream, void* scratch) {
  return scratch ? interact_by(kSweepBase, params, scratch, stream) : run(params, stream);
}
const char* interact(const InteractParams<double>& params, void* stream, void* scratch) {
  return scratch ? interact_by(kSweepBase, params, scratch, stream) : run(params, stream);
}

}  // namespace qflux::cuda
