// Checks of the ops' tensors, once for every device. They guard raw calls of the dispatcher ops;
// the public functions check user arguments first, in the user's terms.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <vector>

#include "../math/storage.h"

namespace qflux {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;
using torch::headeronly::ScalarType;

inline Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Storage::kFloat16;
    case ScalarType::BFloat16:
      return Storage::kBfloat16;
    default:
      return Storage::kSame;
  }
}
// Of what is computed from a tensor.
inline ScalarType compute_dtype(const Tensor& tensor) {
  return storage_of(tensor) == Storage::kSame ? tensor.scalar_type() : ScalarType::Float;
}

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

// What a tensor of a call holds: points, values and results, which are stored as the states are;
// other numbers, in the dtype of computation; or integers.
enum class Holds { kStored, kNumbers, kIntegers };

// `tensor` computes with `states`: the same device, and a dtype that fits.
inline void check_beside(const char* name, const Tensor& tensor, const Tensor& states,
                         Holds holds = Holds::kNumbers) {
  STD_TORCH_CHECK(tensor.get_device_index() == states.get_device_index() &&
                      tensor.is_cuda() == states.is_cuda(),
                  "qflux_kernels: ", name, " must be on the device of the states");
  const auto wanted = holds == Holds::kIntegers ? ScalarType::Long
                      : holds == Holds::kStored ? states.scalar_type()
                                                : compute_dtype(states);
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, "qflux_kernels: ", name, " must be ",
                  holds == Holds::kIntegers ? "int64" : "of the dtype of the states",
                  holds == Holds::kNumbers ? " (float32 beside half precision)" : "");
}

inline void check_argument(const char* name, const Tensor& tensor, const Shape& shape,
                           const Tensor& states, Holds holds = Holds::kNumbers) {
  check_shape(name, tensor, shape);
  check_beside(name, tensor, states, holds);
}

// `states` are (*batch, S, 2).
inline void check_states(const Tensor& states) {
  const auto sizes = states.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2 && sizes[sizes.size() - 1] == 2,
                  "qflux_kernels: states must have shape (*batch, S, 2), got ", shape_text(sizes));
  const bool half = storage_of(states) != Storage::kSame;
  STD_TORCH_CHECK(states.scalar_type() == ScalarType::Float ||
                      states.scalar_type() == ScalarType::Double || (half && states.is_cuda()),
                  "qflux_kernels: states must be float32 or float64, or half precision on a GPU");
}

}  // namespace qflux
