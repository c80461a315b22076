// Shares the passes over tokens among threads, with the pairs between them.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "../math/sums.h"
#include "device.h"
#include "isa/dispatch.h"
#include "parallel.h"

namespace qflux::cpu {
namespace {

constexpr int64_t kNumbers = 1 << 15;  // a share of work that is worth waking a thread for

template <class T>
PairParams<T> pair_params(const AttentionParams<T>& p, const T* points, const T* values) {
  PairParams<T> pair{};
  pair.outer = p.batch;
  pair.inner = p.cylinders;
  pair.rows = pair.keys = p.tokens;
  pair.value_dim = p.value_dim;
  pair.score = ScoreKind::kSparsemax;
  pair.causal = true;
  pair.algorithm = p.algorithm;
  pair.coefficient = {p.scale, T(0), 0, 1};
  pair.states = p.packed(points, 2);
  pair.key_points = p.packed(points + p.points_size(), 2);
  pair.values = p.packed(values, p.value_dim);
  return pair;
}

// Calls body(sequence, tokens) for tiles of tokens.
template <class T, class Body>
void each_tile(const AttentionParams<T>& p, const Body& body) {
  const int64_t tiles = ceil_div(p.tokens, kTurned);
  parallel_for(0, p.batch * tiles, 1 + kNumbers / (kTurned * p.columns()),
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n)
                   body(n / tiles, tile_range(n % tiles, kTurned, p.tokens));
               });
}

// Scale and shift of a LayerNorm that may be without them.
template <class T>
class Affine {
 public:
  explicit Affine(AttentionParams<T>* p)
      : numbers_(static_cast<size_t>(p->norm_scale && p->norm_shift ? 0 : 2 * p->width()), T(0)) {
    if (numbers_.empty()) return;
    std::fill(numbers_.begin(), numbers_.begin() + p->width(), T(1));
    if (!p->norm_scale) p->norm_scale = numbers_.data();
    if (!p->norm_shift) p->norm_shift = numbers_.data() + p->width();
  }

 private:
  std::vector<T> numbers_;
};

// Rows in chunks that depend on the sizes alone, whose sums are added in order.
struct RowChunks {
  static constexpr int64_t kRows = 64, kMost = 64;
  int64_t rows, count;
  explicit RowChunks(int64_t n) : rows(n), count(std::clamp<int64_t>(n / kRows, 1, kMost)) {}
  int64_t begin(int64_t chunk) const { return rows * chunk / count; }
};

// grad = the sum over the rows of each sequence, and over its batches, of the parts of the scale.
template <class T>
void sum_scales(const AttentionParams<T>& p, const std::vector<T>& parts, T* grad) {
  for (int64_t c = 0; c < p.cylinders; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b)
      sum += ordered_sum(&parts[(b * p.cylinders + c) * p.tokens], p.tokens);
    grad[c] = static_cast<T>(sum);
  }
}

}  // namespace

template <class T>
void attend(const AttentionParams<T>& given, const AttentionResults<T>& results) {
  AttentionParams<T> p = given;
  const Affine<T> affine(&p);
  const AttentionLoops<T>& loop = loops<T>().attention;
  const auto values = room<T>(p.rows() * p.width());
  each_tile(p, [&](int64_t b, Range range) {
    loop.turn(p, b, range.first, range.last, results.points);
    loop.pack(p, b, range.first, range.last, p.projected + p.values_at(), p.columns(),
              values.get());
  });
  InteractParams<T> interaction{};
  interaction.pair = pair_params(p, static_cast<const T*>(results.points), values.get());
  interaction.context = p.of_cylinders(results.gathered, 0, p.width());
  interaction.threshold = p.of_rows(results.threshold);
  Device().interact(interaction);
  parallel_for(0, p.rows(), 1 + kNumbers / p.columns(),
               [&](int64_t begin, int64_t end) { loop.gate(p, begin, end, results); });
}

template <class T>
void attend_backward(const AttentionParams<T>& given, const AttentionResults<T>& saved,
                     const AttentionGradients<T>& grads) {
  AttentionParams<T> p = given;
  const Affine<T> affine(&p);
  const AttentionLoops<T>& loop = loops<T>().attention;
  const int64_t width = p.width(), columns = p.columns();

  // Own values have the gradient of what was gathered, and with it a place for it.
  const auto apart = room<T>(p.own ? 0 : p.rows() * width);
  T* const gathered = p.own ? grads.projected + p.own_at() : apart.get();
  const int64_t stride = p.own ? columns : width;
  const RowChunks chunks(p.rows());
  std::vector<double> sums(static_cast<size_t>(2 * width * chunks.count), 0.0);
  parallel_for(0, chunks.count, 1 + kNumbers / (RowChunks::kRows * columns),
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n)
                   loop.gate_back(p, chunks.begin(n), chunks.begin(n + 1), saved, grads, gathered,
                                  stride, &sums[2 * width * n]);
               });
  for (int64_t k = 0; k < 2 * width; ++k) {
    double sum = 0;
    for (int64_t n = 0; n < chunks.count; ++n) sum += sums[2 * width * n + k];
    (k < width ? grads.norm_scale[k] : grads.norm_shift[k - width]) = static_cast<T>(sum);
  }

  const int64_t size = p.rows() * width;
  const auto packed = room<T>(3 * size);
  T *const values = packed.get(), *const of_context = values + size,
           *const of_values = of_context + size;
  each_tile(p, [&](int64_t b, Range range) {
    loop.pack(p, b, range.first, range.last, p.projected + p.values_at(), columns, values);
    loop.pack(p, b, range.first, range.last, gathered, stride, of_context);
  });
  const auto points = room<T>(2 * p.points_size());
  std::vector<T> of_scale(static_cast<size_t>(p.rows() * p.cylinders), T(0));
  InteractBackwardParams<T> interaction{};
  interaction.pair = pair_params(p, static_cast<const T*>(saved.points), values);
  interaction.grad_context = as_const(p.packed(of_context, p.value_dim));
  interaction.threshold = as_const(p.of_rows(saved.threshold));
  interaction.grad_states = p.packed(points.get(), 2);
  interaction.grad_keys = p.packed(points.get() + p.points_size(), 2);
  interaction.grad_values = p.packed(of_values, p.value_dim);
  interaction.grad_coefficient = p.of_rows(of_scale.data());
  Device().interact_backward(interaction);
  sum_scales(p, of_scale, grads.scale);
  each_tile(p, [&](int64_t b, Range range) {
    loop.unpack(p, b, range.first, range.last, of_values, p.own ? nullptr : of_context,
                grads.projected + p.values_at(), columns);
  });
  const int64_t tiles = ceil_div(p.tokens, kTurned);
  parallel_for(0, tiles, 1 + kNumbers / (p.batch * kTurned * 4 * p.cylinders),
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n) {
                   const Range range = tile_range(n, kTurned, p.tokens);
                   loop.turn_back(p, range.first, range.last, saved.points, points.get(), grads);
                 }
               });
}

#define QFLUX_INSTANTIATE(T)                                                           \
  template void attend(const AttentionParams<T>&, const AttentionResults<T>&);         \
  template void attend_backward(const AttentionParams<T>&, const AttentionResults<T>&, \
                                const AttentionGradients<T>&)
QFLUX_INSTANTIATE(float);
QFLUX_INSTANTIATE(double);
#undef QFLUX_INSTANTIATE

}  // namespace qflux::cpu
