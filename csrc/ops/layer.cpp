// The op of a token's way through a layer of the language model on a CPU.
#include "../cpu/decode/layer.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cache.h"

namespace qflux {
namespace {
namespace ops {

// Weights are contiguous and beside the hidden stream.
const Tensor& parameter(const char* name, const Tensor& tensor, const Shape& shape,
                        const Tensor& hidden) {
  check_argument(name, tensor, shape, hidden);
  STD_TORCH_CHECK(tensor.is_contiguous(), "qflux_kernels: ", name, " must be contiguous");
  return tensor;
}
const OptionalTensor& parameter(const char* name, const OptionalTensor& tensor, const Shape& shape,
                                const Tensor& hidden) {
  if (tensor) parameter(name, *tensor, shape, hidden);
  return tensor;
}

// What stands in front of a branch: a LayerNorm and a convolution.
struct Front {
  OptionalTensor weight, bias;
  double eps;
  OptionalTensor taps, taps_bias, past;
  Tensor next;

  void check(const Tensor& hidden) {
    const int64_t batch = hidden.size(0), width = hidden.size(1);
    parameter("norm_weight", weight, {width}, hidden);
    parameter("norm_bias", bias, {width}, hidden);
    STD_TORCH_CHECK(bool(taps) == bool(past),
                    "qflux_kernels: taps of a convolution and its inputs must come together");
    next = taps ? empty(hidden, {batch, taps->size(taps->dim() - 1) - 1, width}) : nothing(hidden);
    if (!taps) return;
    check_shape("taps", *taps, {width, 1, -1});
    parameter("taps", taps, {width, 1, taps->size(2)}, hidden);
    parameter("taps_bias", taps_bias, {width}, hidden);
    STD_TORCH_CHECK(taps->size(2) > 1, "qflux_kernels: taps must be at least 2");
    check_argument("past", *past, {batch, taps->size(2) - 1, width}, hidden);
    past = torch::stable::contiguous(*past);
  }
  template <class T>
  cpu::NormParams<T> norm() const {
    return {pointer<T>(weight), pointer<T>(bias), eps};
  }
  template <class T>
  cpu::ConvolutionParams<T> convolution() const {
    if (!taps) return {1, nullptr, nullptr, nullptr, nullptr};
    return {taps->size(2), pointer<T>(*taps), pointer<T>(taps_bias), pointer<T>(*past),
            pointer<T>(next)};
  }
};

template <class T>
cpu::LinearParams<T> linear(const OptionalTensor& weight, const OptionalTensor& bias) {
  if (!weight) return {nullptr, nullptr, 0, 0};
  return {pointer<T>(*weight), pointer<T>(bias), weight->size(0), weight->size(1)};
}

std::tuple<Tensor, Tensor, Tensor, bool> cache_layer(
    Tensor hidden, Tensor angle, OptionalTensor norm_weight, OptionalTensor norm_bias,
    double norm_eps, OptionalTensor taps, OptionalTensor taps_bias, OptionalTensor past,
    Tensor inputs, OptionalTensor inputs_bias, OptionalTensor gathered_weight,
    OptionalTensor gathered_bias, double gathered_eps, Tensor output, OptionalTensor output_bias,
    OptionalTensor mlp_norm_weight, OptionalTensor mlp_norm_bias, double mlp_norm_eps,
    OptionalTensor mlp_taps, OptionalTensor mlp_taps_bias, OptionalTensor mlp_past,
    OptionalTensor mlp_inputs, OptionalTensor mlp_inputs_bias, OptionalTensor mlp_output,
    OptionalTensor mlp_output_bias, Tensor key_buffer, Tensor value_buffer, OptionalTensor index,
    OptionalTensor moments, OptionalTensor tangents, int64_t at, int64_t chunk, int64_t indexed,
    OptionalTensor coefficient, double coefficient_value, OptionalTensor min_gate,
    double min_gate_value, int64_t score, double eps) {
  check_shape("hidden", hidden, {-1, -1});
  hidden = torch::stable::contiguous(hidden);
  const int64_t batch = hidden.size(0), width = hidden.size(1);
  STD_TORCH_CHECK(
      hidden.scalar_type() == ScalarType::Float || hidden.scalar_type() == ScalarType::Double,
      "qflux_kernels: hidden must be float32 or float64");
  STD_TORCH_CHECK(key_buffer.dim() == 4 && at >= 0 && at < key_buffer.size(2),
                  "qflux_kernels: key_buffer must be (batch, cylinders, tokens, 2) with room for a "
                  "token behind ",
                  at);
  const int64_t cylinders = key_buffer.size(1), room = key_buffer.size(2);
  check_argument("key_buffer", key_buffer, {batch, cylinders, room, 2}, hidden);
  check_argument("value_buffer", value_buffer, {batch, cylinders, room, -1}, hidden);
  const int64_t value_dim = value_buffer.size(3), gathers = cylinders * value_dim;
  parameter("angle", angle, {cylinders}, hidden);
  const int64_t plain = 4 * cylinders + 2 * gathers;
  check_shape("inputs", inputs, {-1, width});
  STD_TORCH_CHECK(inputs.size(0) == plain || inputs.size(0) == plain + gathers,
                  "qflux_kernels: inputs must have ", plain, " or ", plain + gathers, " rows, got ",
                  inputs.size(0));
  parameter("inputs", inputs, {inputs.size(0), width}, hidden);
  parameter("inputs_bias", inputs_bias, {inputs.size(0)}, hidden);
  parameter("gathered_weight", gathered_weight, {gathers}, hidden);
  parameter("gathered_bias", gathered_bias, {gathers}, hidden);
  parameter("output", output, {width, gathers}, hidden);
  parameter("output_bias", output_bias, {width}, hidden);
  STD_TORCH_CHECK(bool(mlp_inputs) == bool(mlp_output),
                  "qflux_kernels: mlp_inputs and mlp_output must come together");
  if (mlp_inputs) {
    check_shape("mlp_output", *mlp_output, {width, -1});
    const int64_t inner = mlp_output->size(1);
    parameter("mlp_inputs", mlp_inputs, {2 * inner, width}, hidden);
    parameter("mlp_inputs_bias", mlp_inputs_bias, {2 * inner}, hidden);
    parameter("mlp_output", mlp_output, {width, inner}, hidden);
    parameter("mlp_output_bias", mlp_output_bias, {width}, hidden);
  }
  Front front{norm_weight, norm_bias, norm_eps, taps, taps_bias, past, nothing(hidden)};
  Front mlp_front{mlp_norm_weight, mlp_norm_bias, mlp_norm_eps,   mlp_taps,
                  mlp_taps_bias,   mlp_past,      nothing(hidden)};
  front.check(hidden);
  mlp_front.check(hidden);

  const Tensor keys = torch::stable::narrow(key_buffer, 2, 0, at + 1);
  const Tensor values = torch::stable::narrow(value_buffer, 2, 0, at + 1);
  CacheArguments cache{keys, values, std::nullopt, 0};
  PairArguments pair = cached_pair(torch::stable::narrow(key_buffer, 2, at, 1), cache, coefficient,
                                   coefficient_value, min_gate, min_gate_value, score, eps, false);
  Batch sequences = pair.check();
  cache.check();
  check_moments(pair, moments);
  STD_TORCH_CHECK(indexed >= 0 && indexed <= at && (!indexed || index), "qflux_kernels: ", indexed,
                  " indexed tokens cannot be in front of a token behind ", at);
  sequences.settle();
  STD_TORCH_CHECK(pair.keys->data_ptr() == key_buffer.data_ptr() &&
                      pair.values->data_ptr() == value_buffer.data_ptr(),
                  "qflux_kernels: the buffers must have batch dimensions of regular strides");

  const Tensor out = empty(hidden, {batch, width});
  bool served = true;
  if (out.numel() > 0 && gathers > 0)
    with_dtype(hidden, [&](auto zero) {
      using T = decltype(zero);
      cpu::Device device;  // for an instruction set that is not there
      cpu::LayerParams<T> p{};
      p.batch = batch;
      p.hidden = width;
      p.cylinders = cylinders;
      p.value_dim = value_dim;
      p.angle = pointer<T>(angle);
      p.norm = front.norm<T>();
      p.convolution = front.convolution<T>();
      p.inputs = linear<T>(inputs, inputs_bias);
      p.gathered_norm = {pointer<T>(gathered_weight), pointer<T>(gathered_bias), gathered_eps};
      p.output = linear<T>(output, output_bias);
      p.mlp_norm = mlp_front.norm<T>();
      p.mlp_convolution = mlp_front.convolution<T>();
      p.mlp_inputs = linear<T>(mlp_inputs, mlp_inputs_bias);
      p.mlp_output = linear<T>(mlp_output, mlp_output_bias);
      p.own = inputs.size(0) > plain;
      p.averages = has_mass(pair.kind());
      p.rows.pair = pair.params<T>(sequences);
      p.rows.keys = cache.cached<T>(sequences);
      p.rows.moments = moments_of(moments, sequences);
      p.rows.tangents = tangents_of<T>(tangents, sequences);
      if (indexed) p.rows.index = index_of(index, sequences, chunk, indexed);
      p.keys = sequences.view<T>(key_buffer);
      p.values = sequences.view<T>(value_buffer);
      p.in = pointer<T>(hidden);
      p.out = pointer<T>(out);
      served = cpu::step_layer(p);
    });
  return {out, front.next, mlp_front.next, served};
}

}  // namespace ops
}  // namespace
}  // namespace qflux

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) {
  m.impl("cache_layer", TORCH_BOX(&qflux::ops::cache_layer));
}
