// Shares blocks of owners among threads and writes what they get.
#include "device.h"

#include <limits>
#include <vector>

#include "isa/dispatch.h"
#include "parallel.h"
#include "staging.h"
#include "sweep/driver.h"
#include "tree/driver.h"

namespace qflux::cpu {
namespace {

// Rows and keys from which the sweep, or for a mass the tree, is faster, by measurement
// (docs/subquadratic.md). A forward by trees searches for its thresholds, a backward has them.
constexpr int64_t kSweepFrom = 2048, kCausalSweepFrom = 8192;
constexpr int64_t kTreeFrom = 6144, kCausalTreeFrom = 24576;
constexpr int64_t kTreeBackwardFrom = 4096, kCausalTreeBackwardFrom = 8192;

// Numbers that are staged at a time, about: 32 MB in float. A short sequence takes many times its
// own memory, since its planes are padded.
constexpr int64_t kMostStaged = int64_t{1} << 23;

// From here on, the sequences of a batch that begin at `first`.
template <class T>
void begin_at(View<T>& view, BatchIndex first) {
  if (view) view.data = view.sequence(first);
}
template <class T>
void begin_at(PerSequence<T>& number, BatchIndex first) {
  if (number) number.data += first.outer * number.outer + first.inner * number.inner;
}
template <class T>
void begin_at(PairParams<T>& p, BatchIndex first) {
  for (View<const T>* view : {&p.states, &p.key_points, &p.values}) begin_at(*view, first);
  for (PerSequence<T>* number : {&p.coefficient, &p.min_gate}) begin_at(*number, first);
  begin_at(p.lengths, first);
}
template <class T>
void begin_at(InteractParams<T>& p, BatchIndex first) {
  begin_at(p.pair, first);
  for (View<T>* view : {&p.context, &p.strength, &p.threshold}) begin_at(*view, first);
  begin_at(p.degree, first);
}
template <class T>
void begin_at(InteractBackwardParams<T>& p, BatchIndex first) {
  begin_at(p.pair, first);
  for (View<const T>* view : {&p.grad_context, &p.grad_strength, &p.threshold})
    begin_at(*view, first);
  for (View<T>* view :
       {&p.grad_states, &p.grad_keys, &p.grad_values, &p.grad_coefficient, &p.grad_threshold})
    begin_at(*view, first);
}

// Calls body(params) for parts of the batch that are staged one after the other.
template <class Params, class Body>
void for_each_part(const Params& params, const Body& body) {
  const auto& p = params.pair;
  const int64_t planes = 4 + (p.values ? p.value_dim : 2);
  const int64_t most = std::max<int64_t>(
      1, kMostStaged / (planes * (round_up(p.rows, kPadding) + round_up(p.keys, kPadding))));
  if (p.batch() <= most) return body(params);
  const int64_t inner = std::min(p.inner, most), outer = std::max<int64_t>(1, most / p.inner);
  for (int64_t o = 0; o < p.outer; o += outer)
    for (int64_t i = 0; i < p.inner; i += inner) {
      Params part = params;
      begin_at(part, {o, i});
      part.pair.outer = std::min(outer, p.outer - o);
      part.pair.inner = std::min(inner, p.inner - i);
      body(part);
    }
}

// Whether a method below O(S^2) is asked for, or pays.
template <class T>
bool chooses_sweep(const PairParams<T>& p, bool backward) {
  const bool mass = has_mass(p.score);
  if (!(is_affine(p.score) || mass) || p.algorithm == Algorithm::kDense) return false;
  if (p.rows > std::numeric_limits<int32_t>::max() || p.keys > std::numeric_limits<int32_t>::max())
    return false;
  int64_t from = p.causal ? kCausalSweepFrom : kSweepFrom;
  if (mass && backward)
    from = p.causal ? kCausalTreeBackwardFrom : kTreeBackwardFrom;
  else if (mass)
    from = p.causal ? kCausalTreeFrom : kTreeFrom;
  return p.algorithm == Algorithm::kSweep || std::min(p.rows, p.keys) >= from;
}

// Owners of one block: `last` bounds those inside the sequence, `end` those with a result to write.
struct Owners {
  int64_t first, last, end;
  Owners(int64_t block, int64_t count, int64_t valid)
      : first(block * kBlock), end(std::min(first + kBlock, count)) {
    last = std::min(end, valid);
  }
};

// The results of row i from its sums before the reduction; S is T, or double from a sweep.
template <class T, class S>
void write_row(const InteractParams<T>& params, BatchIndex b, const Visibility& visibility,
               int64_t i, T tau, const S* context, S strength, int32_t degree, int64_t value_dim) {
  const int64_t visible = visibility.visible_keys(i);
  T scale = params.pair.reduction_scale(visible);
  // No comparison with an undefined threshold means anything.
  if (tau != tau && visible > 0) scale = std::numeric_limits<T>::quiet_NaN();
  for (int64_t c = 0; c < value_dim; ++c)
    params.context.at(b, i, c) = visible > 0 ? static_cast<T>(scale * context[c]) : T(0);
  if (params.strength)
    params.strength.at(b, i) = visible > 0 ? static_cast<T>(scale * strength) : T(0);
  if (params.degree) params.degree.at(b, i) = visible > 0 ? degree : 0;
  params.threshold.at(b, i) = tau;
}

// The gradients of row i's query, pulled back to its state, and of its threshold. A row that sees
// nothing has none, whatever it holds.
template <class Score, class T>
void write_row_gradient(const InteractBackwardParams<T>& params, BatchIndex b,
                        const Visibility& visibility, int64_t i, Point<T> grad, T grad_limit) {
  const PairParams<T>& p = params.pair;
  if (params.grad_threshold) params.grad_threshold.at(b, i) = grad_limit;
  Point<T> pulled{T(0), T(0)};
  if (visibility.visible_keys(i) > 0) {
    pulled = Score::query_vjp(grad, p.coefficient[b]);
    if (Score::kCoefficientInQuery && params.grad_coefficient)
      params.grad_coefficient.at(b, i) += Score::coefficient_vjp(grad, load_point(p.states, b, i));
  }
  if (!params.grad_states) return;
  if (params.accumulate) {
    const Point<T> old = load_point(as_const(params.grad_states), b, i);
    pulled = {old.x + pulled.x, old.y + pulled.y};
  }
  store_point(params.grad_states, b, i, pulled);
}

template <class T, class S>
void write_key_gradient(const InteractBackwardParams<T>& params, BatchIndex b, int64_t j,
                        const S* point, const S* values) {
  if (params.grad_keys) {
    Point<T> grad{static_cast<T>(point[0]), static_cast<T>(point[1])};
    if (params.keys_are_states) {
      const Point<T> old = load_point(as_const(params.grad_keys), b, j);
      grad = {old.x + grad.x, old.y + grad.y};
    }
    store_point(params.grad_keys, b, j, grad);
  }
  if (params.grad_values)
    for (int64_t c = 0; c < params.pair.value_dim; ++c)
      params.grad_values.at(b, j, c) = static_cast<T>(values[c]);
}

// Numbers of a block's owners, `width` each. A few stand on the stack.
template <class T>
class BlockRoom {
 public:
  explicit BlockRoom(int64_t width)
      : many_(width > kFew ? room<T>(kBlock * width) : nullptr),
        numbers_(many_ ? many_.get() : few_) {}
  BlockRoom(const BlockRoom&) = delete;
  T* get() const { return numbers_; }

