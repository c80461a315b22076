// The dispatcher ops: schemas, and the way from tensors to params to a device.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "evolve.h"
#include "ops/checks.h"
#include "ops/on_device.h"
#if defined(QFLUX_CUDA)
#include "cuda/common/launch.h"
#endif

namespace qflux {
namespace {

using torch::headeronly::ScalarType;

template <class T>
View<T> view(const Tensor& tensor) {
  View<T> v;
  v.data = static_cast<T*>(tensor.data_ptr());
  v.batch = tensor.stride(0);
  v.token = tensor.stride(1);
  v.component = tensor.dim() > 2 ? tensor.stride(2) : 0;
  return v;
}

template <class T>
View<const T> const_view(const Tensor& tensor) {
  return as_const(view<T>(tensor));
}

template <class T>
PerSequence<T> per_sequence(const OptionalTensor& tensor, double value) {
  return {tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr, static_cast<T>(value)};
}

template <class T>
PerToken<T> per_token(const OptionalTensor& tensor, double value) {
  if (!tensor) return {nullptr, static_cast<T>(value), 0, 0};
  return {static_cast<const T*>(tensor->data_ptr()), T(0),
          tensor->size(0) > 1 ? tensor->stride(0) : 0, tensor->stride(1)};
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(*tensor);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, std::vector<int64_t>(shape), dtype);
}

Tensor zeros_like(const Tensor& like) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < like.dim(); ++d) shape.push_back(like.size(d));
  return torch::stable::new_zeros(like, shape);
}

