// Launches of the forward of wide values.
#include "products.cuh"
#include "products.h"

namespace qflux::cuda {
namespace {

// Calls visit(pass) with a null pointer to the pass of the pairs.
template <class Visit>
auto visit_pass(const PairParams<float>& pair, const Visit& visit) {
  return visit_score(pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<float>;
    using Narrow = Forward<float, Score, kTensorColumns, true>;
    using Wide = Forward<float, Score, kTensorWide, true>;
    return pair.value_dim <= kTensorColumns ? visit(static_cast<Narrow*>(nullptr))
                                            : visit(static_cast<Wide*>(nullptr));
  });
}

}  // namespace

bool takes_products(const PairParams<float>& pair) {
  return kTensorCores && pair.values && pair.value_dim >= kTensorColumns && has_tensor_cores();
}

int64_t product_partial_numbers(const PairParams<float>& pair) {
  InteractParams<float> params{};
  params.pair = pair;
  return visit_pass(pair, [&](auto* pass) {
    return partial_numbers<std::remove_pointer_t<decltype(pass)>>(params);
  });
}

const char* interact_products(const InteractParams<float>& params, void* stream) {
  return visit_pass(params.pair, [&](auto* pass) {
    using Pass = std::remove_pointer_t<decltype(pass)>;
    return launch_gather<Pass, true, ProductKernels<Pass>>(params, params.pair.causal, stream);
  });
}

}  // namespace qflux::cuda