 private:
  static constexpr int64_t kFew = 8;
  T few_[kBlock * kFew];
  const std::unique_ptr<T[]> many_;
  T* const numbers_;
};

template <class T>
void forward_block(const InteractParams<T>& params, const Staging<T>& staging, BatchIndex b,
                   int64_t block) {
  const Sequence<T> sequence = staging.sequence(b);
  const Owners rows(block, params.pair.rows, sequence.visibility.row_end);
  const int64_t value_dim = staging.value_dim;
  const BlockRoom<T> context(value_dim);
  T strength[kBlock];
  int32_t degree[kBlock];
  if (rows.first < rows.last)
    loops<T>().dense.forward(sequence, rows.first, rows.last,
                             {context.get(), strength, params.degree ? degree : nullptr,
                              staging.limits(b), staging.limit_rests(b)});
  for (int64_t i = rows.first; i < rows.end; ++i) {
    const int64_t n = i - rows.first;
    write_row(params, b, sequence.visibility, i, sequence.limit[i], context.get() + n * value_dim,
              strength[n], degree[n], value_dim);
  }
}

template <class T>
void backward_row_block(const InteractBackwardParams<T>& params, const Staging<T>& staging,
                        BatchIndex b, int64_t block) {
  const Sequence<T> sequence = staging.sequence(b);
  const Owners rows(block, params.pair.rows, sequence.visibility.row_end);
  T point[2 * kBlock] = {}, limit[kBlock] = {};
  if (rows.first < rows.last)
    loops<T>().dense.backward_rows(sequence, rows.first, rows.last, {point, nullptr, limit});
  if (has_mass(params.pair.score))
    std::copy(limit, limit + (rows.end - rows.first), staging.grad_strengths(b) + rows.first);
  visit_score(params.pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<T>;
    for (int64_t i = rows.first; i < rows.end; ++i) {
      const int64_t n = i - rows.first;
      write_row_gradient<Score>(params, b, sequence.visibility, i, {point[2 * n], point[2 * n + 1]},
                                limit[n]);
    }
  });
}

template <class T>
void backward_key_block(const InteractBackwardParams<T>& params, const Staging<T>& staging,
                        BatchIndex b, int64_t block) {
  const PairParams<T>& p = params.pair;
  const Sequence<T> sequence = staging.sequence(b);
  const Owners keys(block, p.keys, sequence.visibility.key_end);
  T point[2 * kBlock] = {};
  const int64_t value_dim = p.values ? staging.value_dim : 0;
  const BlockRoom<T> values(value_dim);
  std::fill(values.get(), values.get() + kBlock * value_dim, T(0));
  if (keys.first < keys.last)
    loops<T>().dense.backward_keys(sequence, keys.first, keys.last, {point, values.get()});
  for (int64_t j = keys.first; j < keys.end; ++j) {
    const int64_t n = j - keys.first;
    write_key_gradient(params, b, j, point + 2 * n, values.get() + n * staging.value_dim);
  }
}

// Calls body(b) for every sequence: one a thread where there are enough, else one after the other
// with the threads inside.
template <class T, class Body>
void for_each_sequence(const PairParams<T>& p, const Body& body) {
  if (p.batch() >= 2 * thread_count())
    for_each_block(p.batch(), 1, false, 1, [&](int64_t n, int64_t) { body(p.index(n)); });
  else
    for (int64_t n = 0; n < p.batch(); ++n) body(p.index(n));
}

// Calls body(i) for the tokens of one sequence.
template <class Body>
void for_each_token_of(int64_t tokens, const Body& body) {
  for_each_block(1, ceil_div(tokens, kMomentsTile), false, 1, [&](int64_t, int64_t tile) {
    const auto [first, last] = tile_range(tile, kMomentsTile, tokens);
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

void count_visible_pairs(const Visibility& visible, int64_t* count) {
  for (int64_t row = 0; row < visible.row_end; ++row)
    __atomic_fetch_add(count, visible.visible_keys(row), __ATOMIC_RELAXED);
}

template <class T>
bool swept(const InteractParams<T>& params, const Staging<T>& staging, BatchIndex b) {
  const int64_t rows = params.pair.rows, value_dim = staging.value_dim;
  std::vector<double> context(rows * value_dim, 0.0), strength(rows, 0.0);
  std::vector<int32_t> degree(rows, 0);
  const Sequence<T> sequence = staging.sequence(b);
  if (has_mass(params.pair.score)) {
    std::vector<T> tau(rows, T(0));
    if (!tree_forward(loops<T>(), sequence,
                      {context.data(), degree.data(), tau.data(), params.work}))
      return false;
    for_each_token_of(rows, [&](int64_t i) {
      write_row(params, b, sequence.visibility, i, tau[i], &context[i * value_dim], 1.0, degree[i],
                value_dim);
    });
    return true;
  }
  if (!sweep_forward(loops<T>(), sequence,
                     {context.data(), strength.data(), degree.data(), params.work}))
    return false;
  for_each_token_of(rows, [&](int64_t i) {
    write_row(params, b, sequence.visibility, i, sequence.limit[i], &context[i * value_dim],
              strength[i], degree[i], value_dim);
  });
  return true;
}

template <class T>
bool swept_backward(const InteractBackwardParams<T>& params, const Staging<T>& staging,
                    BatchIndex b, bool need_rows, bool need_keys) {
  const PairParams<T>& p = params.pair;
  const int64_t value_dim = staging.value_dim;
  std::vector<double> query(need_rows ? 2 * p.rows : 0, 0.0), key(need_keys ? 2 * p.keys : 0, 0.0);
  std::vector<double> values(need_keys && p.values ? p.keys * value_dim : 0, 0.0);
  std::vector<double> limit(params.grad_threshold ? p.rows : 0, 0.0);
  double *const to_query = need_rows ? query.data() : nullptr, *const to_key =
                                                                   need_keys ? key.data() : nullptr;
  const Sequence<T> sequence = staging.sequence(b);
  if (has_mass(p.score) ? !tree_backward(loops<T>(), sequence, {to_query, to_key, values.data()})
                        : !sweep_backward(loops<T>(), sequence,
                                          {to_query, to_key, values.data(),
                                           limit.empty() ? nullptr : limit.data()}))
    return false;
  if (need_rows)
    visit_score(p.score, [&](auto tag) {
      using Score = typename decltype(tag)::template of<T>;
      for_each_token_of(p.rows, [&](int64_t i) {
        write_row_gradient<Score>(params, b, sequence.visibility, i,
                                  {static_cast<T>(query[2 * i]), static_cast<T>(query[2 * i + 1])},
                                  limit.empty() ? T(0) : static_cast<T>(limit[i]));
      });
    });
  if (need_keys)
    for_each_token_of(p.keys, [&](int64_t j) {
      write_key_gradient(params, b, j, &key[2 * j], values.data() + j * value_dim);
    });
  return true;
}

template <class T>
void interact_part(const InteractParams<T>& params) {
  const PairParams<T>& p = params.pair;
  const Staging<T> staging(p);
  const int64_t count = ceil_div(p.rows, kBlock), grain = grain_for(kBlock * p.keys);
  if (!chooses_sweep(p, false))
    return for_each_block(p.batch(), count, p.causal, grain, [&](int64_t n, int64_t block) {
      forward_block(params, staging, p.index(n), block);
    });
  for_each_sequence(p, [&](BatchIndex b) {
    if (swept(params, staging, b)) return;
    for_each_block(1, count, p.causal, grain,
                   [&](int64_t, int64_t block) { forward_block(params, staging, b, block); });
    if (params.work) count_visible_pairs(p.visibility(b), params.work);
  });
}

template <class T>
void interact_backward_part(const InteractBackwardParams<T>& params) {
  const PairParams<T>& p = params.pair;
  const Staging<T> staging(params);
  // The key pass of a mass starts from what its row pass found.
  const bool need_rows = params.grad_states || params.grad_coefficient || has_mass(p.score);
  const bool need_keys = params.grad_keys || params.grad_values;
  // The blocks of `count` sequences, of which `index` gives the place.
  const auto dense = [&](int64_t count, const auto& index) {
    if (need_rows)
      for_each_block(
          count, ceil_div(p.rows, kBlock), p.causal, grain_for(kBlock * p.keys),
          [&](int64_t n, int64_t block) { backward_row_block(params, staging, index(n), block); });
    if (need_keys)
      for_each_block(
          count, ceil_div(p.keys, kBlock), p.causal, grain_for(kBlock * p.rows),
          [&](int64_t n, int64_t block) { backward_key_block(params, staging, index(n), block); });
  };
  if (!chooses_sweep(p, true)) return dense(p.batch(), [&](int64_t n) { return p.index(n); });
  for_each_sequence(p, [&](BatchIndex b) {
    if (!swept_backward(params, staging, b, need_rows, need_keys))
      dense(1, [&](int64_t) { return b; });
  });
}

}  // namespace

Device::Device() { instruction_set(); }

template <class T>
void Device::interact(const InteractParams<T>& params) {
  if (params.pair.batch() == 0 || params.pair.rows == 0) return;
  for_each_part(params, [](const InteractParams<T>& part) { interact_part(part); });
}

template <class T>
void Device::interact_backward(const InteractBackwardParams<T>& params) {
  if (params.pair.batch() == 0) return;
  for_each_part(params,
                [](const InteractBackwardParams<T>& part) { interact_backward_part(part); });
}

template <class T>
void Device::threshold_backward(const ThresholdBackwardParams<T>& params) {
  for_each_block(
      params.pair.batch(), 1, false, grain_for(kTokenCost * params.pair.rows),
      [&](int64_t n, int64_t) { loops<T>().statistics.backward(params, params.pair.index(n)); });
}

template void Device::interact(const InteractParams<float>&);
template void Device::interact(const InteractParams<double>&);
template void Device::interact_backward(const InteractBackwardParams<float>&);
template void Device::interact_backward(const InteractBackwardParams<double>&);
template void Device::threshold_backward(const ThresholdBackwardParams<float>&);
template void Device::threshold_backward(const ThresholdBackwardParams<double>&);

}  // namespace qflux::cpu
