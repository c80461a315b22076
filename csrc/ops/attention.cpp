// The ops of the attention of a language model's layer on a CPU.
#include "../cpu/attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "on_device.h"
#include "tensors.h"

namespace qflux {
namespace {

// What both ops are given, checked and contiguous.
struct AttentionArguments {
  Tensor projected;
  OptionalTensor own;
  Tensor turns, scale;
  OptionalTensor norm_weight, norm_bias;
  double eps;
  int64_t value_dim, algorithm;

  int64_t batch() const { return projected.size(0); }
  int64_t tokens() const { return projected.size(1); }
  int64_t cylinders() const { return scale.size(0); }
  int64_t width() const { return cylinders() * value_dim; }

  void check() {
    check_shape("projected", projected, {-1, -1, -1});
    STD_TORCH_CHECK(!projected.is_cuda() && (projected.scalar_type() == ScalarType::Float ||
                                             projected.scalar_type() == ScalarType::Double),
                    "qflux_kernels: projected must be float32 or float64 on a CPU");
    check_argument("scale", scale, {-1}, projected);
    check_argument("turns", turns, {cylinders(), tokens(), 2}, projected);
    STD_TORCH_CHECK(value_dim > 0 && cylinders() > 0,
                    "qflux_kernels: there must be cylinders and values, got ", cylinders(), " and ",
                    value_dim);
    const int64_t columns = projected.size(2), plain = 4 * cylinders() + 2 * width();
    STD_TORCH_CHECK(columns == plain || (columns == plain + width() && !own),
                    "qflux_kernels: projected must have ", plain,
                    " columns, or without own values apart ", plain + width(), ", got ", columns);
    STD_TORCH_CHECK(algorithm >= 0 && algorithm < kAlgorithms,
                    "qflux_kernels: algorithm must be 0 to ", kAlgorithms - 1, " (",
                    kAlgorithmNames, "), got ", algorithm);
    for (Tensor* tensor : {&projected, &turns, &scale}) settle(tensor);
    own = optional("own", own, {batch(), tokens(), width()});
    norm_weight = optional("norm_weight", norm_weight, {width()});
    norm_bias = optional("norm_bias", norm_bias, {width()});
  }

  // What is left by a forward, or given to a backward.
  Tensor left(const char* name, Tensor tensor, std::initializer_list<int64_t> shape) const {
    check_argument(name, tensor, shape, projected);
    settle(&tensor);
    return tensor;
  }

  template <class T>
  AttentionParams<T> params() const {
    AttentionParams<T> p{};
    p.batch = batch();
    p.tokens = tokens();
    p.cylinders = cylinders();
    p.value_dim = value_dim;
    p.projects_own = projected.size(2) > 4 * cylinders() + 2 * width();
    p.algorithm = static_cast<Algorithm>(algorithm);
    p.eps = eps;
    p.projected = pointer<T>(projected);
    p.own = pointer<T>(own);
    p.turns = pointer<T>(turns);
    p.scale = pointer<T>(scale);
    p.norm_scale = pointer<T>(norm_weight);
    p.norm_shift = pointer<T>(norm_bias);
    return p;
  }

 private:
  static void settle(Tensor* tensor) {
    if (!tensor->is_contiguous()) *tensor = torch::stable::contiguous(*tensor);
  }
  OptionalTensor optional(const char* name, const OptionalTensor& given,
                          std::initializer_list<int64_t> shape) const {
    if (!given) return given;
    return left(name, *given, shape);
  }
};

namespace ops {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention(
    Tensor projected, OptionalTensor own, Tensor turns, Tensor scale, OptionalTensor norm_weight,
    OptionalTensor norm_bias, double norm_eps, int64_t value_dim, int64_t algorithm) {
  AttentionArguments given{projected, own,      turns,     scale,    norm_weight,
                           norm_bias, norm_eps, value_dim, algorithm};
  given.check();
  const int64_t batch = given.batch(), tokens = given.tokens(), cylinders = given.cylinders();
  const Tensor out = empty(projected, {batch, tokens, given.width()});
  const Tensor points = empty(projected, {2, batch, cylinders, tokens, 2});
  const Tensor threshold = empty(projected, {batch, cylinders, tokens});
  const Tensor gathered = empty(projected, {batch, tokens, given.width()});
  const Tensor moments = empty(projected, {batch, tokens, 2});
  if (out.numel() > 0)
    with_dtype(projected, [&](auto zero) {
      using T = decltype(zero);
      cpu::attend(given.params<T>(),
                  AttentionResults<T>{pointer<T>(out), pointer<T>(points), pointer<T>(threshold),
                                      pointer<T>(gathered), pointer<T>(moments)});
    });
  return {out, points, threshold, gathered, moments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad, Tensor projected, OptionalTensor own, Tensor turns, Tensor scale,
    OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, int64_t value_dim,
    int64_t algorithm, Tensor points, Tensor threshold, Tensor gathered, Tensor moments) {
  AttentionArguments given{projected, own,      turns,     scale,    norm_weight,
                           norm_bias, norm_eps, value_dim, algorithm};
  given.check();
  const int64_t batch = given.batch(), tokens = given.tokens(), cylinders = given.cylinders();
  const int64_t width = given.width();
  grad = given.left("grad", grad, {batch, tokens, width});
  points = given.left("points", points, {2, batch, cylinders, tokens, 2});
  threshold = given.left("threshold", threshold, {batch, cylinders, tokens});
  gathered = given.left("gathered", gathered, {batch, tokens, width});
  moments = given.left("moments", moments, {batch, tokens, 2});
  const bool any = grad.numel() > 0;
  const auto gradient = [&](const Shape& shape) {
    return any ? empty(projected, shape) : zeros(projected, shape);
  };
  const Tensor grad_projected = gradient(shape_of(projected));
  const Tensor grad_own = own ? gradient({batch, tokens, width}) : nothing(projected);
  const Tensor grad_angle = gradient({cylinders, tokens}), grad_scale = gradient({cylinders});
  const Tensor grad_norm_weight = gradient({width}), grad_norm_bias = gradient({width});
  if (any)
    with_dtype(projected, [&](auto zero) {
      using T = decltype(zero);
      cpu::attend_backward(
          given.params<T>(),
          AttentionResults<T>{nullptr, pointer<T>(points), pointer<T>(threshold),
                              pointer<T>(gathered), pointer<T>(moments)},
          AttentionGradients<T>{pointer<T>(grad), pointer<T>(grad_projected), pointer<T>(grad_own),
                                pointer<T>(grad_angle), pointer<T>(grad_scale),
                                pointer<T>(grad_norm_weight), pointer<T>(grad_norm_bias)});
    });
  return {grad_projected, grad_own, grad_angle, grad_scale, grad_norm_weight, grad_norm_bias};
}

}  // namespace ops
}  // namespace
}  // namespace qflux

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&qflux::ops::attention));
  m.impl("attention_backward", TORCH_BOX(&qflux::ops::attention_backward));
}
