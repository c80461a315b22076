// interact and its backward.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pair.h"

namespace qflux {
namespace {
namespace ops {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> interact(
    Tensor states, OptionalTensor keys, OptionalTensor values, OptionalTensor coefficient,
    double coefficient_value, OptionalTensor min_gate, double min_gate_value,
    OptionalTensor lengths, int64_t score, double eps, bool whole_window, bool causal, bool mean,
    int64_t algorithm, bool save) {
  PairArguments pair{states,       keys,           values,  coefficient, coefficient_value,
                     min_gate,     min_gate_value, lengths, score,       eps,
                     whole_window, causal,         mean,    algorithm};
  Batch batch = pair.check();
  batch.settle();
  const bool pairs = pair.any_pairs();
  const auto output = [&](const Shape& shape, ScalarType dtype) {
    return pairs ? empty(states, shape, dtype) : torch::stable::new_zeros(states, shape, dtype);
  };
  const ScalarType dtype = states.scalar_type(), wide = compute_dtype(states);
  const Shape rows = batch.shape({pair.rows()});
  const Tensor context = output(batch.shape({pair.rows(), pair.value_dim()}), dtype);
  const Tensor strength = output(rows, dtype), degree = output(rows, ScalarType::Int);
  const Tensor threshold = output(rows, wide);
  const int64_t left = pair.moments(save);
  const Tensor moments =
      left > 0 ? output(batch.shape({pair.rows(), left}), wide) : nothing(states);
  if (!pairs) return {context, strength, degree, threshold, moments};
  const Tensor row_scratch = pair.row_scratch(batch);
  with_dtype(states, [&](auto zero) {
    using T = decltype(zero);
    InteractParams<T> params{};
    params.pair = pair.params<T>(batch);
    params.pair.row_scratch = pointer<T>(row_scratch);
    params.context = batch.view<T>(context);
    params.strength = batch.view<T>(strength);
    params.degree = batch.view<int32_t>(degree);
    params.threshold = batch.view<T>(threshold);
    if (left > 0) params.moments = batch.view<T>(moments);
    on_device(
        states, [&](cpu::Device& device) { device.interact(params); },
        [&](auto stream) {
          const PairScratch scratch(states, params.pair, false);
          raise_if(cuda::interact(params, stream, scratch.get()));
        });
  });
  return {context, strength, degree, threshold, moments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> interact_backward(
    Tensor grad_context, Tensor grad_strength, Tensor threshold, OptionalTensor moments,
    Tensor states, OptionalTensor keys, OptionalTensor values, OptionalTensor coefficient,
    double coefficient_value, OptionalTensor min_gate, double min_gate_value,
    OptionalTensor lengths, int64_t score, double eps, bool whole_window, bool causal, bool mean,
    int64_t algorithm, bool need_rows, bool need_keys) {
  PairArguments pair{states,       keys,           values,  coefficient, coefficient_value,
                     min_gate,     min_gate_value, lengths, score,       eps,
                     whole_window, causal,         mean,    algorithm};
  Batch batch = pair.check();
  const Shape rows = batch.shape({pair.rows()});
  check_argument("grad_context", grad_context, batch.shape({pair.rows(), pair.value_dim()}), states,
                 Holds::kStored);
  check_argument("grad_strength", grad_strength, rows, states, Holds::kStored);
  check_argument("threshold", threshold, rows, states);
  for (Tensor* tensor : {&grad_context, &grad_strength, &threshold}) batch.include(*tensor);
  if (moments)
    check_argument("moments", *moments,
                   batch.shape({pair.rows(), values ? kKeptMoments : kKeptSums}), states);
  batch.include(moments);
  batch.settle();

  const bool pairs = pair.any_pairs(), limit_vjp = has_limit_vjp(pair.kind());
  // Zero where no kernel writes. What several add to is not rounded to half precision in between.
  const ScalarType stored = states.scalar_type(), wide = compute_dtype(states);
  const ScalarType of_points = keys && !limit_vjp ? stored : wide;
  const auto output = [&](const Shape& shape, bool written, ScalarType dtype) {
    return pairs && written ? empty(states, shape, dtype) : zeros(states, shape, dtype);
  };
  const Tensor grad_states = output(shape_of(states), need_rows, of_points);
  const Tensor grad_keys = keys ? output(shape_of(*keys), need_keys, of_points) : nothing(states);
  const Tensor grad_values =
      values ? output(shape_of(*values), need_keys, stored) : nothing(states);
  const Tensor coefficient_parts = pair.coefficient_parts(batch);
  const Tensor grad_threshold = limit_vjp ? output(rows, need_rows, wide) : nothing(states);
  if (pairs) {
    const Tensor row_scratch = pair.row_scratch(batch);
    with_dtype(states, [&](auto zero) {
      using T = decltype(zero);
      InteractBackwardParams<T> params{};
      params.pair = pair.params<T>(batch);
      params.pair.row_scratch = pointer<T>(row_scratch);
      params.grad_context = batch.const_view<T>(grad_context);
      params.grad_strength = batch.const_view<T>(grad_strength);
      params.threshold = batch.const_view<T>(threshold);
      if (moments) params.moments = batch.const_view<T>(*moments);
      if (need_rows) {
        params.grad_states = batch.view<T>(grad_states);
        if (coefficient) params.grad_coefficient = batch.view<T>(coefficient_parts);
        if (limit_vjp) params.grad_threshold = batch.view<T>(grad_threshold);
      }
      if (need_keys) {
        params.keys_are_states = !keys;
        params.grad_keys = batch.view<T>(keys ? grad_keys : grad_states);
        if (values) params.grad_values = batch.view<T>(grad_values);
      }
      on_device(
          states, [&](cpu::Device& device) { device.interact_backward(params); },
          [&](auto stream) {
            const PairScratch scratch(states, params.pair, true);
            raise_if(cuda::interact_backward(params, stream, scratch.get()));
          });
    });
  }
  return {grad_states, grad_keys, grad_values, pair.coefficient_gradient(coefficient_parts),
          grad_threshold};
}

// How many pairs a sweep meets one by one: [densely, in bands].
Tensor sweep_work(Tensor states, OptionalTensor keys, double sigma, double eps, bool whole_window,
                  bool causal) {
  PairArguments pair{states};
  pair.keys = keys;
  pair.coefficient_value = sigma;
  pair.eps = eps;
  pair.whole_window = whole_window;
  pair.causal = causal;
  pair.algorithm = static_cast<int64_t>(Algorithm::kSweep);
  Batch batch = pair.check();
  batch.settle();
  const Tensor work = torch::stable::new_zeros(states, Shape{2}, ScalarType::Long);
  if (!pair.any_pairs()) return work;
  with_dtype(states, [&](auto zero) {
    using T = decltype(zero);
    const Tensor context = empty(states, batch.shape({pair.rows(), 2}));
    const Tensor threshold = empty(states, batch.shape({pair.rows()}));
    InteractParams<T> params{};
    params.pair = pair.params<T>(batch);
    params.context = batch.view<T>(context);
    params.threshold = batch.view<T>(threshold);
    params.work = pointer<int64_t>(work);
    cpu::Device().interact(params);
  });
  return work;
}

}  // namespace ops
}  // namespace
}  // namespace qflux

#define QFLUX_IMPLEMENT(m)                              \
  m.impl("interact", TORCH_BOX(&qflux::ops::interact)); \
  m.impl("interact_backward", TORCH_BOX(&qflux::ops::interact_backward))

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) {
  QFLUX_IMPLEMENT(m);
  m.impl("sweep_work", TORCH_BOX(&qflux::ops::sweep_work));
}
STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CUDA, m) { QFLUX_IMPLEMENT(m); }
#undef QFLUX_IMPLEMENT
