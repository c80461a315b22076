// Launches of the forward of wide values.
#include "products.cuh"
#include "products.h"

namespace qflux::cuda {
namespace {

template <class Score, int kColumns>
using Products = Forward<float, Score, kColumns, true>;

}  // namespace

bool takes_products(const PairParams<float>& pair) {
  return kTensorCores && pair.values && pair.value_dim >= kTensorColumns && has_tensor_cores();
}

int64_t product_partial_numbers(const PairParams<float>& pair) {
  InteractParams<float> params{};
  params.pair = pair;
  return visit_products<Products>(pair, [&](auto* pass) {
    return partial_numbers<std::remove_pointer_t<decltype(pass)>>(params);
  });
}

const char* interact_products(const InteractParams<float>& params, void* stream) {
  return visit_products<Products>(params.pair, [&](auto* pass) {
    using Pass = std::remove_pointer_t<decltype(pass)>;
    return launch_gather<Pass, true, ProductKernels<Pass>>(params, params.pair.causal, stream);
  });
}

}  // namespace qflux::cuda
