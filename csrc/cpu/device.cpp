// Stages sequences into planes, finds their thresholds and shares blocks of owners among threads.
#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../math/score.h"
#include "isa/dense.h"
#include "sweep/sweep.h"

namespace qflux::cpu {
namespace {

struct InstructionSetChoice {
  const InstructionSet& dense;
  const SweepInstructionSet& sweep;
};

InstructionSetChoice choose_instruction_set() {
#if defined(QFLUX_X86)
  const char* wanted = std::getenv("QFLUX_INSTRUCTION_SET");
  const auto allowed = [&](const InstructionSet& set) {
    return wanted == nullptr || std::strcmp(wanted, set.name) == 0;
  };
  __builtin_cpu_init();
  const bool fused = __builtin_cpu_supports("fma");
  const bool wide = fused && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  if (wide && allowed(kAvx512)) return {kAvx512, kSweepAvx512};
  if (fused && __builtin_cpu_supports("avx2") && allowed(kAvx2)) return {kAvx2, kSweepAvx2};
#endif
  return {kBaseline, kSweepBaseline};
}

const InstructionSetChoice& chosen() {
  static const InstructionSetChoice choice = choose_instruction_set();
  return choice;
}

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return chosen().dense.single;
}
template <>
const Kernels<double>& kernels<double>() {
  return chosen().dense.twice;
}

template <class T>
const SweepLoops<T>& loops();
template <>
const SweepLoops<float>& loops<float>() {
  return chosen().sweep.single;
}
template <>
const SweepLoops<double>& loops<double>() {
  return chosen().sweep.twice;
}

// Rows and keys from which the sweep is faster, by measurement (benchmarks/README.md).
constexpr int64_t kSweepFrom = 2048, kCausalSweepFrom = 8192;

template <class T>
bool chooses_sweep(const PairParams<T>& p) {
  if (!has_threshold(p.score) || p.algorithm == Algorithm::kDense) return false;
  if (p.rows > std::numeric_limits<int32_t>::max() || p.keys > std::numeric_limits<int32_t>::max())
    return false;
  return p.algorithm == Algorithm::kSweep ||
         std::min(p.rows, p.keys) >= (p.causal ? kCausalSweepFrom : kSweepFrom);
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Range {
  int64_t first, last;
};
Range tile_range(int64_t tile, int64_t end) {
  const int64_t first = tile * kMomentsTile;
  return {first, first + kMomentsTile < end ? first + kMomentsTile : end};
}

// Runs body(b, block) for every block of every sequence. `balanced` pairs the first block with the
// last, whose shares of a causal triangle add up to the same work everywhere.
template <class Body>
void for_each_block(int64_t batch, int64_t count, bool balanced, int64_t grain, const Body& body) {
  const int64_t items = balanced ? (count + 1) / 2 : count;
  if (batch * items == 0) return;
  torch::stable::parallel_for(0, batch * items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / items, item = n % items;
      body(b, item);
      if (balanced && count - 1 - item != item) body(b, count - 1 - item);
    }
  });
}

// Enough blocks for a thread that its share is worth waking it for.
int64_t grain_for(int64_t pairs_per_block) {
  constexpr int64_t kPairs = 1 << 15;
  return pairs_per_block >= kPairs ? 1 : kPairs / (pairs_per_block < 1 ? 1 : pairs_per_block);
}

// The planes and records of every sequence of a call.
template <class T>
class Staging {
 public:
  Staging(const PairParams<T>& params, bool backward)
      : p(params),
        depth(params.values ? params.depth : 2),
        row_stride(round_up(params.rows, kPadding)),
        key_stride(round_up(params.keys, kPadding)),
        row_planes(3 + (backward ? depth + 1 : 0)),
        key_planes(2 + (backward && params.values ? depth : 0)),
        value_records(params.values && params.values.component != 1 ? depth : 0),
        grad_records(backward && params.values ? depth : 0),
        rows_(allocate(row_planes * row_stride)),
        keys_(allocate(key_planes * key_stride)),
        values_(allocate(value_records * params.keys)),
        grads_(allocate(grad_records * params.rows)) {}

