// The gradients of states, keys and sigma that come from one of the threshold.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pair.h"

namespace qflux {
namespace {
namespace ops {

std::tuple<Tensor, Tensor, Tensor> threshold_backward(
    Tensor grad_threshold, Tensor states, OptionalTensor keys, OptionalTensor coefficient,
    double coefficient_value, OptionalTensor lengths, double eps, bool whole_window, bool causal) {
  PairArguments pair{states};
  pair.keys = keys;
  pair.coefficient = coefficient;
  pair.coefficient_value = coefficient_value;
  pair.lengths = lengths;
  pair.score = static_cast<int64_t>(ScoreKind::kSoftThreshold);
  pair.eps = eps;
  pair.whole_window = whole_window;
  pair.causal = causal;
  Batch batch = pair.check();
  check_argument("grad_threshold", grad_threshold, batch.shape({pair.rows()}), states);
  batch.include(grad_threshold);
  batch.settle();

  const Tensor grad_states = wide_zeros_like(states);
  const Tensor grad_keys = keys ? wide_zeros_like(*keys) : nothing(states);
  const Tensor coefficient_parts = pair.coefficient_parts(batch);
  if (pair.any_pairs()) {
    const Tensor window_grads = pair.window_grads(batch);
    with_dtype(states, [&](auto zero) {
      using T = decltype(zero);
      ThresholdBackwardParams<T> params{};
      params.pair = pair.params<T>(batch);
      params.grad_threshold = batch.const_view<T>(grad_threshold);
      params.grad_states = batch.view<T>(grad_states);
      params.grad_keys = batch.view<T>(keys ? grad_keys : grad_states);
      if (coefficient) params.grad_coefficient = batch.view<T>(coefficient_parts);
      params.window_grads = pointer<double>(window_grads);
      on_device(
          states, [&](cpu::Device& device) { device.threshold_backward(params); },
          [&](auto stream) { raise_if(cuda::threshold_backward(params, stream)); });
    });
  }
  return {grad_states, grad_keys, pair.coefficient_gradient(coefficient_parts)};
}

}  // namespace ops
}  // namespace
}  // namespace qflux

#define QFLUX_IMPLEMENT(m) m.impl("threshold_backward", TORCH_BOX(&qflux::ops::threshold_backward))

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) { QFLUX_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CUDA, m) { QFLUX_IMPLEMENT(m); }
#undef QFLUX_IMPLEMENT
