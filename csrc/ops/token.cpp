// The op of a token's way through the language model on a CPU.
#include "../cpu/decode/token.h"

#include <torch/csrc/stable/library.h>

#include <deque>
#include <tuple>

#include "cache.h"

namespace qflux {
namespace {
namespace ops {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;
using Integers = std::vector<int64_t>;

// The tensors of a layer, in the order of `TOKEN_WEIGHTS` and `TOKEN_CACHES` in
// qflux_kernels/schema.py. What a layer does without is empty.
enum Weight {
  kNorm,
  kNormBias,
  kTaps,
  kTapsBias,
  kInputs,
  kInputsBias,
  kOwnScale,
  kGathered,
  kGatheredBias,
  kOutput,
  kOutputBias,
  kMlpNorm,
  kMlpNormBias,
  kMlpTaps,
  kMlpTapsBias,
  kMlpInputs,
  kMlpInputsBias,
  kMlpOutput,
  kMlpOutputBias,
  kWeights
};
constexpr const char* kWeightNames[kWeights] = {
    "norm",        "norm_bias",       "taps",          "taps_bias",      "inputs",
    "inputs_bias", "own_scale",       "gathered",      "gathered_bias",  "output",
    "output_bias", "mlp_norm",        "mlp_norm_bias", "mlp_taps",       "mlp_taps_bias",
    "mlp_inputs",  "mlp_inputs_bias", "mlp_output",    "mlp_output_bias"};
enum Cache { kKeys, kValues, kIndex, kMoments, kTangents, kCoefficient, kMinGate, kCaches };
constexpr const char* kCacheNames[kCaches] = {"keys",     "values",      "index",   "moments",
                                              "tangents", "coefficient", "min_gate"};
// The same for `TOKEN_EPS`, of LayerNorms, and `TOKEN_NUMBERS`, of scores.
enum Eps { kNormEps, kGatheredEps, kMlpNormEps, kEps };
enum Number { kCoefficientValue, kMinGateValue, kScoreEps, kNumbers };

// Those around the layers, in the order of `TOKEN_ENDS`, behind them in the list.
enum End { kRadiusLogit, kPhase, kProjection, kProjectionBias, kLastNorm, kLastNormBias, kEnds };
constexpr const char* kEndNames[kEnds] = {"radius_logit",    "phase", "projection",
                                          "projection_bias", "norm",  "norm_bias"};

// Some of the tensors, by their places; they are checked as they are asked for, beside `like`.
class Given {
 public:
  Given(const Tensor* tensors, const char* const* names, const Tensor& like)
      : tensors_(tensors), names_(names), like_(like) {}

  const Tensor& operator[](int place) const { return tensors_[place]; }
  bool has(int place) const { return tensors_[place].numel() > 0; }
  OptionalTensor optional(int place) const {
    return has(place) ? OptionalTensor(tensors_[place]) : std::nullopt;
  }
  // A contiguous weight.
  template <class T>
  const T* weight(int place, std::initializer_list<int64_t> shape) const {
    const Tensor& tensor = tensors_[place];
    check_argument(names_[place], tensor, shape, like_);
    STD_TORCH_CHECK(tensor.is_contiguous(), "qflux_kernels: ", names_[place],
                    " must be contiguous");
    return pointer<T>(tensor);
  }
  template <class T>
  const T* optional_weight(int place, std::initializer_list<int64_t> shape) const {
    return has(place) ? weight<T>(place, shape) : nullptr;
  }
  // The weight stands at `place`, the bias behind it.
  template <class T>
  cpu::NormParams<T> norm(int place, int64_t width, double eps) const {
    return {optional_weight<T>(place, {width}), optional_weight<T>(place + 1, {width}), eps};
  }
  template <class T>
  cpu::LinearParams<T> linear(int place, int64_t rows, int64_t columns) const {
    return {weight<T>(place, {rows, columns}), optional_weight<T>(place + 1, {rows}), rows,
            columns};
  }
  int64_t rows(int place) const {
    check_shape(names_[place], tensors_[place], {-1, -1});
    return tensors_[place].size(0);
  }

 private:
  const Tensor* const tensors_;
  const char* const* const names_;
  const Tensor& like_;
};

// The inputs of all convolutions: `past` one by one, and what they are behind the token together.
class Pasts {
 public:
  Pasts(Tensors& past, int64_t batch, int64_t width, const Tensor& like) : past_(past) {
    if (!past.empty()) {
      check_shape("pasts", past[0], {batch, -1, width});
      taps_ = past[0].size(1) + 1;
    }
    for (Tensor& one : past) {
      check_argument("pasts", one, {batch, taps_ - 1, width}, like);
      if (!one.is_contiguous()) one = torch::stable::contiguous(one);
    }
    STD_TORCH_CHECK(past.empty() || taps_ > 1, "qflux_kernels: pasts must have a token");
    next_ = past.empty()
                ? nothing(like)
                : empty(like, {static_cast<int64_t>(past.size()), batch, taps_ - 1, width});
  }