  T* row_plane(int64_t b, int64_t plane) const {
    return rows_.get() + (b * row_planes + plane) * row_stride;
  }
  T* key_plane(int64_t b, int64_t plane) const {
    return keys_.get() + (b * key_planes + plane) * key_stride;
  }
  T* grad_record(int64_t b, int64_t row) const {
    return grads_.get() + (b * p.rows + row) * grad_records;
  }

  Sequence<T> sequence(int64_t b) const {
    Sequence<T> s{};
    s.visibility = p.visibility(b);
    s.depth = depth;
    s.score = p.score;
    s.eps = static_cast<T>(p.eps);
    s.min_gate = p.min_gate[b];
    s.row_window = p.row_window;
    s.query_x = row_plane(b, 0);
    s.query_y = row_plane(b, 1);
    s.limit = row_plane(b, 2);
    s.key_x = key_plane(b, 0);
    s.key_y = key_plane(b, 1);
    if (p.values) {
      s.values = value_records ? value_record(b, 0) : p.values.data + b * p.values.batch;
      s.value_stride = value_records ? depth : p.values.token;
    }
    if (row_planes > 3) {
      s.grad = row_plane(b, 3);
      s.grad_strength = row_plane(b, 3 + depth);
    }
    if (grad_records) {
      s.grad_records = grad_record(b, 0);
      s.value_planes = key_plane(b, 2);
    }
    s.row_stride = row_stride;
    s.key_stride = key_stride;
    return s;
  }

  void stage_keys(int64_t b, int64_t first, int64_t last) const {
    T *x = key_plane(b, 0), *y = key_plane(b, 1);
    for (int64_t j = first; j < last; ++j) {
      const Point<T> key = load_point(p.key_points, b, j);
      x[j] = key.x;
      y[j] = key.y;
    }
    for (int64_t c = 2; c < key_planes; ++c) {
      T* plane = key_plane(b, c);
      for (int64_t j = first; j < last; ++j) plane[j] = p.values.at(b, j, c - 2);
    }
    if (value_records)
      for (int64_t j = first; j < last; ++j)
        for (int64_t c = 0; c < depth; ++c) value_record(b, j)[c] = p.values.at(b, j, c);
    if (last == p.keys)
      for (int64_t c = 0; c < key_planes; ++c)
        std::fill(key_plane(b, c) + last, key_plane(b, c) + key_stride, T(0));
  }

  void stage_queries(int64_t b, int64_t first, int64_t last) const {
    T *x = row_plane(b, 0), *y = row_plane(b, 1);
    for (int64_t i = first; i < last; ++i) {
      const Point<T> state = load_point(p.states, b, i);
      const Point<T> q = has_threshold(p.score) ? ThresholdPair<T>::query(state, T(0))
                                                : GatePair<T>::query(state, p.coefficient[b]);
      x[i] = q.x;
      y[i] = q.y;
    }
    if (last == p.rows)
      for (int64_t c = 0; c < row_planes; ++c)
        std::fill(row_plane(b, c) + last, row_plane(b, c) + row_stride, T(0));
  }

  const PairParams<T>& p;
  const int64_t depth, row_stride, key_stride, row_planes, key_planes, value_records, grad_records;

 private:
  std::unique_ptr<T[]> allocate(int64_t per_sequence) const {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(p.batch * per_sequence)]);
  }
  T* value_record(int64_t b, int64_t key) const {
    return values_.get() + (b * p.keys + key) * depth;
  }

  std::unique_ptr<T[]> rows_, keys_, values_, grads_;
};

