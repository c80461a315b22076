// Checks of the ops' tensors, once for every device. They guard raw calls of the dispatcher ops;
// the public functions check user arguments first, in the user's terms.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>

namespace qflux {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ")";
  return text.str();
}

// `tensor` has this shape; -1 admits any size.
inline void check_shape(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    same = same && (size < 0 || tensor.size(d) == size);
    ++d;
  }
  std::ostringstream wanted;
  for (const int64_t size : shape) wanted << (size < 0 ? "*" : std::to_string(size)) << " ";
  STD_TORCH_CHECK(same, "qflux_kernels: ", name, " must have shape ( ", wanted.str(), "), got ",
                  shape_text(tensor));
}

// `tensor` computes with `states`: the same device and, unless it holds integers, dtype.
inline void check_beside(const char* name, const Tensor& tensor, const Tensor& states,
                         bool integers = false) {
  STD_TORCH_CHECK(tensor.get_device_index() == states.get_device_index() &&
                      tensor.is_cuda() == states.is_cuda(),
                  "qflux_kernels: ", name, " must be on the device of the states");
  const auto wanted = integers ? torch::headeronly::ScalarType::Long : states.scalar_type();
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, "qflux_kernels: ", name, " must be ",
                  integers ? "int64" : "of the dtype of the states");
}

inline void check_states(const Tensor& states) {
  check_shape("states", states, {-1, -1, 2});
  STD_TORCH_CHECK(states.scalar_type() == torch::headeronly::ScalarType::Float ||
                      states.scalar_type() == torch::headeronly::ScalarType::Double,
                  "qflux_kernels: states must be float32 or float64");
}

inline void check_per_sequence(const char* name, const OptionalTensor& tensor, const Tensor& states,
                               bool integers = false) {
  if (!tensor) return;
  check_shape(name, *tensor, {states.size(0)});
  check_beside(name, *tensor, states, integers);
}

inline void check_per_token(const char* name, const OptionalTensor& tensor, const Tensor& states,
                            int64_t steps) {
  if (!tensor) return;
  check_shape(name, *tensor, {-1, states.size(0), states.size(1)});
  check_beside(name, *tensor, states);
  STD_TORCH_CHECK(tensor->size(0) == 1 || tensor->size(0) == steps, "qflux_kernels: ", name,
                  " must have 1 or steps = ", steps, " rows, got ", tensor->size(0));
}

}  // namespace qflux
