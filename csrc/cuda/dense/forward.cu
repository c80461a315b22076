// Every visible pair, forward: each row gathers its context, strength and degree over its keys.
#include "../common/launch.h"
#include "../common/mass.h"
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
  if (pair.batch() == 0 || pair.rows == 0) return nullptr;
  const char* error = nullptr;
  if (has_mass(pair.score))
    error = mass_thresholds(params, stream);
  else if (is_thresholded(pair.score))
    error = thresholds(pair, params.threshold, stream);
  if (error) return error;
  return visit_score(pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<T>;
    if (pair.values)
      return visit_values(pair, [&](auto values) {
        return launch_forward<Forward<T, Score, decltype(values)::kColumns, true>>(params, stream);
      });
    // A gate's division outweighs the row sums, which then are not worth a kernel without them.
    constexpr bool kAlwaysRowSums = !Score::kThresholded;
    return kAlwaysRowSums || params.strength || params.degree
               ? launch_forward<Forward<T, Score, 0, true>>(params, stream)
               : launch_forward<Forward<T, Score, 0, kAlwaysRowSums>>(params, stream);
  });
}

}  // namespace

const char* interact(const InteractParams<float>& params, void* stream, void* scratch) {
  return scratch ? interact_by(kSweepBase, params, scratch, stream) : run(params, stream);
}
const char* interact(const InteractParams<double>& params, void* stream, void* scratch) {
  return scratch ? interact_by(kSweepBase, params, scratch, stream) : run(params, stream);
}

}  // namespace qflux::cuda
