// What the ops of a cache are given: keys and values in planes, moments and an index of them.
#pragma once

#include "../cpu/decode/decode.h"
#include "../math/sweep.h"
#include "pair.h"

namespace qflux {

inline void check_planes(const char* name, const Tensor& tensor) {
  const int64_t token = tensor.dim() - 2;
  STD_TORCH_CHECK(tensor.size(token) <= 1 || tensor.stride(token) == 1, "qflux_kernels: ", name,
                  " must have tokens that follow one another in memory");
}

// Of `columns` numbers for each sequence, contiguous.
inline int64_t check_records(const char* name, const Tensor& tensor, const Batch& batch,
                             const Shape& record, ScalarType dtype) {
  Shape shape = batch.shape();
  shape.insert(shape.end(), record.begin(), record.end());
  check_shape(name, tensor, shape);
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == dtype, "qflux_kernels: ", name,
                  " must be contiguous and of its dtype");
  return tensor.size(batch.shape().size());
}

// The keys and values of a cache, with what of the tokens stands in front.
struct CacheArguments {
  Tensor keys;
  OptionalTensor values, starts;
  int64_t base;

  int64_t tokens() const { return keys.size(keys.dim() - 2); }
  Batch check() {
    check_states(keys);
    Batch batch(keys, 2);
    check_planes("keys", keys);
    if (values) {
      check_argument("values", *values, batch.shape({tokens(), -1}), keys);
      check_planes("values", *values);
    }
    if (starts) check_argument("starts", *starts, batch.shape(), keys, Holds::kIntegers);
    STD_TORCH_CHECK(base >= 0, "qflux_kernels: base must be >= 0, got ", base);
    return batch;
  }
  void include(Batch& batch) {
    batch.include(keys);
    batch.include(values);
    batch.include(starts);
  }
  template <class T>
  cpu::CachedKeys<T> cached(const Batch& batch) const {
    cpu::CachedKeys<T> c{};
    c.outer = batch.outer();
    c.inner = batch.inner();
    c.base = base;
    c.end = base + tokens();
    c.value_dim = values ? values->size(values->dim() - 1) : 2;
    c.points = batch.const_view<T>(keys);
    if (values) c.values = batch.const_view<T>(*values);
    c.start = batch.per_sequence<int64_t>(starts, 0);
    return c;
  }
};

// The last rows of causal sequences against the keys of a cache, with their score.
inline PairArguments cached_pair(const Tensor& states, const CacheArguments& cache,
                                 const OptionalTensor& coefficient, double coefficient_value,
                                 const OptionalTensor& min_gate, double min_gate_value,
                                 int64_t score, double eps, bool mean) {
  PairArguments pair{states};
  pair.keys = cache.keys;
  pair.values = cache.values;
  pair.coefficient = coefficient;
  pair.coefficient_value = coefficient_value;
  pair.min_gate = min_gate;
  pair.min_gate_value = min_gate_value;
  pair.score = score;
  pair.eps = eps;
  pair.causal = true;
  pair.mean = mean;
  return pair;
}
inline void check_moments(const PairArguments& pair, const OptionalTensor& moments) {
  const bool statistics = is_thresholded(pair.kind()) && !has_mass(pair.kind());
  STD_TORCH_CHECK(bool(moments) == statistics,
                  "qflux_kernels: moments come with a score that has statistics");
}

inline cpu::CachedMoments moments_of(const OptionalTensor& moments, const Batch& batch) {
  if (!moments) return {};
  return {static_cast<Moments*>(moments->data_ptr()),
          check_records("moments", *moments, batch, {-1, 6}, ScalarType::Double)};
}
template <class T>
T* tangents_of(const OptionalTensor& tangents, const Batch& batch) {
  if (!tangents) return nullptr;
  constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  check_records("tangents", *tangents, batch, {cpu::kTangentNumbers}, kType);
  return static_cast<T*>(tangents->data_ptr());
}
inline cpu::CachedIndex index_of(const OptionalTensor& index, const Batch& batch, int64_t chunk,
                                 int64_t tokens) {
  if (!index) return {};
  constexpr int64_t kLeaves = cpu::kIndexFan * cpu::kLeaf;
  STD_TORCH_CHECK(chunk > 0 && chunk % kLeaves == 0 && chunk <= kLeaves * cpu::kIndexFan,
                  "qflux_kernels: chunk must be a multiple of ", kLeaves, " up to ",
                  kLeaves * cpu::kIndexFan, ", got ", chunk);
  return {static_cast<uint8_t*>(index->data_ptr()),
          check_records("index", *index, batch, {-1}, ScalarType::Byte), chunk, tokens};
}

}  // namespace qflux
