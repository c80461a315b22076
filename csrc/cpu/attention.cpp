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

// Numbers of the scratch of a part, for each thread: what a core keeps at hand.
constexpr int64_t kPart = 1 << 17;

// Sequences that go together from their projections to what they gathered, and back: their scratch
// is to be at hand all along.
template <class T>
struct Sequences {
  const AttentionParams<T>& p;
  int64_t first, count;

  int64_t last() const { return first + count; }
  int64_t points() const { return p.cylinders * p.tokens * 2; }  // numbers of a sequence
  int64_t values() const { return p.tokens * p.width(); }

  // Calls body(sequence, tokens) for tiles of tokens.
  template <class Body>
  void each_tile(const Body& body) const {
    const int64_t tiles = ceil_div(p.tokens, kTurned);
    parallel_for(0, count * tiles, 1 + kNumbers / (kTurned * p.columns()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t n = begin; n < end; ++n)
                     body(first + n / tiles, tile_range(n % tiles, kTurned, p.tokens));
                 });
  }
  void pack(const T* rows, int64_t stride, T* packed) const {
    each_tile([&](int64_t b, Range range) {
      loops<T>().attention.pack(p, b, range.first, range.last, rows, stride,
                                packed + (b - first) * values());
    });
  }
  PairParams<T> pair(const T* turned, const T* packed_values) const {
    PairParams<T> pair{};
    pair.outer = count;
    pair.inner = p.cylinders;
    pair.rows = pair.keys = p.tokens;
    pair.value_dim = p.value_dim;
    pair.score = ScoreKind::kSparsemax;
    pair.causal = true;
    pair.algorithm = p.algorithm;
    pair.coefficient = {p.scale, T(0), 0, 1};
    pair.states = p.packed(turned + first * points(), 2);
    pair.key_points = p.packed(turned + p.points_size() + first * points(), 2);
    pair.values = p.packed(packed_values, p.value_dim);
    return pair;
  }
};

// Calls body(part) for all sequences, a part after the other.
template <class T, class Body>
void each_part(const AttentionParams<T>& p, const Body& body) {
  // Beside values and points, here and as they are staged for the pairs, with their gradients.
  const int64_t numbers = p.tokens * p.cylinders * (6 * p.value_dim + 16);
  const int64_t most = std::max<int64_t>(1, kPart * thread_count() / numbers);
  for (int64_t first = 0; first < p.batch; first += most)
    body(Sequences<T>{p, first, std::min(most, p.batch - first)});
}
template <class T>
int64_t largest_part(const AttentionParams<T>& p) {
  int64_t largest = 0;
  each_part(p, [&](const Sequences<T>& part) { largest = std::max(largest, part.count); });
  return largest;
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

// Rows whose sums one thread takes, at least, and how many such sums are added in order, at most.
constexpr int64_t kSummedRows = 64, kRowSums = 64;

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
  const auto values = room<T>(largest_part(p) * p.tokens * p.width());
  each_part(p, [&](const Sequences<T>& part) {
    part.each_tile(
        [&](int64_t b, Range range) { loop.turn(p, b, range.first, range.last, results.points); });
    part.pack(p.projected + p.values_at(), p.columns(), values.get());
    InteractParams<T> interaction{};
    interaction.pair = part.pair(results.points, values.get());
    interaction.context = p.of_cylinders(results.gathered + part.first * part.values());
    interaction.threshold = p.of_rows(results.threshold + part.first * p.cylinders * p.tokens);
    Device().interact(interaction);
    parallel_for(part.first * p.tokens, part.last() * p.tokens, 1 + kNumbers / p.columns(),
                 [&](int64_t begin, int64_t end) { loop.gate(p, begin, end, results); });
  });
}

