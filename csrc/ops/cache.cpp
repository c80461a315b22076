// The ops of a cache on a CPU: tokens into its buffers, an index of its keys, and what the last
// rows gather. Keys and values are planes: (*batch, tokens, columns) whose tokens follow one
// another in memory. Buffers, moments and index are written in place.
#include "cache.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qflux {
namespace {
namespace ops {

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

// Asks for large pages: a walk of an index of hundreds of megabytes meets a page for nearly every
// leaf, and with small ones waits for the tables that say where it is. Advice, which a system may
// not take.
void cache_pages(Tensor memory) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(memory.data_ptr());
  const auto bytes = static_cast<uintptr_t>(memory.numel() * memory.element_size());
  STD_TORCH_CHECK(memory.is_contiguous(), "qflux_kernels: memory must be contiguous");
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
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
    OptionalTensor tangents, OptionalTensor starts, int64_t base, int64_t chunk, int64_t indexed,
    OptionalTensor coefficient, double coefficient_value, OptionalTensor min_gate,
    double min_gate_value, int64_t score, double eps, bool mean) {
  CacheArguments cache{keys, values, starts, base};
  PairArguments pair = cached_pair(states, cache, coefficient, coefficient_value, min_gate,
                                   min_gate_value, score, eps, mean);
  Batch batch = pair.check();
  cache.check();
  batch.include(cache.starts);
  batch.settle();
  cache.keys = *pair.keys;
  cache.values = pair.values;
  check_planes("keys", cache.keys);
  if (cache.values) check_planes("values", *cache.values);

  const int64_t rows = pair.rows(), tokens = cache.tokens();
  STD_TORCH_CHECK(rows <= tokens, "qflux_kernels: there are ", rows, " rows for ", tokens, " keys");
  check_moments(pair, moments);
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
      params.tangents = tangents_of<T>(tangents, batch);
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
  m.impl("cache_pages", TORCH_BOX(&qflux::ops::cache_pages));
  m.impl("cache_attend", TORCH_BOX(&qflux::ops::cache_attend));
}
STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CompositeExplicitAutograd, m) {
  m.impl("cache_index_unit", TORCH_BOX(&qflux::ops::cache_index_unit));
}
