#include "token.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../../math/gate.h"
#include "../../math/sums.h"
#include "../../math/sweep.h"
#include "../../math/turn.h"
#include "../isa/dispatch.h"
#include "../parallel.h"

namespace qflux::cpu {
namespace {

// Weights that a thread takes at a time, in whole rows.
constexpr int64_t kWeights = 1 << 12;
// Pairs from which other threads are worth waking.
constexpr int64_t kPairs = 1 << 20;

template <class T>
void normalise(const NormParams<T>& p, const T* x, int64_t count, T* out) {
  const double size = static_cast<double>(count);
  const double mean = ordered_sum(x, count) / size;
  const double squares = ordered_sum(x, count, [&](double v) { return (v - mean) * (v - mean); });
  const double scale = 1 / std::sqrt(squares / size + p.eps);
  for (int64_t n = 0; n < count; ++n) {
    const T y = static_cast<T>((x[n] - mean) * scale);
    out[n] = (p.weight ? y * p.weight[n] : y) + (p.bias ? p.bias[n] : T(0));
  }
}

// In place: x is this token's input, and then the output.
template <class T>
void convolve(const ConvolutionParams<T>& p, int64_t b, int64_t channels, T* x) {
  const int64_t taps = p.width - 1;
  if (taps == 0) return;
  const T* const past = p.past + b * taps * channels;
  T* const next = p.next + b * taps * channels;
  std::copy(past + channels, past + taps * channels, next);
  std::copy(x, x + channels, next + (taps - 1) * channels);
  for (int64_t c = 0; c < channels; ++c) {
    const T* const weight = p.weight + c * p.width;
    T sum = x[c] * weight[taps] + (p.bias ? p.bias[c] : T(0));
    for (int64_t t = 0; t < taps; ++t) sum += past[t * channels + c] * weight[t];
    x[c] = sum;
  }
}

// The hidden stream where it starts; false for an id outside the vocabulary.
template <class T>
bool embed(const TokenParams<T>& p) {
  const EmbeddingParams<T>& embedding = p.embedding;
  const T low = static_cast<T>(embedding.low);
  const T range = static_cast<T>(embedding.high - embedding.low);
  std::vector<T> points(2 * embedding.cylinders);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.ids[b] < 0 || p.ids[b] >= embedding.vocabulary) return false;
    const int64_t at = p.ids[b] * embedding.cylinders;
    for (int64_t c = 0; c < embedding.cylinders; ++c) {
      const T radius = low + range * sigmoid(embedding.radius_logit[at + c]);
      points[2 * c] = radius * std::cos(embedding.phase[at + c]);
      points[2 * c + 1] = radius * std::sin(embedding.phase[at + c]);
    }
    loops<T>().matvec.rows(p.projection.weight, p.projection.bias, p.projection.columns,
                           points.data(), 0, p.hidden, p.out + b * p.hidden);
  }
  return true;
}

// A layer on the hidden stream, which stands in `out`.
template <class T>
class LayerStep {
 public:
  // Loops of a crew, at most.
  static constexpr int64_t kLoops = 4;

  LayerStep(const TokenParams<T>& token, const LayerParams<T>& layer)
      : token_(token),
        p_(layer),
        matvec_(loops<T>().matvec),
        width_(layer.cylinders * layer.value_dim) {}

  bool run(Crew& crew) {
    std::vector<T> normed(batch() * hidden());
    for (int64_t b = 0; b < batch(); ++b) {
      T* const x = &normed[b * hidden()];
      normalise(p_.norm, token_.out + b * hidden(), hidden(), x);
      convolve(p_.convolution, b, hidden(), x);
    }
    std::vector<T> projected(batch() * p_.inputs.rows), gathered(batch() * width_);
    if (!gather(crew, normed, projected, gathered)) return false;
    const int64_t gates = 4 * p_.cylinders + width_;
    for (int64_t b = 0; b < batch(); ++b) {
      T* const y = &gathered[b * width_];
      normalise(p_.gathered_norm, y, width_, y);
      const T* const gate = &projected[b * p_.inputs.rows + gates];
      for (int64_t n = 0; n < width_; ++n) y[n] *= silu(gate[n]);
    }
    add_linear(crew, p_.output, gathered.data());
    if (p_.mlp_inputs.weight) mlp(crew, normed.data());
    return true;
  }

 private:
  int64_t batch() const { return token_.batch; }
  int64_t hidden() const { return token_.hidden; }

  // Projections, phases, the cache: a cylinder at a time, since they differ in what they cost.
  bool gather(Crew& crew, const std::vector<T>& normed, std::vector<T>& projected,
              std::vector<T>& gathered) {
    const int64_t sequences = batch() * p_.cylinders, dim = p_.value_dim;
    std::vector<T> queries(2 * sequences), strength(sequences);
    std::vector<int32_t> degree(sequences);
    CachedRows<T> rows = p_.rows;
    // The batch dimensions of the cache may be one.
    const int64_t inner = rows.pair.inner;
    rows.pair.states = {queries.data(), 2 * inner, 2, 0, 1};
    rows.context = {gathered.data(), dim * inner, dim, 0, 1};
    rows.strength = {strength.data(), inner, 1, 0, 0};
    rows.degree = {degree.data(), inner, 1, 0, 0};
    const CachedAttention<T> attention(rows);
    std::atomic<bool> tame{true};
    crew.share(sequences, [&](int64_t n) {
      const int64_t b = n / p_.cylinders;
      T* const to = &projected[b * p_.inputs.rows];
      attention.fetch(n);
      if (!project(n, &normed[b * hidden()], to, &queries[2 * n]) || !attention.run(n, 0, 1)) {
        tame.store(false, std::memory_order_relaxed);
        return;
      }
      const T scale = p_.averages ? T(1) : T(1) / T(std::max(degree[n], 1));
      const int64_t first = n % p_.cylinders * dim;
      const T* const own = to + 4 * p_.cylinders + (p_.own ? 2 * width_ : 0) + first;
      const T* const x = &normed[b * hidden()];
      for (int64_t c = 0; c < dim; ++c) {
        const T value = p_.own_scale ? p_.own_scale[first + c] * x[(first + c) % hidden()] : own[c];
        gathered[n * dim + c] = gathered[n * dim + c] * scale + value;
      }
    });
    return tame;
  }

