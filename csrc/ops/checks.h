// Checks of the ops' tensors, once for every device. They guard raw calls of the dispatcher ops;
// the public functions check user arguments first, in the user's terms.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <vector>

namespace qflux {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// Sizes in parentheses; -1 is written *, any size.
template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t size : sizes) {
    text << separator << (size < 0 ? "*" : std::to_string(size));
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "()" : ")");
  return text.str();
}

// `tensor` has this shape; -1 admits any size.
inline void check_shape(const char* name, const Tensor& tensor, const Shape& shape) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t d = 0; same && d < shape.size(); ++d) same = shape[d] < 0 || sizes[d] == shape[d];
  STD_TORCH_CHECK(same, "qflux_kernels: ", name, " must have shape ", shape_text(shape), ", got ",
                  shape_text(sizes));
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

inline void check_argument(const char* name, const Tensor& tensor, const Shape& shape,
                           const Tensor& states, bool integers = false) {
  check_shape(name, tensor, shape);
  check_beside(name, tensor, states, integers);
}

// `states` are (*batch, S, 2).
inline void check_states(const Tensor& states) {
  const auto sizes = states.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2 && sizes[sizes.size() - 1] == 2,
                  "qflux_kernels: states must have shape (*batch, S, 2), got ", shape_text(sizes));
  STD_TORCH_CHECK(states.scalar_type() == torch::headeronly::ScalarType::Float ||
                      states.scalar_type() == torch::headeronly::ScalarType::Double,
                  "qflux_kernels: states must be float32 or float64");
}

}  // namespace qflux
