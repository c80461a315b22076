// The ops of a cache on a CPU: tokens into its buffers, an index of its keys, and what the last
// rows gather. Keys and values are planes: (*batch, tokens, columns) whose tokens follow one
// another in memory. Buffers, moments and index are written in place.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/decode/decode.h"
#include "../math/sweep.h"
#include "pair.h"

namespace qflux {
namespace {
namespace ops {

void check_planes(const char* name, const Tensor& tensor) {
  const int64_t token = tensor.dim() - 2;
  STD_TORCH_CHECK(tensor.size(token) <= 1 || tensor.stride(token) == 1, "qflux_kernels: ", name,
                  " must have tokens that follow one another in memory");
}

// Of `columns` numbers for each sequence, contiguous.
int64_t check_records(const char* name, const Tensor& tensor, const Batch& batch,
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
    if (starts) check_argument("starts", *starts, batch.shape(), keys, true);
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

cpu::CachedMoments moments_of(const OptionalTensor& moments, const Batch& batch) {
  if (!moments) return {};
  return {static_cast<Moments*>(moments->data_ptr()),
          check_records("moments", *moments, batch, {-1, 6}, ScalarType::Double)};
}
cpu::CachedIndex index_of(const OptionalTensor& index, const Batch& batch, int64_t chunk,
                          int64_t tokens) {
  if (!index) return {};
  constexpr int64_t kLeaves = cpu::kIndexFan * cpu::kLeaf;
  STD_TORCH_CHECK(chunk > 0 && chunk % kLeaves == 0 && chunk <= kLeaves * cpu::kIndexFan,
                  "qflux_kernels: chunk must be a multiple of ", kLeaves, " up to ",
                  kLeaves * cpu::kIndexFan, ", got ", chunk);
  return {static_cast<uint8_t*>(index->data_ptr()),
          check_records("index", *index, batch, {-1}, ScalarType::Byte), chunk, tokens};
}

template <class T>
bool copy_tame(const Tensor& to, const Tensor& from, const Batch& batch, int64_t at) {
  const View<T> out = batch.view<T>(to);
  const View<const T> in = batch.const_view<T>(from);
  const int64_t tokens = from.size(from.dim() - 2), columns = from.size(from.dim() - 1);
  bool tame = true;
  for (int64_t o = 0; o < batch.outer(); ++o)
    for (int64_t i = 0; i < batch.inner(); ++i)
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t n = 0; n < tokens; ++n) {
          const T number = in.at({o, i}, n, c);
          out.at({o, i}, at + n, c) = number;
          tame = tame && is_tame(number);
        }
  return tame;
}

// Puts tokens into the buffers from `at` on; returns whether all numbers are such as an index may
// have.
bool cache_append(Tensor key_buffer, OptionalTensor value_buffer, Tensor keys,
                  OptionalTensor values, int64_t at) {
  check_states(keys);
  Batch batch(keys, 2);
  const int64_t tokens = keys.size(keys.dim() - 2);
  check_argument("key_buffer", key_buffer, batch.shape({-1, 2}), keys);
  const int64_t room = key_buffer.size(key_buffer.dim() - 2);
  STD_TORCH_CHECK(at >= 0 && at <= room && tokens <= room - at,
                  "qflux_kernels: the buffers have room for ", room, " tokens, and ", tokens,
                  " are to stand behind ", at);
  STD_TORCH_CHECK(bool(values) == bool(value_buffer),
                  "qflux_kernels: values and their buffer must come together");
  if (values) {
    check_argument("values", *values, batch.shape({tokens, -1}), keys);
    check_argument("value_buffer", *value_buffer,
                   batch.shape({room, values->size(values->dim() - 1)}), keys);
  }
  // The buffers come first: what is copied for the sake of strides must not be one of them.
  const Tensor own_keys = key_buffer;
  const OptionalTensor own_values = value_buffer;
  batch.include(key_buffer);
  batch.include(value_buffer);
  batch.include(keys);
  batch.include(values);
  batch.settle();
  STD_TORCH_CHECK(key_buffer.data_ptr() == own_keys.data_ptr() &&
                      (!values || value_buffer->data_ptr() == own_values->data_ptr()),
                  "qflux_kernels: the buffers must have batch dimensions of regular strides");
  bool tame = true;
  with_dtype(keys, [&](auto zero) {
    using T = decltype(zero);
    tame = copy_tame<T>(key_buffer, keys, batch, at);
    if (values) tame = copy_tame<T>(*value_buffer, *values, batch, at) && tame;
  });
  return tame;
}

void cache_moments(Tensor moments, Tensor keys, OptionalTensor starts, int64_t base,
                   int64_t first) {
  CacheArguments cache{keys, std::nullopt, starts, base};
  Batch batch = cache.check();
  cache.include(batch);
  batch.settle();
  const cpu::CachedMoments records = moments_of(moments, batch);
  STD_TORCH_CHECK((base + cache.tokens()) / cpu::kMomentsTile + 2 <= records.stride && first >= 0,
                  "qflux_kernels: moments have room for ", records.stride, " records, too few for ",
                  base + cache.tokens(), " tokens");
  with_dtype(keys, [&](auto zero) {
    using T = decltype(zero);
    cpu::extend_moments(cache.cached<T>(batch), first, records);
  });
}

int64_t cache_index_unit(bool wide, int64_t value_dim, int64_t chunk) {
  return wide ? cpu::index_unit<double>(chunk, value_dim)
              : cpu::index_unit<float>(chunk, value_dim);
}

// Indexes tokens up to the last of the keys, a multiple of `chunk`, where `tokens` are indexed.
void cache_index(Tensor index, Tensor keys, OptionalTensor values, OptionalTensor starts,
                 int64_t base, int64_t score, int64_t chunk, int64_t tokens) {
  CacheArguments cache{keys, values, starts, base};
  Batch batch = cache.check();
  cache.include(batch);
  batch.settle();
  const cpu::CachedIndex memory = index_of(index, batch, chunk, tokens);
  const int64_t end = base + cache.tokens();
  const int64_t value_dim = values ? values->size(values->dim() - 1) : 2;
  const bool wide = keys.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(end % chunk == 0 && tokens % chunk == 0 && tokens <= end &&
                      end / chunk * cache_index_unit(wide, value_dim, chunk) <= memory.stride,
                  "qflux_kernels: index has no room for ", end, " tokens behind ", tokens);
  STD_TORCH_CHECK(score >= 0 && score < kScores, "qflux_kernels: score must be 0 to ", kScores - 1);
  with_dtype(keys, [&](auto zero) {
    using T = decltype(zero);
    cpu::extend_index(cache.cached<T>(batch), memory, has_mass(static_cast<ScoreKind>(score)));
  });
}

std::tuple<Tensor, Tensor, Tensor, bool> cache_attend(
    Tensor states, Tensor keys, OptionalTensor values, OptionalTensor index, OptionalTensor moments,
    OptionalTensor starts, int64_t base, int64_t chunk, int64_t indexed, OptionalTensor coefficient,
    double coefficient_value, OptionalTensor min_gate, double min_gate_value, int64_t score,
    double eps, bool mean) {
  PairArguments pair{states};
  pair.keys = keys;
  pair.values = values;
  pair.coefficient = coefficient;
  pair.coefficient_value = coefficient_value;
  pair.min_gate = min_gate;
  pair.min_gate_value = min_gate_value;
  pair.score = score;
  pair.eps = eps;
  pair.causal = true;
  pair.mean = mean;
  Batch batch = pair.check();
  CacheArguments cache{keys, values, starts, base};
  cache.check();
  batch.include(cache.starts);
  batch.settle();
  cache.keys = *pair.keys;
  cache.values = pair.values;
  check_planes("keys", cache.keys);
  if (cache.values) check_planes("values", *cache.values);

  const int64_t rows = pair.rows(), tokens = cache.tokens();
  const bool statistics = is_thresholded(pair.kind()) && !has_mass(pair.kind());
  STD_TORCH_CHECK(rows <= tokens, "qflux_kernels: there are ", rows, " rows for ", tokens, " keys");
  STD_TORCH_CHECK(bool(moments) == statistics,
                  "qflux_kernels: moments come with a score that has statistics");
  STD_TORCH_CHECK(indexed >= 0 && indexed <= base + tokens - rows + 1 && (!indexed || index),
                  "qflux_kernels: ", indexed, " indexed tokens cannot be in front of all ", rows,
                  " rows behind ", base + tokens, " tokens");
  const Tensor context = empty(states, batch.shape({rows, pair.value_dim()}));
  const Tensor strength = empty(states, batch.shape({rows}));
  const Tensor degree = empty(states, batch.shape({rows}), ScalarType::Int);
  bool served = true;
  if (context.numel() > 0)
    with_dtype(states, [&](auto zero) {
      using T = decltype(zero);
      cpu::Device device;  // for an instruction set that is not there
      cpu::CachedRows<T> params{};
      params.pair = pair.params<T>(batch);
      params.keys = cache.cached<T>(batch);
      params.moments = moments_of(moments, batch);
      if (indexed) params.index = index_of(index, batch, chunk, indexed);
      params.context = batch.view<T>(context);
      params.strength = batch.view<T>(strength);
      params.degree = batch.view<int32_t>(degree);
      served = cpu::attend(params);
    });
  return {context, strength, degree, served};
}

}  // namespace ops
}  // namespace
}  // namespace qflux

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) {
  m.impl("cache_append", TORCH_BOX(&qflux::ops::cache_append));
  m.impl("cache_moments", TORCH_BOX(&qflux::ops::cache_moments));
  m.impl("cache_index", TORCH_BOX(&qflux::ops::cache_index));
  m.impl("cache_attend", TORCH_BOX(&qflux::ops::cache_attend));
}
STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CompositeExplicitAutograd, m) {
  m.impl("cache_index_unit", TORCH_BOX(&qflux::ops::cache_index_unit));
}