// Sums over keys [first, last) relative to the sequence's first key.
template <class T>
Moments moments(const Staging<T>& staging, int64_t b, int64_t first, int64_t last) {
  const T *x = staging.key_plane(b, 0), *y = staging.key_plane(b, 1);
  const double shift_x = x[0], shift_y = y[0];
  Moments sums;
  for (int64_t j = first; j < last; ++j) sums.add(x[j] - shift_x, y[j] - shift_y);
  return sums;
}

// tau of rows [first, last), whose keys' moments before each tile stand in `before`.
template <class T>
void row_thresholds(const Staging<T>& staging, const Moments* before, int64_t b, int64_t first,
                    int64_t last) {
  const PairParams<T>& p = staging.p;
  const Visibility visibility = p.visibility(b);
  const T *x = staging.key_plane(b, 0), *y = staging.key_plane(b, 1);
  const double shift_x = x[0], shift_y = y[0];
  const bool whole = p.row_window || !p.causal;
  const int64_t start = whole ? visibility.key_end : visibility.visible_keys(first);
  int64_t n = start / kMomentsTile * kMomentsTile;
  Moments inside = moments(staging, b, n, start), windows[kMomentsTile];
  T state_x[kMomentsTile], state_y[kMomentsTile];
  n = start;
  for (int64_t i = first; i < last; ++i) {
    const int64_t end = whole ? start : visibility.visible_keys(i);
    for (; n < end; ++n) {
      if (n % kMomentsTile == 0) inside = Moments{};
      inside.add(x[n] - shift_x, y[n] - shift_y);
    }
    // A window that ends with a tile still counts as that tile's.
    Moments window =
        before[n % kMomentsTile == 0 && n > start ? n / kMomentsTile - 1 : n / kMomentsTile];
    window.add(inside);
    windows[i - first] = window;
    const Point<T> state = load_point(p.states, b, i);
    state_x[i - first] = state.x;
    state_y[i - first] = state.y;
  }
  T* tau = staging.row_plane(b, 2) + first;
  kernels<T>().thresholds(windows, state_x, state_y, last - first, {shift_x, shift_y},
                          p.coefficient[b], p.eps, tau);
  for (int64_t i = first; i < last; ++i)
    if (visibility.visible_keys(i) == 0) tau[i - first] = T(0);
}

template <class T>
void stage_forward(const Staging<T>& staging) {
  const PairParams<T>& p = staging.p;
  const int64_t key_tiles = blocks(p.keys, kMomentsTile), row_tiles = blocks(p.rows, kMomentsTile);
  const bool statistics = has_threshold(p.score);
  const int64_t grain = grain_for(kMomentsTile * 16);
  // before[b][tile]: moments of the keys in front of a tile.
  const std::unique_ptr<Moments[]> before(
      new Moments[statistics ? static_cast<size_t>(p.batch * (key_tiles + 1)) : 0]);
  for_each_block(p.batch, key_tiles, false, grain, [&](int64_t b, int64_t tile) {
    const auto [first, last] = tile_range(tile, p.keys);
    staging.stage_keys(b, first, last);
  });
  if (statistics) {
    for_each_block(p.batch, key_tiles, false, grain, [&](int64_t b, int64_t tile) {
      const auto [first, last] = tile_range(tile, p.visibility(b).key_end);
      if (first < last) before[b * (key_tiles + 1) + tile + 1] = moments(staging, b, first, last);
    });
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t tile = 1; tile <= key_tiles; ++tile)
        before[b * (key_tiles + 1) + tile].add(before[b * (key_tiles + 1) + tile - 1]);
  }
  for_each_block(p.batch, row_tiles, false, grain, [&](int64_t b, int64_t tile) {
    const auto [first, last] = tile_range(tile, p.rows);
    staging.stage_queries(b, first, last);
    T* limit = staging.row_plane(b, 2);
    if (statistics && p.keys > 0)
      row_thresholds(staging, before.get() + b * (key_tiles + 1), b, first, last);
    else
      std::fill(limit + first, limit + last, T(0));
  });
}