template <class T>
void attend_backward(const AttentionParams<T>& given, const AttentionResults<T>& saved,
                     const AttentionGradients<T>& grads) {
  AttentionParams<T> p = given;
  const Affine<T> affine(&p);
  const AttentionLoops<T>& loop = loops<T>().attention;
  const int64_t width = p.width(), columns = p.columns();

  // Own values have the gradient of what was gathered, and with it a place for it.
  const auto apart = room<T>(p.shares_values() ? p.rows() * width : 0);
  T* const gathered = p.own            ? grads.own
                      : p.projects_own ? grads.projected + p.own_at()
                                       : apart.get();
  const int64_t stride = p.projects_own ? columns : width;
  const Chunks chunks(p.rows(), kSummedRows, kRowSums);
  std::vector<double> sums(static_cast<size_t>(2 * width * chunks.count), 0.0);
  parallel_for(0, chunks.count, 1 + kNumbers / (kSummedRows * columns),
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n)
                   loop.gate_back(p, chunks.begin(n), chunks.end(n), saved, grads, gathered, stride,
                                  &sums[2 * width * n]);
               });
  for (int64_t k = 0; k < 2 * width; ++k) {
    double sum = 0;
    for (int64_t n = 0; n < chunks.count; ++n) sum += sums[2 * width * n + k];
    (k < width ? grads.norm_scale[k] : grads.norm_shift[k - width]) = static_cast<T>(sum);
  }

  const int64_t largest = largest_part(p);
  const int64_t value_room = largest * p.tokens * width, point_room = value_room / p.value_dim * 2;
  const auto scratch = room<T>(3 * value_room + 2 * point_room);
  T *const values = scratch.get(), *const of_context = values + value_room,
           *const of_values = of_context + value_room, *const of_queries = of_values + value_room,
           *const of_keys = of_queries + point_room;
  std::vector<T> of_scale(static_cast<size_t>(p.rows() * p.cylinders), T(0));
  std::vector<double> of_angle(static_cast<size_t>(p.cylinders * p.tokens), 0.0);
  each_part(p, [&](const Sequences<T>& part) {
    part.pack(p.projected + p.values_at(), columns, values);
    part.pack(gathered, stride, of_context);
    const int64_t row = part.first * p.cylinders * p.tokens;
    InteractBackwardParams<T> interaction{};
    interaction.pair = part.pair(saved.points, values);
    interaction.grad_context = as_const(p.packed(of_context, p.value_dim));
    interaction.threshold = as_const(p.of_rows(saved.threshold + row));
    interaction.grad_states = p.packed(of_queries, 2);
    interaction.grad_keys = p.packed(of_keys, 2);
    interaction.grad_values = p.packed(of_values, p.value_dim);
    interaction.grad_coefficient = p.of_rows(of_scale.data() + row);
    Device().interact_backward(interaction);
    // Each angle has one thread, which adds the sequences in their order.
    const int64_t tiles = ceil_div(p.tokens, kTurned);
    parallel_for(0, tiles, 1 + kNumbers / (part.count * kTurned * columns),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t n = begin; n < end; ++n) {
                     const Range range = tile_range(n, kTurned, p.tokens);
                     for (int64_t b = part.first; b < part.last(); ++b) {
                       const int64_t at = b - part.first;
                       loop.unpack(p, b, range.first, range.last, of_values + at * part.values(),
                                   p.shares_values() ? of_context + at * part.values() : nullptr,
                                   grads.projected + p.values_at(), columns);
                       loop.turn_back(p, b, range.first, range.last, saved.points,
                                      of_queries + at * part.points(), of_keys + at * part.points(),
                                      grads.projected, of_angle.data());
                     }
                   }
                 });
  });
  sum_scales(p, of_scale, grads.scale);
  for (size_t n = 0; n < of_angle.size(); ++n) grads.angle[n] = static_cast<T>(of_angle[n]);
}

#define QFLUX_INSTANTIATE(T)                                                           \
  template void attend(const AttentionParams<T>&, const AttentionResults<T>&);         \
  template void attend_backward(const AttentionParams<T>&, const AttentionResults<T>&, \
                                const AttentionGradients<T>&)
QFLUX_INSTANTIATE(float);
QFLUX_INSTANTIATE(double);
#undef QFLUX_INSTANTIATE

}  // namespace qflux::cpu