Tensor nothing(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

#if defined(QFLUX_CUDA)
// What a sweep needs, or nothing: no crossover is measured on a GPU yet, so kAuto is dense there.
template <class T>
OptionalTensor sweep_scratch(const Tensor& states, const PairParams<T>& pair, bool backward) {
  if (pair.algorithm != Algorithm::kSweep || pair.score != Score::kThreshold) return std::nullopt;
  return empty(states, {cuda::sweep_bytes(pair, backward)}, ScalarType::Byte);
}
void* memory_of(const OptionalTensor& scratch) { return scratch ? scratch->data_ptr() : nullptr; }
#endif

// What interact and evolve share, as it stands in their schemas.
struct PairArguments {
  OptionalTensor coefficient;
  double coefficient_value;
  OptionalTensor min_gate;
  double min_gate_value;
  OptionalTensor lengths;
  int64_t score;
  double eps;
  bool row_window, causal, mean;
  int64_t algorithm;

  void check(const Tensor& states) {
    check_per_sequence("coefficient", coefficient, states);
    check_per_sequence("min_gate", min_gate, states);
    check_per_sequence("lengths", lengths, states, true);
    STD_TORCH_CHECK(score >= 0 && score <= 2, "qflux_kernels: score must be 0, 1 or 2, got ",
                    score);
    STD_TORCH_CHECK(algorithm >= 0 && algorithm <= 2,
                    "qflux_kernels: algorithm must be 0, 1 or 2, got ", algorithm);
    coefficient = contiguous(coefficient);
    min_gate = contiguous(min_gate);
    lengths = contiguous(lengths);
  }

  template <class T>
  PairParams<T> params(const Tensor& states, const OptionalTensor& keys,
                       const OptionalTensor& values) const {
    PairParams<T> p{};
    p.batch = states.size(0);
    p.rows = states.size(1);
    p.keys = keys ? keys->size(1) : p.rows;
    p.depth = values ? values->size(2) : 2;
    p.score = static_cast<Score>(score);
    p.eps = eps;
    p.row_window = row_window;
    p.causal = causal;
    p.mean = mean;
    p.algorithm = static_cast<Algorithm>(algorithm);
    p.coefficient = per_sequence<T>(coefficient, coefficient_value);
    p.min_gate = per_sequence<T>(min_gate, min_gate_value);
    p.lengths = lengths ? static_cast<const int64_t*>(lengths->data_ptr()) : nullptr;
    p.states = const_view<T>(states);
    p.key_points = keys ? const_view<T>(*keys) : p.states;
    if (values) p.values = const_view<T>(*values);
    return p;
  }
};

bool any_pairs(const Tensor& states, const OptionalTensor& keys, const OptionalTensor& values) {
  return states.numel() > 0 && (!keys || keys->numel() > 0) && (!values || values->numel() > 0);
}

void check_keys(const Tensor& states, const OptionalTensor& keys, const OptionalTensor& values,
                const OptionalTensor& lengths) {
  check_states(states);
  const int64_t batch = states.size(0);
  const int64_t count = keys ? keys->size(1) : states.size(1);
  if (keys) {
    check_shape("keys", *keys, {batch, -1, 2});
    check_beside("keys", *keys, states);
  }
  if (values) {
    check_shape("values", *values, {batch, count, -1});
    check_beside("values", *values, states);
  }
  STD_TORCH_CHECK(!lengths || count == states.size(1),
                  "qflux_kernels: lengths needs as many keys as states");
}

namespace ops {

std::tuple<Tensor, Tensor, Tensor, Tensor> interact(
    Tensor states, OptionalTensor keys, OptionalTensor values, OptionalTensor coefficient,
    double coefficient_value, OptionalTensor min_gate, double min_gate_value,
    OptionalTensor lengths, int64_t score, double eps, bool row_window, bool causal, bool mean,
    int64_t algorithm) {
  PairArguments pair{coefficient, coefficient_value, min_gate, min_gate_value, lengths,  score,
                     eps,         row_window,        causal,   mean,           algorithm};
  check_keys(states, keys, values, lengths);
  pair.check(states);
  const int64_t batch = states.size(0), rows = states.size(1);
  const ScalarType dtype = states.scalar_type();
  // Kernels never see an empty tensor: its null pointer would read as an argument left out.
  const bool pairs = any_pairs(states, keys, values);
  const auto output = pairs ? empty : zeros;
  const Tensor context = output(states, {batch, rows, values ? values->size(2) : 2}, dtype);
  const Tensor strength = output(states, {batch, rows}, dtype);
  const Tensor degree = output(states, {batch, rows}, ScalarType::Int);
  const Tensor threshold = output(states, {batch, rows}, dtype);
  if (!pairs) return {context, strength, degree, threshold};
  with_dtype(states, [&](auto zero) {
    using T = decltype(zero);
    InteractParams<T> params{};
    params.pair = pair.params<T>(states, keys, values);
    params.context = view<T>(context);
    params.strength = view<T>(strength);
    params.degree = view<int32_t>(degree);
    params.threshold = view<T>(threshold);
    on_device(
        states, [&](cpu::Device& device) { device.interact(params); },
        [&](void* stream) {
#if defined(QFLUX_CUDA)
          const OptionalTensor scratch = sweep_scratch(states, params.pair, false);
          raise_if(cuda::interact(params, stream, memory_of(scratch)));
#else
          (void)stream;
#endif
        });
  });
  return {context, strength, degree, threshold};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> interact_backward(
    Tensor grad_context, Tensor grad_strength, Tensor threshold, Tensor states, OptionalTensor keys,
    OptionalTensor values, OptionalTensor coefficient, double coefficient_value,
    OptionalTensor min_gate, double min_gate_value, OptionalTensor lengths, int64_t score,
    double eps, bool row_window, bool causal, bool mean, int64_t algorithm, bool need_rows,
    bool need_keys) {
  PairArguments pair{coefficient, coefficient_value, min_gate, min_gate_value, lengths,  score,
                     eps,         row_window,        causal,   mean,           algorithm};
  check_keys(states, keys, values, lengths);
  pair.check(states);
  const int64_t batch = states.size(0), rows = states.size(1);
  check_shape("grad_context", grad_context, {batch, rows, values ? values->size(2) : 2});
  check_shape("grad_strength", grad_strength, {batch, rows});
  check_shape("threshold", threshold, {batch, rows});
  check_beside("grad_context", grad_context, states);
  check_beside("grad_strength", grad_strength, states);
  check_beside("threshold", threshold, states);

  const Tensor grad_states = zeros_like(states);
  const Tensor grad_keys = keys ? zeros_like(*keys) : nothing(states);
  const Tensor grad_values = values ? zeros_like(*values) : nothing(states);
  const Tensor grad_alpha =
      coefficient ? zeros(states, {batch, rows}, states.scalar_type()) : nothing(states);
  const bool excess = static_cast<Score>(score) == Score::kExcess;
  const Tensor grad_threshold = excess ? zeros_like(threshold) : nothing(states);
  if (!any_pairs(states, keys, values))
    return {grad_states, grad_keys, grad_values,
            coefficient ? zeros_like(*coefficient) : nothing(states), grad_threshold};
  with_dtype(states, [&](auto zero) {
    using T = decltype(zero);
    InteractBackwardParams<T> params{};
    params.pair = pair.params<T>(states, keys, values);
    params.grad_context = const_view<T>(grad_context);
    params.grad_strength = const_view<T>(grad_strength);
    params.threshold = const_view<T>(threshold);
    if (need_rows) params.grad_states = view<T>(grad_states);
    if (need_rows && coefficient) params.grad_alpha = view<T>(grad_alpha);
    if (need_rows && excess) params.grad_threshold = view<T>(grad_threshold);
    if (need_keys) {
      params.keys_are_states = !keys;
      params.grad_keys = view<T>(keys ? grad_keys : grad_states);
      if (values) params.grad_values = view<T>(grad_values);
    }
    on_device(
        states, [&](cpu::Device& device) { device.interact_backward(params); },
        [&](void* stream) {
#if defined(QFLUX_CUDA)
          const OptionalTensor scratch = sweep_scratch(states, params.pair, true);
          raise_if(cuda::interact_backward(params, stream, memory_of(scratch)));
#else
          (void)stream;
#endif
        });
  });
  const auto summed =
      coefficient ? torch::stable::sum(grad_alpha, std::vector<int64_t>{1}) : nothing(states);
  return {grad_states, grad_keys, grad_values, summed, grad_threshold};
}

// The gradients of states, keys and sigma that come from one of the threshold; CPU only.
std::tuple<Tensor, Tensor, Tensor> threshold_backward(
    Tensor grad_threshold, Tensor states, OptionalTensor keys, OptionalTensor coefficient,
    double coefficient_value, OptionalTensor lengths, double eps, bool row_window, bool causal) {
  PairArguments pair{coefficient, coefficient_value, std::nullopt, 0.0,   lengths, 0,
                     eps,         row_window,        causal,       false, 0};
  check_keys(states, keys, std::nullopt, lengths);
  pair.check(states);
  check_shape("grad_threshold", grad_threshold, {states.size(0), states.size(1)});
  check_beside("grad_threshold", grad_threshold, states);
  const Tensor grad_states = zeros_like(states);
  const Tensor grad_keys = keys ? zeros_like(*keys) : nothing(states);
  const Tensor grad_sigma = zeros(states, {states.size(0)}, states.scalar_type());
  if (!any_pairs(states, keys, std::nullopt)) return {grad_states, grad_keys, grad_sigma};
  with_dtype(states, [&](auto zero) {
    using T = decltype(zero);
    ThresholdBackwardParams<T> params{};
    params.pair = pair.params<T>(states, keys, std::nullopt);
    params.grad_threshold = const_view<T>(grad_threshold);
    params.grad_states = view<T>(grad_states);
    params.grad_keys = view<T>(keys ? grad_keys : grad_states);
    params.grad_sigma = static_cast<T*>(grad_sigma.data_ptr());
    cpu::Device().threshold_backward(params);
  });
  return {grad_states, grad_keys, grad_sigma};
}

// How many pairs a sweep meets one by one: [densely, in bands].
Tensor sweep_work(Tensor states, OptionalTensor keys, double sigma, double eps, bool row_window,
                  bool causal) {
  PairArguments pair{std::nullopt,
                     sigma,
                     std::nullopt,
                     0.0,
                     std::nullopt,
                     0,
                     eps,
                     row_window,
                     causal,
                     false,
                     int64_t(Algorithm::kSweep)};
  check_keys(states, keys, std::nullopt, std::nullopt);
  pair.check(states);
  const Tensor work = torch::stable::new_zeros(states, {2}, ScalarType::Long);
  if (!any_pairs(states, keys, std::nullopt)) return work;
  with_dtype(states, [&](auto zero) {
    using T = decltype(zero);
    const int64_t batch = states.size(0), rows = states.size(1);
    const Tensor context = empty(states, {batch, rows, 2}, states.scalar_type());
    const Tensor threshold = empty(states, {batch, rows}, states.scalar_type());
    InteractParams<T> params{};
    params.pair = pair.params<T>(states, keys, std::nullopt);
    params.context = view<T>(context);
    params.threshold = view<T>(threshold);
    params.work = static_cast<int64_t*>(work.data_ptr());
    cpu::Device().interact(params);
  });
  return work;
}

struct StepArguments {
  OptionalTensor dt;
  double dt_value;
  OptionalTensor skip;
  double skip_value;
  int64_t steps;
  bool has_radius;
  double min, max, rate, reversion, target;

  void check(const Tensor& states, const PairArguments& pair) {
    STD_TORCH_CHECK(static_cast<Score>(pair.score) != Score::kExcess,
                    "qflux_kernels: evolve takes score 0 or 1, got 2");
    STD_TORCH_CHECK(steps >= 1, "qflux_kernels: steps must be at least 1, got ", steps);
    check_per_token("dt", dt, states, steps);
    check_per_token("skip", skip, states, steps);
    dt = contiguous(dt);
    skip = contiguous(skip);
  }

  template <class T>
  EvolveParams<T> params(const PairParams<T>& pair, const Tensor& tape, bool save) const {
    EvolveParams<T> p{};
    p.pair = pair;
    p.steps = steps;
    p.radius = {has_radius,           static_cast<T>(min),       static_cast<T>(max),
                static_cast<T>(rate), static_cast<T>(reversion), static_cast<T>(target)};
    p.dt = per_token<T>(dt, dt_value);
    p.skip = per_token<T>(skip, skip_value);
    p.tape = static_cast<T*>(tape.data_ptr());
    p.save = save;
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> evolve(
    Tensor states, OptionalTensor dt, double dt_value, OptionalTensor skip, double skip_value,
    OptionalTensor coefficient, double coefficient_value, OptionalTensor min_gate,
    double min_gate_value, OptionalTensor lengths, int64_t score, double eps, bool row_window,
    bool causal, bool mean, int64_t algorithm, int64_t steps, bool has_radius, double radius_min,
    double radius_max, double radius_rate, double radius_reversion, double radius_target,
    bool save) {
  PairArguments pair{coefficient, coefficient_value, min_gate, min_gate_value, lengths,  score,
                     eps,         row_window,        causal,   mean,           algorithm};
  StepArguments step{dt,          dt_value,         skip,         skip_value,
                     steps,       has_radius,       radius_min,   radius_max,
                     radius_rate, radius_reversion, radius_target};
  check_states(states);
  pair.check(states);
  step.check(states, pair);
  const int64_t batch = states.size(0), rows = states.size(1);
  const ScalarType dtype = states.scalar_type();
  const Tensor out = empty(states, {batch, rows, 2}, dtype);
  const Tensor strength = empty(states, {batch, rows}, dtype);
  const Tensor degree = empty(states, {batch, rows}, ScalarType::Int);
  const Tensor tape = empty(states, {save ? steps : 1, kTapePlanes, batch, rows}, dtype);
  if (states.numel() == 0)
    return {out, strength, degree,
            empty(states, {save ? steps : 0, kTapePlanes, batch, rows}, dtype)};
  with_dtype(states, [&](auto zero) {
    using T = decltype(zero);
    auto params = step.params<T>(pair.params<T>(states, std::nullopt, std::nullopt), tape, save);
    params.out = view<T>(out);
    params.strength = view<T>(strength);
    params.degree = view<int32_t>(degree);
    on_device(
        states, [&](cpu::Device& device) { qflux::evolve_forward(device, params); },
        [&](void* stream) {
#if defined(QFLUX_CUDA)
          const OptionalTensor scratch = sweep_scratch(states, params.pair, false);
          raise_if(cuda::evolve(params, stream, memory_of(scratch)));
#else
          (void)stream;
#endif
        });
  });
  return {out, strength, degree, save ? tape : empty(states, {0, kTapePlanes, batch, rows}, dtype)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evolve_backward(
    Tensor grad_states, Tensor grad_strength, Tensor tape, OptionalTensor dt, double dt_value,
    OptionalTensor skip, double skip_value, OptionalTensor coefficient, double coefficient_value,
    OptionalTensor min_gate, double min_gate_value, OptionalTensor lengths, int64_t score,
    double eps, bool row_window, bool causal, bool mean, int64_t algorithm, int64_t steps,
    bool has_radius, double radius_min, double radius_max, double radius_rate,
    double radius_reversion, double radius_target) {
  PairArguments pair{coefficient, coefficient_value, min_gate, min_gate_value, lengths,  score,
                     eps,         row_window,        causal,   mean,           algorithm};
  StepArguments step{dt,          dt_value,         skip,         skip_value,
                     steps,       has_radius,       radius_min,   radius_max,
                     radius_rate, radius_reversion, radius_target};
  check_states(grad_states);
  pair.check(grad_states);
  step.check(grad_states, pair);
  const int64_t batch = grad_states.size(0), rows = grad_states.size(1);
  check_shape("grad_strength", grad_strength, {batch, rows});
  check_shape("tape", tape, {steps, kTapePlanes, batch, rows});
  check_beside("grad_strength", grad_strength, grad_states);
  check_beside("tape", tape, grad_states);
  STD_TORCH_CHECK(tape.is_contiguous(), "qflux_kernels: tape must be contiguous");

  const Tensor grad_input = empty(grad_states, {batch, rows, 2}, grad_states.scalar_type());
  const Tensor grad_dt = step.dt ? zeros_like(*step.dt) : nothing(grad_states);
  const Tensor grad_skip = step.skip ? zeros_like(*step.skip) : nothing(grad_states);
  const Tensor grad_alpha = coefficient
                                ? zeros(grad_states, {batch, rows}, grad_states.scalar_type())
                                : nothing(grad_states);
  if (grad_states.numel() == 0)
    return {grad_input, grad_dt, grad_skip,
            coefficient ? zeros_like(*coefficient) : nothing(grad_states)};
  const Tensor scratch =
      empty(grad_states, {kScratchPlanes, batch, rows}, grad_states.scalar_type());
  with_dtype(grad_states, [&](auto zero) {
    using T = decltype(zero);
    EvolveBackwardParams<T> params{};
    params.forward =
        step.params<T>(pair.params<T>(grad_states, std::nullopt, std::nullopt), tape, true);
    params.grad_out = const_view<T>(grad_states);
    params.grad_strength = const_view<T>(grad_strength);
    params.grad_states = view<T>(grad_input);
    if (step.dt) params.grad_dt = static_cast<T*>(grad_dt.data_ptr());
    if (step.skip) params.grad_skip = static_cast<T*>(grad_skip.data_ptr());
    if (coefficient) params.grad_alpha = view<T>(grad_alpha);
    params.scratch = static_cast<T*>(scratch.data_ptr());
    on_device(
        grad_states, [&](cpu::Device& device) { qflux::evolve_backward(device, params); },
        [&](void* stream) {
#if defined(QFLUX_CUDA)
          const OptionalTensor scratch = sweep_scratch(grad_states, params.forward.pair, true);
          raise_if(cuda::evolve_backward(params, stream, memory_of(scratch)));
#else
          (void)stream;
#endif
        });
  });
  const auto summed =
      coefficient ? torch::stable::sum(grad_alpha, std::vector<int64_t>{1}) : nothing(grad_states);
  return {grad_input, grad_dt, grad_skip, summed};
}

Tensor text(const char* content) {
  const int64_t size = static_cast<int64_t>(std::strlen(content));
  const Tensor bytes = torch::stable::empty({size}, ScalarType::Byte);
  if (size > 0) std::memcpy(bytes.data_ptr(), content, static_cast<size_t>(size));
  return bytes;
}

Tensor instruction_set() { return text(cpu::instruction_set()); }

Tensor cuda_architectures() {
#if defined(QFLUX_CUDA)
  return text(cuda::architectures());
#else
  return text("");
#endif
}

}  // namespace ops
}  // namespace
}  // namespace qflux

#define QFLUX_PAIR                                                                         \
  "Tensor? coefficient, float coefficient_value, Tensor? min_gate, float min_gate_value, " \
  "Tensor? lengths, int score, float eps, bool row_window, bool causal, bool mean, "       \
  "int algorithm"
#define QFLUX_STEP                                                                      \
  "int steps, bool has_radius, float radius_min, float radius_max, float radius_rate, " \
  "float radius_reversion, float radius_target"

STABLE_TORCH_LIBRARY(qflux_kernels, m) {
  m.def("interact(Tensor states, Tensor? keys, Tensor? values, " QFLUX_PAIR
        ") -> (Tensor context, Tensor strength, Tensor degree, Tensor threshold)");
  m.def(
      "interact_backward(Tensor grad_context, Tensor grad_strength, Tensor threshold, "
      "Tensor states, Tensor? keys, Tensor? values, " QFLUX_PAIR
      ", bool need_rows, bool need_keys) -> (Tensor grad_states, Tensor grad_keys, "
      "Tensor grad_values, Tensor grad_coefficient, Tensor grad_threshold)");
  m.def(
      "evolve(Tensor states, Tensor? dt, float dt_value, Tensor? skip, float "
      "skip_value, " QFLUX_PAIR ", " QFLUX_STEP
      ", bool save) -> (Tensor result, Tensor strength, Tensor degree, Tensor tape)");
  m.def(
      "evolve_backward(Tensor grad_states, Tensor grad_strength, Tensor tape, Tensor? dt, "
      "float dt_value, Tensor? skip, float skip_value, " QFLUX_PAIR ", " QFLUX_STEP
      ") -> (Tensor grad_input, Tensor grad_dt, Tensor grad_skip, Tensor grad_coefficient)");
  // Texts as uint8: a str in a schema leaks in the stable ABI before torch 2.14.
  m.def("instruction_set() -> Tensor");
  m.def("cuda_architectures() -> Tensor");
  m.def(
      "threshold_backward(Tensor grad_threshold, Tensor states, Tensor? keys, Tensor? coefficient, "
      "float coefficient_value, Tensor? lengths, float eps, bool row_window, bool causal) -> "
      "(Tensor grad_states, Tensor grad_keys, Tensor grad_coefficient)");
  m.def(
      "sweep_work(Tensor states, Tensor? keys, float sigma, float eps, bool row_window, "
      "bool causal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&qflux::ops::instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&qflux::ops::cuda_architectures));
}

#define QFLUX_IMPLEMENT(m)                                                \
  m.impl("interact", TORCH_BOX(&qflux::ops::interact));                   \
  m.impl("interact_backward", TORCH_BOX(&qflux::ops::interact_backward)); \
  m.impl("evolve", TORCH_BOX(&qflux::ops::evolve));                       \
  m.impl("evolve_backward", TORCH_BOX(&qflux::ops::evolve_backward))

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) {
  QFLUX_IMPLEMENT(m);
  m.impl("sweep_work", TORCH_BOX(&qflux::ops::sweep_work));
  m.impl("threshold_backward", TORCH_BOX(&qflux::ops::threshold_backward));
}
STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CUDA, m) { QFLUX_IMPLEMENT(m); }

// Importing the module is what loads the object and so registers the ops.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