template <class T>
void stage_backward(const Staging<T>& staging, const InteractBackwardParams<T>& backward) {
  const PairParams<T>& p = staging.p;
  const int64_t grain = grain_for(kMomentsTile * 16);
  for_each_block(p.batch, blocks(p.keys, kMomentsTile), false, grain, [&](int64_t b, int64_t tile) {
    const auto [first, last] = tile_range(tile, p.keys);
    staging.stage_keys(b, first, last);
  });
  for_each_block(p.batch, blocks(p.rows, kMomentsTile), false, grain, [&](int64_t b, int64_t tile) {
    const auto [first, last] = tile_range(tile, p.rows);
    staging.stage_queries(b, first, last);
    const Visibility visibility = p.visibility(b);
    T *limit = staging.row_plane(b, 2), *strength = staging.row_plane(b, 3 + staging.depth);
    for (int64_t i = first; i < last; ++i) {
      const T scale = p.reduction_scale(visibility.visible_keys(i));
      limit[i] = backward.threshold.at(b, i);
      for (int64_t c = 0; c < staging.depth; ++c) {
        const T grad = scale * backward.grad_context.at(b, i, c);
        staging.row_plane(b, 3 + c)[i] = grad;
        if (staging.grad_records) staging.grad_record(b, i)[c] = grad;
      }
      strength[i] = backward.grad_strength ? scale * backward.grad_strength.at(b, i) : T(0);
    }
  });
}

}  // namespace

const char* instruction_set() { return chosen().dense.name; }

