// Checks of the ops' tensors, once for every device. They guard raw calls of the dispatcher ops;
// the public functions check user arguments first, in the user's terms.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <vector>

#include "../math/storage.h"

namespace qflux {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;
using torch::headeronly::ScalarType;

// The dtype as a number; to find its name, torch compares it with every dtype.
inline int32_t dtype_number(const Tensor& tensor) {
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number;
}
inline Storage storage_of(const Tensor& tensor) {
  const int32_t dtype = dtype_number(tensor);
  if (dtype == aoti_torch_dtype_float16()) return Storage::kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return Storage::kBfloat16;
  return Storage::kSame;
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
template <class Sizes = std::initializer_list<int64_t>>
void check_shape(const char* name, const Tensor& tensor, const Sizes& shape) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  const auto wanted = shape.begin();
  for (size_t d = 0; same && d < shape.size(); ++d) same = wanted[d] < 0 || sizes[d] == wanted[d];
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
  if (holds == Holds::kIntegers) {
    STD_TORCH_CHECK(dtype_number(tensor) == aoti_torch_dtype_int64(), "qflux_kernels: ", name,
                    " must be int64");
    return;
  }
  const bool fits = holds == Holds::kStored || storage_of(states) == Storage::kSame
                        ? dtype_number(tensor) == dtype_number(states)
                        : dtype_number(tensor) == aoti_torch_dtype_float32();
  STD_TORCH_CHECK(fits, "qflux_kernels: ", name, " must be of the dtype of the states",
                  holds == Holds::kNumbers ? " (float32 beside half precision)" : "");
}

template <class Sizes = std::initializer_list<int64_t>>
void check_argument(const char* name, const Tensor& tensor, const Sizes& shape,
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
