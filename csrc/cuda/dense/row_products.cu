// Launches of the row pass over wide values.
#include "products.h"
#include "row_products.cuh"

namespace qflux::cuda {
namespace {

template <class Score, int kColumns>
using Products = RowPass<float, Score, kColumns>;

}  // namespace

int64_t row_product_partial_numbers(const InteractBackwardParams<float>& params) {
  return visit_products<Products>(params.pair, [&](auto* pass) {
    return partial_numbers<std::remove_pointer_t<decltype(pass)>>(params);
  });
}

const char* row_products(const InteractBackwardParams<float>& params, void* stream) {
  return visit_products<Products>(params.pair, [&](auto* pass) {
    using Pass = std::remove_pointer_t<decltype(pass)>;
    return launch_gather<Pass, true, RowProductKernels<Pass>>(params, params.pair.causal, stream);
  });
}

}  // namespace qflux::cuda