namespace {

// Owners of one block: `last` bounds those inside the sequence, `end` those with a result to write.
struct Owners {
  int64_t first, last, end;
  Owners(int64_t block, int64_t count, int64_t valid)
      : first(block * kBlock), end(std::min(first + kBlock, count)) {
    last = std::min(end, valid);
  }
};

// Calls body(b, block) for all blocks of sequence b only.
template <class Body>
auto of_sequence(int64_t b, const Body& body) {
  return [b, &body](int64_t, int64_t block) { body(b, block); };
}

// The results of row i from its sums before the reduction; S is T, or double from a sweep.
template <class T, class S>
void write_row(const InteractParams<T>& params, int64_t b, int64_t i, T tau, const S* context,
               S strength, int32_t degree, int64_t depth) {
  const int64_t visible = params.pair.visibility(b).visible_keys(i);
  T scale = params.pair.reduction_scale(visible);
  // No comparison with an undefined threshold means anything.
  if (tau != tau && visible > 0) scale = std::numeric_limits<T>::quiet_NaN();
  for (int64_t c = 0; c < depth; ++c)
    params.context.at(b, i, c) = visible > 0 ? static_cast<T>(scale * context[c]) : T(0);
  if (params.strength)
    params.strength.at(b, i) = visible > 0 ? static_cast<T>(scale * strength) : T(0);
  if (params.degree) params.degree.at(b, i) = visible > 0 ? degree : 0;
  params.threshold.at(b, i) = tau;
}

// The gradients of row i's query, pulled back to its state, and of its threshold.
template <class T>
void write_row_gradient(const InteractBackwardParams<T>& params, int64_t b, int64_t i,
                        Point<T> grad, T grad_limit) {
  const PairParams<T>& p = params.pair;
  if (params.grad_threshold) params.grad_threshold.at(b, i) = grad_limit;
  const bool gate = p.score == Score::kInverseGate;
  if (params.grad_alpha)
    params.grad_alpha.at(b, i) +=
        gate ? GatePair<T>::alpha_vjp(grad, load_point(p.states, b, i)) : T(0);
  if (!params.grad_states) return;
  Point<T> pulled = gate ? GatePair<T>::query_vjp(grad, p.coefficient[b])
                         : ThresholdPair<T>::query_vjp(grad, T(0));
  if (params.accumulate) {
    const Point<T> old = load_point(as_const(params.grad_states), b, i);
    pulled = {old.x + pulled.x, old.y + pulled.y};
  }
  store_point(params.grad_states, b, i, pulled);
}

template <class T, class S>
void write_key_gradient(const InteractBackwardParams<T>& params, int64_t b, int64_t j,
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
    for (int64_t c = 0; c < params.pair.depth; ++c)
      params.grad_values.at(b, j, c) = static_cast<T>(values[c]);
}

template <class T>
void forward_block(const InteractParams<T>& params, const Staging<T>& staging, int64_t b,
                   int64_t block) {
  const Sequence<T> sequence = staging.sequence(b);
  const Owners rows(block, params.pair.rows, sequence.visibility.row_end);
  const int64_t depth = staging.depth;
  const std::unique_ptr<T[]> context(new T[static_cast<size_t>(kBlock * depth)]);
  T strength[kBlock];
  int32_t degree[kBlock];
  if (rows.first < rows.last)
    kernels<T>().forward(sequence, rows.first, rows.last,
                         {context.get(), strength, params.degree ? degree : nullptr});
  for (int64_t i = rows.first; i < rows.end; ++i) {
    const int64_t n = i - rows.first;
    write_row(params, b, i, sequence.limit[i], &context[n * depth], strength[n], degree[n], depth);
  }
}

template <class T>
void backward_row_block(const InteractBackwardParams<T>& params, const Staging<T>& staging,
                        int64_t b, int64_t block) {
  const Sequence<T> sequence = staging.sequence(b);
  const Owners rows(block, params.pair.rows, sequence.visibility.row_end);
  T point[2 * kBlock] = {}, limit[kBlock] = {};
  if (rows.first < rows.last)
    kernels<T>().backward_rows(sequence, rows.first, rows.last, {point, nullptr, limit});
  for (int64_t i = rows.first; i < rows.end; ++i) {
    const int64_t n = i - rows.first;
    write_row_gradient(params, b, i, {point[2 * n], point[2 * n + 1]}, limit[n]);
  }
}

template <class T>
void backward_key_block(const InteractBackwardParams<T>& params, const Staging<T>& staging,
                        int64_t b, int64_t block) {
  const PairParams<T>& p = params.pair;
  const Sequence<T> sequence = staging.sequence(b);
  const Owners keys(block, p.keys, sequence.visibility.key_end);
  T point[2 * kBlock] = {};
  const std::unique_ptr<T[]> values(
      new T[p.values ? static_cast<size_t>(kBlock * staging.depth) : 0]());
  if (keys.first < keys.last)
    kernels<T>().backward_keys(sequence, keys.first, keys.last, {point, values.get()});
  for (int64_t j = keys.first; j < keys.end; ++j) {
    const int64_t n = j - keys.first;
    write_key_gradient(params, b, j, point + 2 * n, values.get() + n * staging.depth);
  }
}

// Calls body(b) for every sequence: one a thread where there are enough, else one after the other
// with the threads inside.
template <class Body>
void for_each_sequence(int64_t batch, const Body& body) {
  if (batch >= 2 * static_cast<int64_t>(torch::stable::get_num_threads()))
    for_each_block(batch, 1, false, 1, [&](int64_t b, int64_t) { body(b); });
  else
    for (int64_t b = 0; b < batch; ++b) body(b);
}

void count_visible_pairs(const Visibility& visible, int64_t* count) {
  for (int64_t row = 0; row < visible.row_end; ++row)
    __atomic_fetch_add(count, visible.visible_keys(row), __ATOMIC_RELAXED);
}

template <class T>
bool swept(const InteractParams<T>& params, const Staging<T>& staging, int64_t b) {
  const int64_t rows = params.pair.rows, depth = staging.depth;
  std::vector<double> context(rows * depth, 0.0), strength(rows, 0.0);
  std::vector<int32_t> degree(rows, 0);
  const Sequence<T> sequence = staging.sequence(b);
  if (!sweep_forward(kernels<T>(), loops<T>(), sequence,
                     {context.data(), strength.data(), degree.data(), params.work}))
    return false;
  for_each_block(1, blocks(rows, kMomentsTile), false, 1, [&](int64_t, int64_t tile) {
    const auto [first, last] = tile_range(tile, rows);
    for (int64_t i = first; i < last; ++i)
      write_row(params, b, i, sequence.limit[i], &context[i * depth], strength[i], degree[i],
                depth);
  });
  return true;
}

template <class T>
bool swept_backward(const InteractBackwardParams<T>& params, const Staging<T>& staging, int64_t b,
                    bool need_rows, bool need_keys) {
  const PairParams<T>& p = params.pair;
  const int64_t depth = staging.depth;
  std::vector<double> query(need_rows ? 2 * p.rows : 0, 0.0), key(need_keys ? 2 * p.keys : 0, 0.0);
  std::vector<double> values(need_keys && p.values ? p.keys * depth : 0, 0.0);
  std::vector<double> limit(params.grad_threshold ? p.rows : 0, 0.0);
  if (!sweep_backward(kernels<T>(), loops<T>(), staging.sequence(b),
                      {need_rows ? query.data() : nullptr, need_keys ? key.data() : nullptr,
                       values.data(), limit.empty() ? nullptr : limit.data()}))
    return false;
  if (need_rows)
    for_each_block(1, blocks(p.rows, kMomentsTile), false, 1, [&](int64_t, int64_t tile) {
      const auto [first, last] = tile_range(tile, p.rows);
      for (int64_t i = first; i < last; ++i)
        write_row_gradient(params, b, i,
                           {static_cast<T>(query[2 * i]), static_cast<T>(query[2 * i + 1])},
                           limit.empty() ? T(0) : static_cast<T>(limit[i]));
    });
  if (need_keys)
    for_each_block(1, blocks(p.keys, kMomentsTile), false, 1, [&](int64_t, int64_t tile) {
      const auto [first, last] = tile_range(tile, p.keys);
      for (int64_t j = first; j < last; ++j)
        write_key_gradient(params, b, j, &key[2 * j], values.data() + j * depth);
    });
  return true;
}

template <class T>
void add_point(const View<T>& view, int64_t b, int64_t i, double x, double y) {
  view.at(b, i, 0) += static_cast<T>(x);
  view.at(b, i, 1) += static_cast<T>(y);
}

// One pass over the rows, whose windows grow, and one back over the keys, each of which is in the
// windows of all rows from some row on.
template <class T>
void threshold_backward(const ThresholdBackwardParams<T>& params, int64_t b) {
  const PairParams<T>& p = params.pair;
  const Visibility visibility = p.visibility(b);
  const int64_t rows = visibility.row_end, keys = visibility.key_end;
  const bool whole = p.row_window || !p.causal;
  if (rows == 0 || keys == 0) return;
  const Point<T> first = load_point(p.key_points, b, 0);
  const Point<double> shift{first.x, first.y};
  const auto relative = [&](int64_t j) {
    const Point<T> key = load_point(p.key_points, b, j);
    return Point<double>{key.x - shift.x, key.y - shift.y};
  };
  Moments window;
  int64_t n = 0;
  const auto extend = [&](int64_t end) {
    for (; n < end; ++n) {
      const Point<double> d = relative(n);
      window.add({1, d.x, d.y, d.x * d.x, d.x * d.y, d.y * d.y});
    }
  };
  if (whole) extend(keys);
  const std::unique_ptr<Moments[]> shares(new Moments[whole ? 1 : static_cast<size_t>(rows)]);
  double sigma = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t visible = visibility.visible_keys(i);
    if (visible == 0) continue;
    if (!whole) extend(visible);
    const Point<T> x = load_point(p.states, b, i);
    const ThresholdGradient of =
        threshold_vjp(Point<double>{double(x.x), double(x.y)}, window, shift, p.coefficient[b],
                      p.eps, params.grad_threshold.at(b, i));
    add_point(params.grad_states, b, i, of.x.x, of.x.y);
    shares[whole ? 0 : i].add(of.sums);
    sigma += of.sigma;
  }
  params.grad_sigma[b] = static_cast<T>(sigma);
  Moments sums = whole ? shares[0] : Moments{};
  int64_t row = rows;
  for (int64_t j = keys - 1; j >= 0; --j) {
    while (!whole && row > 0 && visibility.visible_keys(row - 1) > j) sums.add(shares[--row]);
    const Point<double> d = relative(j);
    add_point(params.grad_keys, b, j, sums.x + 2 * sums.xx * d.x + sums.xy * d.y,
              sums.y + sums.xy * d.x + 2 * sums.yy * d.y);
  }
}

}  // namespace