  // The projections of a cylinder; its key and value join the cache. False if a row has to meet
  // them otherwise.
  bool project(int64_t n, const T* x, T* to, T* turned) const {
    const auto some = [&](int64_t first, int64_t count) {
      matvec_.rows(p_.inputs.weight, p_.inputs.bias, hidden(), x, first, first + count, to);
    };
    const int64_t cylinders = p_.cylinders, c = n % cylinders, dim = p_.value_dim;
    const int64_t query = 2 * c, key = 2 * (cylinders + c), value = 4 * cylinders + c * dim;
    some(query, 2);
    some(key, 2);
    for (int64_t first = value; first < p_.inputs.rows; first += width_) some(first, dim);
    const T cosine = std::cos(token_.angle[c]), sine = std::sin(token_.angle[c]);
    const auto turn = [&](const T* point, T* out) {
      const Point<T> moved = qflux::turned(Point<T>{point[0], point[1]}, cosine, sine);
      out[0] = moved.x;
      out[1] = moved.y;
    };
    turn(to + query, turned);
    turn(to + key, to + key);
    const BatchIndex b = p_.rows.pair.index(n);
    const int64_t token = p_.rows.keys.end - 1;
    bool tame = true;
    const auto join = [&](const View<T>& buffer, const T* from, int64_t count) {
      for (int64_t m = 0; m < count; ++m) {
        buffer.at(b, token, m) = from[m];
        tame = tame && is_tame(from[m]);
      }
    };
    join(p_.keys, to + key, 2);
    join(p_.values, to + value, dim);
    return tame;
  }

  void mlp(Crew& crew, T* x) const {
    for (int64_t b = 0; b < batch(); ++b) {
      normalise(p_.mlp_norm, token_.out + b * hidden(), hidden(), x + b * hidden());
      convolve(p_.mlp_convolution, b, hidden(), x + b * hidden());
    }
    const LinearParams<T>& inputs = p_.mlp_inputs;
    const int64_t inner = inputs.rows / 2;
    std::vector<T> both(batch() * inputs.rows), product(batch() * inner);
    each_rows(crew, inner, 2 * inputs.columns, [&](int64_t first, int64_t last) {
      for (int64_t b = 0; b < batch(); ++b) {
        T* const to = &both[b * inputs.rows];
        for (const int64_t half : {int64_t(0), inner})
          matvec_.rows(inputs.weight, inputs.bias, inputs.columns, x + b * hidden(), half + first,
                       half + last, to);
        for (int64_t n = first; n < last; ++n) product[b * inner + n] = silu(to[n]) * to[inner + n];
      }
    });
    add_linear(crew, p_.mlp_output, product.data());
  }

  // out = out + weight x + bias
  void add_linear(Crew& crew, const LinearParams<T>& linear, const T* x) const {
    std::vector<T> sums(batch() * linear.rows);
    each_rows(crew, linear.rows, linear.columns, [&](int64_t first, int64_t last) {
      for (int64_t b = 0; b < batch(); ++b) {
        T* const to = &sums[b * linear.rows];
        matvec_.rows(linear.weight, linear.bias, linear.columns, x + b * linear.columns, first,
                     last, to);
        for (int64_t r = first; r < last; ++r) token_.out[b * linear.rows + r] += to[r];
      }
    });
  }

  // body(first, last) for parts of `rows` rows of so many weights each.
  template <class Body>
  static void each_rows(Crew& crew, int64_t rows, int64_t weights, const Body& body) {
    const int64_t size = round_up(ceil_div(kWeights, weights), 8);
    crew.share(ceil_div(rows, size), [&](int64_t part) {
      const Range range = tile_range(part, size, rows);
      body(range.first, range.last);
    });
  }

  const TokenParams<T>& token_;
  const LayerParams<T>& p_;
  const MatvecLoops<T>& matvec_;
  const int64_t width_;  // of what all cylinders gather
};

}  // namespace

template <class T>
bool step_token(const TokenParams<T>& params) {
  if (!embed(params)) return false;
  int64_t pairs = 0;
  for (const LayerParams<T>& layer : params.layers)
    pairs += params.batch * layer.cylinders * row_pairs(layer.rows);
  const int64_t loops = LayerStep<T>::kLoops * static_cast<int64_t>(params.layers.size());
  bool tame = true;
  Crew::work(loops, pairs >= kPairs, [&](Crew& crew) {
    for (const LayerParams<T>& layer : params.layers)
      tame = tame && LayerStep<T>(params, layer).run(crew);
  });
  for (int64_t b = 0; b < params.batch; ++b) {
    T* const x = params.out + b * params.hidden;
    normalise(params.norm, x, params.hidden, x);
  }
  return tame;
}

template bool step_token(const TokenParams<float>&);
template bool step_token(const TokenParams<double>&);

}  // namespace qflux::cpu
