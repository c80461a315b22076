// evolve and its backward.
#include "../evolve.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pair.h"

namespace qflux {
namespace {

// What evolve takes beyond the arguments of a pair, as it stands in its schema.
struct StepArguments {
  OptionalTensor dt;
  double dt_value;
  OptionalTensor skip;
  double skip_value;
  int64_t steps;
  bool has_radius;
  double min, max, rate, reversion, target;

  void check(const Tensor& states, Batch& batch) {
    STD_TORCH_CHECK(steps >= 1, "qflux_kernels: steps must be at least 1, got ", steps);
    check_per_token("dt", dt, states, batch);
    check_per_token("skip", skip, states, batch);
  }

  template <class T>
  EvolveParams<T> params(const PairArguments& pair, const Batch& batch, const Tensor& tape,
                         bool save) const {
    EvolveParams<T> p{};
    p.pair = pair.params<T>(batch);
    p.steps = steps;
    p.radius = {has_radius,           static_cast<T>(min),       static_cast<T>(max),
                static_cast<T>(rate), static_cast<T>(reversion), static_cast<T>(target)};
    p.dt = batch.per_token<T>(dt, dt_value);
    p.skip = batch.per_token<T>(skip, skip_value);
    p.tape = pointer<T>(tape);
    p.save = save;
    p.planes = tape.size(1);
    return p;
  }

