// The dispatcher ops of project_norm.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/projection.h"
#include "../cuda/projection/project.h"
#include "on_device.h"
#include "tensors.h"

namespace qflux {
namespace {

// What both ops are given, checked and contiguous.
struct ProjectionArguments {
  Tensor features, weight;
  OptionalTensor bias, scale;
  double eps;

  void check() {
    check_shape("features", features, {-1, -1});
    STD_TORCH_CHECK(
        features.scalar_type() == ScalarType::Float || features.scalar_type() == ScalarType::Double,
        "qflux_kernels: features must be float32 or float64");
    STD_TORCH_CHECK(features.size(1) <= kMaxFeatures, "qflux_kernels: at most ", kMaxFeatures,
                    " features, got ", features.size(1));
    check_shape("weight", weight, {-1, features.size(1)});
    STD_TORCH_CHECK(weight.size(0) > 0, "qflux_kernels: weight must have rows");
    check_beside("weight", weight, features);
    features = torch::stable::contiguous(features);
    weight = torch::stable::contiguous(weight);
    bias = parameter("bias", bias);
    scale = parameter("norm_weight", scale);
  }

  OptionalTensor parameter(const char* name, const OptionalTensor& tensor) const {
    if (!tensor) return tensor;
    check_shape(name, *tensor, {weight.size(0)});
    check_beside(name, *tensor, features);
    return torch::stable::contiguous(*tensor);
  }

  template <class T>
  ProjectionParams<T> params() const {
    ProjectionParams<T> p{};
    p.tokens = features.size(0);
    p.count = features.size(1);
    p.width = weight.size(0);
    p.eps = eps;
    p.features = pointer<T>(features);
    p.weight = pointer<T>(weight);
    p.bias = pointer<T>(bias);
    p.scale = pointer<T>(scale);
    return p;
  }
};

// The scratch of a call on a GPU, alive until its kernels are enqueued.
template <class T>
struct Scratch {
  Tensor planes, numbers;
  cuda::ProjectionScratch<T> pointers;

  Scratch(const Tensor& like, const ProjectionParams<T>& p, bool tokens, bool sums)
      : planes(empty(like, {p.columns() * p.width}, like.scalar_type())),
        numbers(empty(like,
                      {p.columns() * p.columns() + (tokens ? 2 * p.tokens : 0) +
                       (sums ? (p.chunks() + 1) * p.sums() : 0)},
                      ScalarType::Double)) {
    pointers.planes = pointer<T>(planes);
    pointers.gram = pointer<double>(numbers);
    if (tokens) pointers.tokens = pointers.gram + p.columns() * p.columns();
    if (sums) {
      pointers.totals = pointers.tokens + 2 * p.tokens;
      pointers.partial = pointers.totals + p.sums();
    }
  }
};

namespace ops {

Tensor project_norm(Tensor features, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight,
                    OptionalTensor norm_bias, double eps) {
  ProjectionArguments given{features, weight, bias, norm_weight, eps};
  given.check();
  const OptionalTensor shift = given.parameter("norm_bias", norm_bias);
  const Tensor out = empty(features, {features.size(0), weight.size(0)}, features.scalar_type());
  if (out.numel() == 0) return out;
  with_dtype(features, [&](auto zero) {
    using T = decltype(zero);
    ProjectionParams<T> params = given.params<T>();
    params.shift = pointer<T>(shift);
    on_device(
        features, [&](cpu::Device&) { cpu::project(params, pointer<T>(out)); },
        [&](auto stream) {
          const Scratch<T> scratch(features, params, false, false);
          raise_if(cuda::project(params, scratch.pointers, pointer<T>(out), stream));
        });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_norm_backward(
    Tensor grad, Tensor features, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight,
    double eps, bool need_features, bool need_parameters) {
  ProjectionArguments given{features, weight, bias, norm_weight, eps};
  given.check();
  const int64_t tokens = features.size(0), count = features.size(1), width = weight.size(0);
  check_shape("grad", grad, {tokens, width});
  check_beside("grad", grad, features);
  grad = torch::stable::contiguous(grad);
  const Tensor grad_features = zeros(features, {tokens, count});
  const Tensor grad_weight = zeros(features, {width, count}), grad_bias = zeros(features, {width});
  const Tensor grad_scale = zeros(features, {width}), grad_shift = zeros(features, {width});
  if (tokens > 0)
    with_dtype(features, [&](auto zero) {
      using T = decltype(zero);
      ProjectionParams<T> params = given.params<T>();
      params.grad = pointer<T>(grad);
      ProjectionGradients<T> grads;
      if (need_features) grads.features = pointer<T>(grad_features);
      if (need_parameters) {
        grads.weight = pointer<T>(grad_weight);
        grads.bias = pointer<T>(grad_bias);
        grads.scale = pointer<T>(grad_scale);
        grads.shift = pointer<T>(grad_shift);
      }
      on_device(
          features, [&](cpu::Device&) { cpu::project_backward(params, grads); },
          [&](auto stream) {
            const Scratch<T> scratch(features, params, true, need_parameters);
            raise_if(cuda::project_backward(params, scratch.pointers, grads, stream));
          });
    });
  return {grad_features, grad_weight, grad_bias, grad_scale, grad_shift};
}

}  // namespace ops
}  // namespace
}  // namespace qflux

#define QFLUX_IMPLEMENT(m)                                      \
  m.impl("project_norm", TORCH_BOX(&qflux::ops::project_norm)); \
  m.impl("project_norm_backward", TORCH_BOX(&qflux::ops::project_norm_backward))

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) { QFLUX_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CUDA, m) { QFLUX_IMPLEMENT(m); }
#undef QFLUX_IMPLEMENT