template <class T>
void Device::threshold_backward(const ThresholdBackwardParams<T>& params) {
  for_each_block(params.pair.batch, 1, false, 1,
                 [&](int64_t b, int64_t) { cpu::threshold_backward(params, b); });
}

template <class T>
void Device::interact(const InteractParams<T>& params) {
  const PairParams<T>& p = params.pair;
  if (p.batch == 0 || p.rows == 0) return;
  const Staging<T> staging(p, false);
  stage_forward(staging);
  const int64_t count = blocks(p.rows, kBlock), grain = grain_for(kBlock * p.keys);
  const auto dense = [&](int64_t b, int64_t block) { forward_block(params, staging, b, block); };
  if (!chooses_sweep(p)) return for_each_block(p.batch, count, p.causal, grain, dense);
  for_each_sequence(p.batch, [&](int64_t b) {
    if (swept(params, staging, b)) return;
    for_each_block(1, count, p.causal, grain, of_sequence(b, dense));
    if (params.work) count_visible_pairs(p.visibility(b), params.work);
  });
}

template <class T>
void Device::interact_backward(const InteractBackwardParams<T>& params) {
  const PairParams<T>& p = params.pair;
  if (p.batch == 0) return;
  const Staging<T> staging(p, true);
  stage_backward(staging, params);
  const bool need_rows = params.grad_states || params.grad_alpha;
  const bool need_keys = params.grad_keys || params.grad_values;
  const auto dense_rows = [&](int64_t b, int64_t block) {
    backward_row_block(params, staging, b, block);
  };
  const auto dense_keys = [&](int64_t b, int64_t block) {
    backward_key_block(params, staging, b, block);
  };
  const int64_t row_blocks = blocks(p.rows, kBlock), key_blocks = blocks(p.keys, kBlock);
  const int64_t row_grain = grain_for(kBlock * p.keys), key_grain = grain_for(kBlock * p.rows);
  if (!chooses_sweep(p)) {
    if (need_rows) for_each_block(p.batch, row_blocks, p.causal, row_grain, dense_rows);
    if (need_keys) for_each_block(p.batch, key_blocks, p.causal, key_grain, dense_keys);
    return;
  }
  for_each_sequence(p.batch, [&](int64_t b) {
    if (swept_backward(params, staging, b, need_rows, need_keys)) return;
    if (need_rows) for_each_block(1, row_blocks, p.causal, row_grain, of_sequence(b, dense_rows));
    if (need_keys) for_each_block(1, key_blocks, p.causal, key_grain, of_sequence(b, dense_keys));
  });
}

template void Device::interact(const InteractParams<float>&);
template void Device::interact(const InteractParams<double>&);
template void Device::interact_backward(const InteractBackwardParams<float>&);
template void Device::interact_backward(const InteractBackwardParams<double>&);
template void Device::threshold_backward(const ThresholdBackwardParams<float>&);
template void Device::threshold_backward(const ThresholdBackwardParams<double>&);

}  // namespace qflux::cpu
