// Every visible pair, backward: a pass over rows, then one over keys.
#include "../common/launch.h"
#include "../sweep/sweep.h"
#include "backward.cuh"
#include "backward.h"
#include "products.h"

namespace qflux::cuda {
namespace {

constexpr int kRowThreads = 256;

template <class T, class Score>
__global__ void __launch_bounds__(kRowThreads) rows_from_kept(InteractBackwardParams<T> params) {
  const PairParams<T>& pair = params.pair;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
       n < pair.batch() * pair.rows; n += static_cast<int64_t>(gridDim.x) * kRowThreads)
    row_from_kept<T, Score>(params, pair.index(n / pair.rows), static_cast<int>(n % pair.rows));
}

template <class T, class Score, int kValues>
const char* launch_rows(const InteractBackwardParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.pair;
  if constexpr (kHasKeptSums<Score> && kValues == 0) {
    if (params.moments) {
      if (const char* error = check_lengths(pair, 0)) return error;
      const int64_t blocks = (pair.batch() * pair.rows + kRowThreads - 1) / kRowThreads;
      return launch(rows_from_kept<T, Score>, {blocks, kRowThreads}, stream, params);
    }
  }
  if constexpr (std::is_same_v<T, float> && kValues > kNarrow)
    if (takes_products(pair)) return row_products(params, stream);
  return launch_gather<RowPass<T, Score, kValues>>(params, pair.causal, stream);
}

template <class T, class Score, int kValues>
int64_t row_partial_numbers(const InteractBackwardParams<T>& params) {
  if constexpr (std::is_same_v<T, float> && kValues > kNarrow)
    if (takes_products(params.pair)) return row_product_partial_numbers(params);
  return partial_numbers<RowPass<T, Score, kValues>>(params);
}

template <class T, class Score, int kValues>
const char* launch_passes(const InteractBackwardParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.pair;
  const bool key_pass = (params.grad_keys || params.grad_values) && pair.keys > 0;
  // The key pass of a mass starts from what its row pass found.
  const bool row_pass = (params.grad_states || params.grad_coefficient || params.grad_threshold ||
                         (Score::kMass && key_pass)) &&
                        pair.rows > 0;
  if (Score::kMass && kValues > 0 && row_pass && !params.moments)
    return "the backward of weights that sum to one needs the moments that the forward left";
  const char* error = nullptr;
  if (row_pass) error = launch_rows<T, Score, kValues>(params, stream);
  if (key_pass && error == nullptr)
    error = launch_gather<KeyPass<T, Score, kValues>>(params, false, stream);
  return error;
}

template <class T, class Score, int kValues>
int64_t partial_numbers_of(const InteractBackwardParams<T>& params) {
  const int64_t rows = row_partial_numbers<T, Score, kValues>(params);
  const int64_t keys = partial_numbers<KeyPass<T, Score, kValues>>(params);
  return rows < keys ? keys : rows;
}

template <class T>
int64_t partial_numbers_of(const PairParams<T>& pair) {
  InteractBackwardParams<T> params{};
  params.pair = pair;
  return visit_score(pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<T>;
    if (!pair.values) return partial_numbers_of<T, Score, 0>(params);
    return pair.value_dim <= kNarrow ? partial_numbers_of<T, Score, kNarrow>(params)
                                     : partial_numbers_of<T, Score, kWide<T>>(params);
  });
}

template <class T>
const char* run(const InteractBackwardParams<T>& params, void* stream) {
  if (params.pair.batch() == 0) return nullptr;
  return visit_score(params.pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<T>;
    if (!params.pair.values) return launch_passes<T, Score, 0>(params, stream);
    return visit_values(params.pair, [&](auto values) {
      return launch_passes<T, Score, decltype(values)::kColumns>(params, stream);
    });
  });
}

}  // namespace

int64_t backward_partial_numbers(const PairParams<float>& pair) { return partial_numbers_of(pair); }
int64_t backward_partial_numbers(const PairParams<double>& pair) {
  return partial_numbers_of(pair);
}

const char* interact_backward(const InteractBackwardParams<float>& params, void* stream,
                              void* scratch) {
  return scratch ? interact_backward_by(kSweepBase, params, scratch, stream) : run(params, stream);
}
const char* interact_backward(const InteractBackwardParams<double>& params, void* stream,
                              void* scratch) {
  return scratch ? interact_backward_by(kSweepBase, params, scratch, stream) : run(params, stream);
}

}  // namespace qflux::cuda
