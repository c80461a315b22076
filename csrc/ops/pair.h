// The arguments that interact and evolve share, from tensors to params.
#pragma once

#include "../cuda/common/launch.h"
#include "on_device.h"
#include "tensors.h"

namespace qflux {

// As they stand in the schemas; an op with fewer of them leaves the others as they are here.
struct PairArguments {
  Tensor states;  // in the backward of evolve: anything of their shape
  OptionalTensor keys = std::nullopt, values = std::nullopt, coefficient = std::nullopt;
  double coefficient_value = 0;
  OptionalTensor min_gate = std::nullopt;
  double min_gate_value = 0;
  OptionalTensor lengths = std::nullopt;
  int64_t score = static_cast<int64_t>(ScoreKind::kHardThreshold);
  double eps = 0;
  bool whole_window = false, causal = false, mean = false;
  int64_t algorithm = static_cast<int64_t>(Algorithm::kAuto);

  int64_t rows() const { return states.size(states.dim() - 2); }
  int64_t key_count() const { return keys ? keys->size(keys->dim() - 2) : rows(); }
  int64_t value_dim() const { return values ? values->size(values->dim() - 1) : 2; }
  ScoreKind kind() const { return static_cast<ScoreKind>(score); }

  // Kernels never see an empty tensor: its null pointer would read as an argument left out.
  bool any_pairs() const {
    return states.numel() > 0 && (!keys || keys->numel() > 0) && (!values || values->numel() > 0);
  }

  // Checks all and returns their batch, which is still to be settled. The arguments stay where they
  // are from then on.
  Batch check() {
    check_states(states);
    Batch batch(states, 2);
    if (keys) check_argument("keys", *keys, batch.shape({-1, 2}), states, Holds::kStored);
    if (values)
      check_argument("values", *values, batch.shape({key_count(), -1}), states, Holds::kStored);
    if (coefficient) check_argument("coefficient", *coefficient, batch.shape(), states);
    if (min_gate) check_argument("min_gate", *min_gate, batch.shape(), states);
    if (lengths) check_argument("lengths", *lengths, batch.shape(), states, Holds::kIntegers);
    STD_TORCH_CHECK(!lengths || key_count() == rows(),
                    "qflux_kernels: lengths needs as many keys as states");
    STD_TORCH_CHECK(score >= 0 && score < kScores, "qflux_kernels: score must be 0 to ",
                    kScores - 1, " (", kScoreNames, "), got ", score);
    STD_TORCH_CHECK(algorithm >= 0 && algorithm < kAlgorithms,
                    "qflux_kernels: algorithm must be 0 to ", kAlgorithms - 1, " (",
                    kAlgorithmNames, "), got ", algorithm);
    STD_TORCH_CHECK(storage_of(states) == Storage::kSame ||
                        algorithm != static_cast<int64_t>(Algorithm::kSweep),
                    "qflux_kernels: a sweep on a GPU takes no half precision");
    batch.include(states);
    for (OptionalTensor* tensor : {&keys, &values, &coefficient, &min_gate, &lengths})
      batch.include(*tensor);
    return batch;
  }

  template <class T>
  PairParams<T> params(const Batch& batch) const {
    PairParams<T> p{};
    p.outer = batch.outer();
    p.inner = batch.inner();
    p.rows = rows();
    p.keys = key_count();
    p.value_dim = value_dim();
    p.score = kind();
    p.eps = eps;
    p.whole_window = whole_window;
    p.causal = causal;
    p.mean = mean;
    p.algorithm = static_cast<Algorithm>(algorithm);
    p.coefficient = batch.per_sequence<T>(coefficient, coefficient_value);
    p.min_gate = batch.per_sequence<T>(min_gate, min_gate_value);
    p.lengths = batch.per_sequence<int64_t>(lengths, 0);
    p.states = batch.const_view<T>(states);
    p.key_points = keys ? batch.const_view<T>(*keys) : p.states;
    if (values) p.values = batch.const_view<T>(*values);
    return p;
  }

  // [batch][rows], where rows leave their parts of the gradient of the coefficient.
  Tensor coefficient_parts(const Batch& batch) const {
    return coefficient ? zeros(states, batch.shape({rows()}), compute_dtype(states))
                       : nothing(states);
  }
  // The gradient of the coefficient, from those.
  Tensor coefficient_gradient(const Tensor& parts) const {
    return coefficient ? sum_rows(parts) : nothing(states);
  }

  // Whether a forward that saves for a backward leaves the KeptSums of its rows. On a CPU they take
  // longer than the pairs of a backward that they spare (benchmarks/README.md).
  bool keeps_sums() const {
    return has_kept_sums(kind()) && !values && states.is_cuda() &&
           algorithm != static_cast<int64_t>(Algorithm::kSweep);
  }
  // How many numbers of a row's kept keys `interact` leaves for its backward. Those of a mass it
  // gathers anyway.
  int64_t moments(bool save) const {
    if (save && keeps_sums()) return kKeptSums;
    return has_mass(kind()) && values && states.is_cuda() ? kKeptMoments : 0;
  }

  // For PairParams, of a score that needs it.
  Tensor row_scratch(const Batch& batch) const {
    const bool needed = has_mass(kind()) && states.is_cuda();
    return needed ? empty(states, batch.shape({rows()}), compute_dtype(states)) : nothing(states);
  }

  // For ThresholdBackwardParams.
  Tensor window_grads(const Batch& batch) const {
    return empty(states, batch.shape({rows(), kWindowSums}), ScalarType::Double);
  }
};

// What meeting the pairs on a GPU needs: a sweep its scratch, which get() returns, and passes over
// all pairs their partials, which come into the params.
class PairScratch {
 public:
  template <class T>
  PairScratch(const Tensor& like, PairParams<T>& pair, bool backward) {
    // No crossover is measured on a GPU yet: kAuto is dense there.
    const bool sweeps =
        pair.algorithm == Algorithm::kSweep && pair.score == ScoreKind::kHardThreshold;
    sweep_ = allocate(like, sweeps ? cuda::sweep_bytes(pair, backward) : 0);
    partials_ = allocate(like, sweep_ ? 0 : cuda::partial_bytes(pair, backward));
    pair.partials = pointer<T>(partials_);
  }
  void* get() const { return pointer<void>(sweep_); }

 private:
  static OptionalTensor allocate(const Tensor& like, int64_t bytes) {
    if (bytes == 0) return std::nullopt;
    return empty(like, {bytes}, ScalarType::Byte);
  }

  OptionalTensor sweep_, partials_;
};

}  // namespace qflux