  const Tensor& next() const { return next_; }
  bool all_used() const { return used_ == past_.size(); }

  // Those of the convolution whose weights stand at `place`, if it is one.
  template <class T>
  cpu::ConvolutionParams<T> take(const Given& given, int place, int64_t width) {
    if (!given.has(place)) return {1, nullptr, nullptr, nullptr, nullptr};
    STD_TORCH_CHECK(used_ < past_.size(), "qflux_kernels: pasts must be one for each convolution");
    const T* const taps = given.weight<T>(place, {width, 1, taps_});
    const T* const bias = given.optional_weight<T>(place + 1, {width});
    const T* const past = pointer<T>(past_[used_]);
    return {taps_, taps, bias, past, pointer<T>(next_) + used_++ * past_[0].numel()};
  }

 private:
  const Tensors& past_;
  Tensor next_;
  int64_t taps_ = 1;
  size_t used_ = 0;
};

// A layer's cache: keys and values with room for the token, and what stands beside them.
struct LayerCache {
  PairArguments pair;
  Batch sequences;
  OptionalTensor index, moments, tangents;

  LayerCache(const Given& given, const double* numbers, int64_t score, int64_t batch,
             const Tensor& like)
      : pair{given[kKeys]},
        sequences(given[kKeys], 0),
        index(given.optional(kIndex)),
        moments(given.optional(kMoments)),
        tangents(given.optional(kTangents)) {
    const Tensor& keys = given[kKeys];
    STD_TORCH_CHECK(keys.dim() == 4, "qflux_kernels: keys must be (batch, cylinders, room, 2)");
    const int64_t cylinders = keys.size(1), room = keys.size(2);
    check_argument("keys", keys, {batch, cylinders, room, 2}, like);
    pair.values = given[kValues];
    pair.coefficient = given.optional(kCoefficient);
    pair.coefficient_value = numbers[kCoefficientValue];
    pair.min_gate = given.optional(kMinGate);
    pair.min_gate_value = numbers[kMinGateValue];
    pair.score = score;
    pair.eps = numbers[kScoreEps];
    pair.causal = true;
    sequences = pair.check();
    check_planes("keys", pair.states);
    check_planes("values", *pair.values);
    sequences.settle();
    STD_TORCH_CHECK(pair.states.data_ptr() == keys.data_ptr() &&
                        pair.values->data_ptr() == given[kValues].data_ptr(),
                    "qflux_kernels: keys and values must have batch dimensions of regular strides");
    check_moments(pair, moments);
  }

  int64_t room() const { return pair.rows(); }
  int64_t cylinders() const { return pair.states.size(1); }

