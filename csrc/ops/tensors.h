// The tensors of an op: any number of batch dimensions, of any strides, as the two that kernels
// know; new tensors; sums over rows.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../math/sums.h"
#include "../params.h"
#include "checks.h"

namespace qflux {

// By the allocator itself: torch::stable::new_empty looks the operator up by name, which takes
// longer than what some ops do.
inline Tensor empty_of(const Tensor& like, const Shape& shape, int32_t dtype) {
  constexpr size_t kFew = 8;
  int64_t few[kFew];
  Shape many(shape.size() > kFew ? shape.size() : 0);
  int64_t* const strides = shape.size() > kFew ? many.data() : few;
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  const auto error =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides, dtype,
                               device, like.get_device_index(), &made);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "qflux_kernels: a tensor of shape ",
                  shape_text(shape), " could not be allocated");
  return Tensor(made);
}
inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  return empty_of(like, shape, to<int32_t>(from(dtype)));
}
inline Tensor empty(const Tensor& like, const Shape& shape) {
  return empty_of(like, shape, dtype_number(like));
}
inline Tensor zeros(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}
inline Tensor zeros(const Tensor& like, const Shape& shape) {
  return torch::stable::new_zeros(like, shape);
}
inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}
inline Tensor zeros_like(const Tensor& like) { return zeros(like, shape_of(like)); }
// Zeros in the dtype of computation.
inline Tensor wide_zeros_like(const Tensor& like) {
  return zeros(like, shape_of(like), compute_dtype(like));
}
// The gradient of what was not given.
inline Tensor nothing(const Tensor& like) { return empty(like, {0}); }

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* pointer(const OptionalTensor& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

// Dimensions first .. last - 1 of a tensor as one.
struct MergedDimensions {
  bool possible = true;
  int64_t stride = 0;

  MergedDimensions(const Tensor& tensor, int64_t first, int64_t last) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t count = 1;
    for (int64_t d = last - 1; d >= first; --d) {
      if (sizes[d] == 1) continue;
      if (count == 1) stride = strides[d];
      possible = possible && strides[d] == count * stride;
      count *= sizes[d];
    }
  }
};

// The batch dimensions of a call, and how its tensors are walked along them: those in front of
// `split_` as the outer one, the others as the inner one.
class Batch {
 public:
  // The dimensions of `tensor` but the last `rest`.
  Batch(const Tensor& tensor, int64_t rest) {
    const auto sizes = tensor.sizes();
    sizes_.assign(sizes.begin(), sizes.end() - rest);
  }

  // front, *batch, back
  Shape shape(std::initializer_list<int64_t> back = {},
              std::initializer_list<int64_t> front = {}) const {
    Shape all(front);
    all.insert(all.end(), sizes_.begin(), sizes_.end());
    all.insert(all.end(), back);
    return all;
  }

  // A tensor of the call, whose batch dimensions begin at `first`: settle() may put a copy in its
  // place.
  void include(Tensor& tensor, int64_t first = 0) { members_.push_back({&tensor, first}); }
  void include(OptionalTensor& tensor, int64_t first = 0) {
    if (tensor) include(*tensor, first);
  }

  // Chooses the split, the one for which the fewest numbers have to be copied.
  void settle() {
    int64_t fewest = -1, best = 0;
    for (split_ = 0; split_ <= dims() && fewest != 0; ++split_) {
      int64_t copied = 0;
      for (const Member& member : members_)
        if (!fits(member)) copied += member.tensor->numel();
      if (fewest >= 0 && fewest <= copied) continue;
      fewest = copied;
      best = split_;
    }
    split_ = best;
    for (const Member& member : members_)
      if (!fits(member)) *member.tensor = torch::stable::contiguous(*member.tensor);
  }

  int64_t outer() const { return product(0, split_); }
  int64_t inner() const { return product(split_, dims()); }

  // The rest is for what was included, and for what is contiguous.

  template <class T>
  View<T> view(const Tensor& tensor) const {
    const auto strides = tensor.strides();
    const int64_t token = dims();
    return {pointer<T>(tensor),
            outer_stride(tensor),
            inner_stride(tensor),
            strides[token],
            tensor.dim() > token + 1 ? strides[token + 1] : 0,
            storage_of(tensor)};
  }
  template <class T>
  View<const T> const_view(const Tensor& tensor) const {
    return as_const(view<T>(tensor));
  }

  template <class T>
  PerSequence<T> per_sequence(const OptionalTensor& tensor, double value) const {
    PerSequence<T> p{pointer<T>(tensor), static_cast<T>(value)};
    if (!tensor) return p;
    p.outer = outer_stride(*tensor);
    p.inner = inner_stride(*tensor);
    return p;
  }

  // Of (steps or 1, *batch, S).
  template <class T>
  PerToken<T> per_token(const OptionalTensor& tensor, double value) const {
    PerToken<T> p{pointer<T>(tensor), static_cast<T>(value)};
    if (!tensor) return p;
    p.per_step = tensor->size(0) > 1;
    p.step = p.per_step ? tensor->stride(0) : 0;
    p.outer = outer_stride(*tensor, 1);
    p.inner = inner_stride(*tensor, 1);
    p.token = tensor->stride(1 + dims());
    return p;
  }

 private:
  struct Member {
    Tensor* tensor;
    int64_t first;
  };

  int64_t dims() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t product(int64_t first, int64_t last) const {
    int64_t count = 1;
    for (int64_t d = first; d < last; ++d) count *= sizes_[d];
    return count;
  }
  MergedDimensions outer_of(const Tensor& tensor, int64_t first) const {
    return {tensor, first, first + split_};
  }
  MergedDimensions inner_of(const Tensor& tensor, int64_t first) const {
    return {tensor, first + split_, first + dims()};
  }
  bool fits(const Member& member) const {
    return outer_of(*member.tensor, member.first).possible &&
           inner_of(*member.tensor, member.first).possible;
  }
  int64_t outer_stride(const Tensor& tensor, int64_t first = 0) const {
    return outer_of(tensor, first).stride;
  }
  int64_t inner_stride(const Tensor& tensor, int64_t first = 0) const {
    return inner_of(tensor, first).stride;
  }

  Shape sizes_;
  int64_t split_ = 0;
  std::vector<Member> members_;
};

// The sums over the rows of a contiguous (*batch, S). The order of torch's own would depend on the
// number of threads of a CPU.
inline Tensor sum_rows(const Tensor& tensor) {
  if (tensor.is_cuda()) return torch::stable::sum(tensor, Shape{-1});
  const int64_t rows = tensor.size(tensor.dim() - 1);
  const Tensor sums = empty(tensor, Batch(tensor, 1).shape());
  const auto add = [&](auto* out, const auto* in) {
    for (int64_t n = 0; n < sums.numel(); ++n)
      out[n] = static_cast<std::decay_t<decltype(*out)>>(ordered_sum(in + n * rows, rows));
  };
  if (tensor.scalar_type() == ScalarType::Float)
    add(pointer<float>(sums), pointer<float>(tensor));
  else
    add(pointer<double>(sums), pointer<double>(tensor));
  return sums;
}

}  // namespace qflux
