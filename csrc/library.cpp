// The dispatcher ops: their schemas, and the texts about this build. Each file of ops/ registers
// its implementations.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

#include "cpu/decode/index.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/statistics.h"
#include "math/sweep.h"
#include "ops/pair.h"
#include "projection.h"

namespace qflux {
namespace {
namespace ops {

Tensor text(const std::string& content) {
  const Tensor bytes =
      torch::stable::empty({static_cast<int64_t>(content.size())}, ScalarType::Byte);
  if (!content.empty()) std::memcpy(bytes.data_ptr(), content.data(), content.size());
  return bytes;
}

Tensor instruction_set() { return text(cpu::instruction_set().name); }

template <bool kBuilt>
const char* architectures() {
  if constexpr (kBuilt) return cuda::architectures();
  return "";
}
Tensor cuda_architectures() { return text(architectures<kHasCuda>()); }

// What qflux_kernels/schema.py, options.py and past.py state too.
Tensor constants() {
  return text(std::string("scores=") + kScoreNames + " algorithms=" + kAlgorithmNames +
              " tape_planes=" + std::to_string(kTapePlanes) + " kept_moments=" +
              std::to_string(kKeptMoments) + " kept_sums=" + std::to_string(kKeptSums) +
              " max_features=" + std::to_string(kMaxFeatures) +
              " run_factor=" + std::to_string(cpu::kRunFactor) +
              " moments_tile=" + std::to_string(cpu::kMomentsTile) +
              " largest_tame=" + std::to_string(kLargestTame<float>));
}

}  // namespace ops
}  // namespace
}  // namespace qflux

#define QFLUX_PAIR                                                                         \
  "Tensor? coefficient, float coefficient_value, Tensor? min_gate, float min_gate_value, " \
  "Tensor? lengths, int score, float eps, bool whole_window, bool causal, bool mean, "     \
  "int algorithm"
#define QFLUX_STEP                                                                      \
  "int steps, bool has_radius, float radius_min, float radius_max, float radius_rate, " \
  "float radius_reversion, float radius_target"

STABLE_TORCH_LIBRARY(qflux_kernels, m) {
  m.def("interact(Tensor states, Tensor? keys, Tensor? values, " QFLUX_PAIR
        ", bool save) -> (Tensor context, Tensor strength, Tensor degree, Tensor threshold, "
        "Tensor moments)");
  m.def(
      "interact_backward(Tensor grad_context, Tensor grad_strength, Tensor threshold, "
      "Tensor? moments, Tensor states, Tensor? keys, Tensor? values, " QFLUX_PAIR
      ", bool need_rows, bool need_keys) -> (Tensor grad_states, Tensor grad_keys, "
      "Tensor grad_values, Tensor grad_coefficient, Tensor grad_threshold)");
  m.def(
      "threshold_backward(Tensor grad_threshold, Tensor states, Tensor? keys, Tensor? coefficient, "
      "float coefficient_value, Tensor? lengths, float eps, bool whole_window, bool causal) -> "
      "(Tensor grad_states, Tensor grad_keys, Tensor grad_coefficient)");
  m.def(
      "evolve(Tensor states, Tensor? dt, float dt_value, Tensor? skip, float "
      "skip_value, " QFLUX_PAIR ", " QFLUX_STEP
      ", bool save) -> (Tensor result, Tensor strength, Tensor degree, Tensor tape)");
  m.def(
      "evolve_backward(Tensor grad_states, Tensor grad_strength, Tensor tape, Tensor? dt, "
      "float dt_value, Tensor? skip, float skip_value, " QFLUX_PAIR ", " QFLUX_STEP
      ") -> (Tensor grad_input, Tensor grad_dt, Tensor grad_skip, Tensor grad_coefficient)");
  m.def(
      "project_norm(Tensor features, Tensor weight, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps) -> Tensor");
  m.def(
      "project_norm_backward(Tensor grad, Tensor features, Tensor weight, Tensor? bias, "
      "Tensor? norm_weight, float eps, bool need_features, bool need_parameters) -> "
      "(Tensor grad_features, Tensor grad_weight, Tensor grad_bias, Tensor grad_norm_weight, "
      "Tensor grad_norm_bias)");
  m.def(
      "sweep_work(Tensor states, Tensor? keys, float sigma, float eps, bool whole_window, "
      "bool causal) -> Tensor");
  // A cache on a CPU. Keys and values are planes, of the tokens from `base` on.
  m.def(
      "cache_append(Tensor(a!) key_buffer, Tensor(b!)? value_buffer, Tensor keys, Tensor? values, "
      "int at) -> bool");
  m.def(
      "cache_moments(Tensor(a!) moments, Tensor keys, Tensor? starts, int base, int first) -> ()");
  m.def("cache_index_unit(bool wide, int value_dim, int chunk) -> int");
  m.def("cache_pages(Tensor(a!) memory) -> ()");
  m.def(
      "cache_index(Tensor(a!) index, Tensor keys, Tensor? values, Tensor? starts, int base, "
      "int score, int chunk, int tokens) -> ()");
  m.def(
      "cache_attend(Tensor states, Tensor keys, Tensor? values, Tensor? index, Tensor? moments, "
      "Tensor(a!)? tangents, Tensor? starts, int base, int chunk, int indexed, Tensor? "
      "coefficient, "
      "float coefficient_value, Tensor? min_gate, float min_gate_value, int score, float eps, "
      "bool mean) -> (Tensor context, Tensor strength, Tensor degree, bool served)");
  // A further token through the language model, written behind `at` others in the buffers of its
  // layers. The indices and the moments are of tokens in front of it.
  m.def(
      "cache_token(Tensor ids, Tensor angle, Tensor[] weights, float[] norm_eps, float[] bounds, "
      "Tensor[] pasts, Tensor(a!)[] caches, int at, int chunk, int[] indexed, int[] scores, "
      "float[] numbers) -> (Tensor hidden, Tensor pasts, bool served)");
  // The attention of a layer of the language model on a CPU, between its linear maps.
  m.def(
      "attention(Tensor projected, Tensor? own, Tensor turns, Tensor scale, Tensor? norm_weight, "
      "Tensor? norm_bias, float norm_eps, int value_dim, int algorithm) -> (Tensor out, "
      "Tensor points, Tensor threshold, Tensor gathered, Tensor moments)");
  m.def(
      "attention_backward(Tensor grad, Tensor projected, Tensor? own, Tensor turns, Tensor scale, "
      "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, int value_dim, int algorithm, "
      "Tensor points, Tensor threshold, Tensor gathered, Tensor moments) -> "
      "(Tensor grad_projected, Tensor grad_own, Tensor grad_angle, Tensor grad_scale, "
      "Tensor grad_norm_weight, Tensor grad_norm_bias)");
  // Texts as uint8: a str in a schema leaks in the stable ABI before torch 2.14.
  m.def("instruction_set() -> Tensor");
  m.def("cuda_architectures() -> Tensor");
  m.def("constants() -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&qflux::ops::instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&qflux::ops::cuda_architectures));
  m.impl("constants", TORCH_BOX(&qflux::ops::constants));
}

// Importing the module is what loads the object and so registers the ops.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