 private:
  void check_per_token(const char* name, OptionalTensor& tensor, const Tensor& states,
                       Batch& batch) const {
    if (!tensor) return;
    const int64_t rows = states.size(states.dim() - 2);
    check_argument(name, *tensor, batch.shape({rows}, {-1}), states);
    STD_TORCH_CHECK(tensor->size(0) == 1 || tensor->size(0) == steps, "qflux_kernels: ", name,
                    " must have 1 or steps = ", steps, " rows, got ", tensor->size(0));
    batch.include(tensor, 1);
  }
};

namespace ops {

std::tuple<Tensor, Tensor, Tensor, Tensor> evolve(
    Tensor states, OptionalTensor dt, double dt_value, OptionalTensor skip, double skip_value,
    OptionalTensor coefficient, double coefficient_value, OptionalTensor min_gate,
    double min_gate_value, OptionalTensor lengths, int64_t score, double eps, bool whole_window,
    bool causal, bool mean, int64_t algorithm, int64_t steps, bool has_radius, double radius_min,
    double radius_max, double radius_rate, double radius_reversion, double radius_target,
    bool save) {
  PairArguments pair{states,       std::nullopt,   std::nullopt, coefficient, coefficient_value,
                     min_gate,     min_gate_value, lengths,      score,       eps,
                     whole_window, causal,         mean,         algorithm};
  StepArguments step{dt,          dt_value,         skip,         skip_value,
                     steps,       has_radius,       radius_min,   radius_max,
                     radius_rate, radius_reversion, radius_target};
  Batch batch = pair.check();
  step.check(states, batch);
  batch.settle();
  const int64_t rows = pair.rows();
  const int64_t planes = save && pair.keeps_sums() ? kTapeKeptPlanes : kTapePlanes;
  const auto tape_of = [&](int64_t saved) {
    return empty(states, batch.shape({rows}, {saved, planes}), compute_dtype(states));
  };
  const Tensor out = empty(states, batch.shape({rows, 2}));
  const Tensor strength = empty(states, batch.shape({rows}));
  const Tensor degree = empty(states, batch.shape({rows}), ScalarType::Int);
  const Tensor tape = tape_of(save ? steps : 1);
  if (states.numel() > 0) {
    const Tensor row_scratch = pair.row_scratch(batch);
    with_dtype(states, [&](auto zero) {
      using T = decltype(zero);
      EvolveParams<T> params = step.params<T>(pair, batch, tape, save);
      params.pair.row_scratch = pointer<T>(row_scratch);
      params.out = batch.view<T>(out);
      params.strength = batch.view<T>(strength);
      params.degree = batch.view<int32_t>(degree);
      on_device(
          states, [&](cpu::Device& device) { evolve_forward(device, params); },
          [&](auto stream) {
            const PairScratch scratch(states, params.pair, false);
            raise_if(cuda::evolve(params, stream, scratch.get()));
          });
    });
  }
  return {out, strength, degree, save ? tape : tape_of(0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evolve_backward(
    Tensor grad_states, Tensor grad_strength, Tensor tape, OptionalTensor dt, double dt_value,
    OptionalTensor skip, double skip_value, OptionalTensor coefficient, double coefficient_value,
    OptionalTensor min_gate, double min_gate_value, OptionalTensor lengths, int64_t score,
    double eps, bool whole_window, bool causal, bool mean, int64_t algorithm, int64_t steps,
    bool has_radius, double radius_min, double radius_max, double radius_rate,
    double radius_reversion, double radius_target) {
  PairArguments pair{grad_states,  std::nullopt,   std::nullopt, coefficient, coefficient_value,
                     min_gate,     min_gate_value, lengths,      score,       eps,
                     whole_window, causal,         mean,         algorithm};
  StepArguments step{dt,          dt_value,         skip,         skip_value,
                     steps,       has_radius,       radius_min,   radius_max,
                     radius_rate, radius_reversion, radius_target};
  Batch batch = pair.check();
  step.check(grad_states, batch);
  const int64_t rows = pair.rows();
  check_argument("grad_strength", grad_strength, batch.shape({rows}), grad_states, Holds::kStored);
  const bool keeps_sums = pair.keeps_sums() && tape.dim() > 1 && tape.size(1) == kTapeKeptPlanes;
  check_argument("tape", tape,
                 batch.shape({rows}, {steps, keeps_sums ? kTapeKeptPlanes : kTapePlanes}),
                 grad_states);
  STD_TORCH_CHECK(tape.is_contiguous(), "qflux_kernels: tape must be contiguous");
  batch.include(grad_strength);
  batch.settle();

  const Tensor grad_input = empty(grad_states, batch.shape({rows, 2}));
  const Tensor grad_dt = step.dt ? zeros_like(*step.dt) : nothing(grad_states);
  const Tensor grad_skip = step.skip ? zeros_like(*step.skip) : nothing(grad_states);
  const Tensor coefficient_parts = pair.coefficient_parts(batch);
  if (grad_states.numel() > 0) {
    const Tensor scratch =
        empty(grad_states, batch.shape({rows}, {kScratchPlanes}), compute_dtype(grad_states));
    const Tensor row_scratch = pair.row_scratch(batch);
    const Tensor window_grads =
        has_limit_vjp(pair.kind()) ? pair.window_grads(batch) : nothing(grad_states);
    with_dtype(grad_states, [&](auto zero) {
      using T = decltype(zero);
      EvolveBackwardParams<T> params{};
      params.forward = step.params<T>(pair, batch, tape, true);
      params.forward.pair.row_scratch = pointer<T>(row_scratch);
      params.grad_out = batch.const_view<T>(pair.states);
      params.grad_strength = batch.const_view<T>(grad_strength);
      params.grad_states = batch.view<T>(grad_input);
      if (step.dt) params.grad_dt = pointer<T>(grad_dt);
      if (step.skip) params.grad_skip = pointer<T>(grad_skip);
      if (coefficient) params.grad_coefficient = batch.view<T>(coefficient_parts);
      params.scratch = pointer<T>(scratch);
      params.window_grads = pointer<double>(window_grads);
      on_device(
          grad_states, [&](cpu::Device& device) { qflux::evolve_backward(device, params); },
          [&](auto stream) {
            const PairScratch pairs(grad_states, params.forward.pair, true);
            raise_if(cuda::evolve_backward(params, stream, pairs.get()));
          });
    });
  }
  return {grad_input, grad_dt, grad_skip, pair.coefficient_gradient(coefficient_parts)};
}

}  // namespace ops
}  // namespace
}  // namespace qflux

#define QFLUX_IMPLEMENT(m)                          \
  m.impl("evolve", TORCH_BOX(&qflux::ops::evolve)); \
  m.impl("evolve_backward", TORCH_BOX(&qflux::ops::evolve_backward))

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) { QFLUX_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CUDA, m) { QFLUX_IMPLEMENT(m); }
#undef QFLUX_IMPLEMENT
