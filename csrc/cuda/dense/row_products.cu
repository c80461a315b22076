// Launches of the row pass over wide values.
#include "products.h"
#include "row_products.cuh"

namespace qflux::cuda {
namespace {

// Calls visit(pass) with a null pointer to the pass of the pairs.
template <class Visit>
auto visit_pass(const PairParams<float>& pair, const Visit& visit) {
  return visit_score(pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<float>;
    using Narrow = RowPass<float, Score, kTensorColumns>;
    using Wide = RowPass<float, Score, kTensorWide>;
    return pair.value_dim <= kTensorColumns ? visit(static_cast<Narrow*>(nullptr))
                                            : visit(static_cast<Wide*>(nullptr));
  });
}

}  // namespace

int64_t row_product_partial_numbers(const InteractBackwardParams<float>& params) {
  return visit_pass(params.pair, [&](auto* pass) {
    return partial_numbers<std::remove_pointer_t<decltype(pass)>>(params);
  });
}

const char* row_products(const InteractBackwardParams<float>& params, void* stream) {
  return visit_pass(params.pair, [&](auto* pass) {
    using Pass = std::remove_pointer_t<decltype(pass)>;
    return launch_gather<Pass, true, RowProductKernels<Pass>>(params, params.pair.causal, stream);
  });
}

}  // namespace qflux::cuda