  // As a row behind `at` tokens meets it, `indexed` of them by the index.
  template <class T>
  void put(int64_t at, int64_t chunk, int64_t indexed, cpu::LayerParams<T>* p) const {
    STD_TORCH_CHECK(at >= 0 && at < room(), "qflux_kernels: there must be room for a token behind ",
                    at, " others, got room for ", room());
    STD_TORCH_CHECK(indexed >= 0 && indexed <= at && (!indexed || index),
                    "qflux_kernels: ", indexed,
                    " indexed tokens cannot be in front of a token behind ", at);
    p->cylinders = cylinders();
    p->value_dim = pair.value_dim();
    p->averages = has_mass(pair.kind());
    p->keys = sequences.view<T>(pair.states);
    p->values = sequences.view<T>(*pair.values);
    cpu::CachedRows<T>& rows = p->rows;
    rows.pair = pair.params<T>(sequences);
    rows.pair.rows = 1;
    rows.pair.keys = at + 1;
    rows.keys = {sequences.outer(), sequences.inner(),   0, at + 1, pair.value_dim(),
                 as_const(p->keys), as_const(p->values), {}};
    rows.moments = moments_of(moments, sequences);
    rows.tangents = tangents_of<T>(tangents, sequences);
    if (indexed) rows.index = index_of(index, sequences, chunk, indexed);
  }
};

template <class T>
cpu::LayerParams<T> layer_params(const Given& given, const double* eps, Pasts* pasts,
                                 const LayerCache& cache, int64_t width) {
  cpu::LayerParams<T> p{};
  const int64_t gathers = cache.cylinders() * cache.pair.value_dim();
  p.norm = given.norm<T>(kNorm, width, eps[kNormEps]);
  p.convolution = pasts->take<T>(given, kTaps, width);
  const int64_t rows = given.rows(kInputs);
  const int64_t plain = 4 * cache.cylinders() + 2 * gathers;
  STD_TORCH_CHECK(rows == plain || rows == plain + gathers, "qflux_kernels: inputs must have ",
                  plain, " or ", plain + gathers, " rows, got ", rows);
  p.own = rows > plain;
  STD_TORCH_CHECK(!p.own || !given.has(kOwnScale),
                  "qflux_kernels: own_scale must be empty where own values have a projection");
  p.own_scale = given.optional_weight<T>(kOwnScale, {gathers});
  p.inputs = given.linear<T>(kInputs, rows, width);
  p.gathered_norm = given.norm<T>(kGathered, gathers, eps[kGatheredEps]);
  p.output = given.linear<T>(kOutput, width, gathers);
  STD_TORCH_CHECK(given.has(kMlpInputs) == given.has(kMlpOutput),
                  "qflux_kernels: mlp_inputs and mlp_output must come together");
  if (given.has(kMlpInputs)) {
    const int64_t inner = given.rows(kMlpInputs) / 2;
    p.mlp_norm = given.norm<T>(kMlpNorm, width, eps[kMlpNormEps]);
    p.mlp_convolution = pasts->take<T>(given, kMlpTaps, width);
    p.mlp_inputs = given.linear<T>(kMlpInputs, 2 * inner, width);
    p.mlp_output = given.linear<T>(kMlpOutput, width, inner);
  }
  return p;
}

std::tuple<Tensor, Tensor, bool> cache_token(Tensor ids, Tensor angle, Tensors weights, Numbers eps,
                                             Numbers bounds, Tensors pasts, Tensors caches,
                                             int64_t at, int64_t chunk, Integers indexed,
                                             Integers scores, Numbers numbers) {
  const size_t layers = scores.size();
  STD_TORCH_CHECK(layers > 0 && weights.size() == layers * kWeights + kEnds &&
                      eps.size() == layers * kEps + 1 && caches.size() == layers * kCaches &&
                      indexed.size() == layers && numbers.size() == layers * kNumbers &&
                      bounds.size() == 2,
                  "qflux_kernels: the lists must have as many layers as scores, ", layers);
  const Tensor* const around = &weights[layers * kWeights];
  const Tensor& like = around[kRadiusLogit];
  STD_TORCH_CHECK(!like.is_cuda() && (like.scalar_type() == ScalarType::Float ||
                                      like.scalar_type() == ScalarType::Double),
                  "qflux_kernels: weights must be float32 or float64 on a CPU");
  const Given ends(around, kEndNames, like);
  check_argument("ids", ids, {-1}, like, Holds::kIntegers);
  if (!ids.is_contiguous()) ids = torch::stable::contiguous(ids);
  check_shape("radius_logit", like, {-1, -1});
  const int64_t batch = ids.size(0), vocabulary = like.size(0), points = like.size(1);
  const int64_t width = ends.rows(kProjection);
  Pasts inputs(pasts, batch, width, like);
  const Tensor out = empty(like, {batch, width});
  bool served = true;
  with_dtype(like, [&](auto zero) {
    using T = decltype(zero);
    cpu::Device device;  // for an instruction set that is not there
    cpu::TokenParams<T> p{};
    p.batch = batch;
    p.hidden = width;
    p.ids = pointer<int64_t>(ids);
    p.embedding = {vocabulary,
                   points,
                   ends.weight<T>(kRadiusLogit, {vocabulary, points}),
                   ends.weight<T>(kPhase, {vocabulary, points}),
                   bounds[0],
                   bounds[1]};
    p.projection = ends.linear<T>(kProjection, width, 2 * points);
    p.layers.reserve(layers);
    std::deque<LayerCache> parts;  // with copies of what has other strides than it should
    for (size_t n = 0; n < layers; ++n) {
      const LayerCache& cache = parts.emplace_back(Given(&caches[n * kCaches], kCacheNames, like),
                                                   &numbers[n * kNumbers], scores[n], batch, like);
      const Given given(&weights[n * kWeights], kWeightNames, like);
      p.layers.push_back(layer_params<T>(given, &eps[n * kEps], &inputs, cache, width));
      cache.put(at, chunk, indexed[n], &p.layers.back());
      check_argument("angle", angle, {cache.cylinders()}, like);
    }
    STD_TORCH_CHECK(inputs.all_used(), "qflux_kernels: pasts must be one for each convolution");
    STD_TORCH_CHECK(angle.is_contiguous(), "qflux_kernels: angle must be contiguous");
    p.angle = pointer<T>(angle);
    p.norm = ends.norm<T>(kLastNorm, width, eps.back());
    p.out = pointer<T>(out);
    if (out.numel() > 0) served = cpu::step_token(p);
  });
  return {out, inputs.next(), served};
}

}  // namespace ops
}  // namespace
}  // namespace qflux

STABLE_TORCH_LIBRARY_IMPL(qflux_kernels, CPU, m) {
  m.impl("cache_token", TORCH_BOX(&qflux::ops::cache_token));
}
