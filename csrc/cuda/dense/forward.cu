// Every visible pair, forward: each row gathers its context, strength and degree over its keys.
#include "../common/launch.h"
#include "../common/mass.h"
#include "../common/statistics.h"
#include "../sweep/sweep.h"
#include "backward.h"
#include "forward.cuh"
#include "products.h"

namespace qflux::cuda {
namespace {

template <class Pass>
const char* launch_forward(const typename Pass::Params& params, void* stream) {
  return launch_gather<Pass>(params, params.pair.causal, stream);
}

template <class T>
int64_t partial_numbers_of(const PairParams<T>& pair) {
  if constexpr (std::is_same_v<T, float>)
    if (takes_products(pair)) return product_partial_numbers(pair);
  InteractParams<T> params{};
  params.pair = pair;
  return visit_score(pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<T>;
    if (!pair.values)
      return partial_numbers<Forward<T, Score, 0, true, kHasKeptSums<Score>>>(params);
    return pair.value_dim <= kNarrow ? partial_numbers<Forward<T, Score, kNarrow, true>>(params)
                                     : partial_numbers<Forward<T, Score, kWide<T>, true>>(params);
  });
}

template <class T>
int64_t bytes_of(const PairParams<T>& pair, bool backward) {
  if (pair.batch() == 0 || check_lengths(pair, pair.value_dim)) return 0;
  return static_cast<int64_t>(sizeof(T)) *
         (backward ? backward_partial_numbers(pair) : partial_numbers_of(pair));
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
  if constexpr (std::is_same_v<T, float>)
    if (takes_products(pair)) return interact_products(params, stream);
  return visit_score(pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<T>;
    if (pair.values)
      return visit_values(pair, [&](auto values) {
        return launch_forward<Forward<T, Score, decltype(values)::kColumns, true>>(params, stream);
      });
    if constexpr (kHasKeptSums<Score>) {
      if (params.moments)
        return params.strength || params.degree
                   ? launch_forward<Forward<T, Score, 0, true, true>>(params, stream)
                   : launch_forward<Forward<T, Score, 0, false, true>>(params, stream);
    }
    // A gate's division outweighs the row sums, which then are not worth a kernel without them.
    constexpr bool kAlwaysRowSums = !Score::kThresholded;
    return kAlwaysRowSums || params.strength || params.degree
               ? launch_forward<Forward<T, Score, 0, true>>(params, stream)
               : launch_forward<Forward<T, Score, 0, kAlwaysRowSums>>(params, stream);
  });
}

}  // namespace

int64_t partial_bytes(const PairParams<float>& pair, bool backward) {
  return bytes_of(pair, backward);
}
int64_t partial_bytes(const PairParams<double>& pair, bool backward) {
  return bytes_of(pair, backward);
}

const char* interact(const InteractParams<float>& params, void* stream, void* scratch) {
  return scratch ? interact_by(kSweepBase, params, scratch, stream) : run(params, stream);
}
const char* interact(const InteractParams<double>& params, void* stream, void* scratch) {
  return scratch ? interact_by(kSweepBase, params, scratch, stream) : run(params, stream);
}

}  // namespace qflux::cuda
