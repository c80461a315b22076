#include "staging.h"

#include <type_traits>

#include "isa/dispatch.h"

namespace qflux::cpu {
namespace {

// Tokens are staged by tiles of so many.
constexpr int64_t kTile = kMomentsTile;

int64_t tiles(int64_t tokens) { return ceil_div(tokens, kTile); }

// Runs body(b, tile) for all tiles of so many tokens.
template <class T, class Body>
void for_each_tile(const PairParams<T>& p, int64_t tokens, const Body& body) {
  for_each_block(p.batch(), tiles(tokens), false, grain_for(kTile * kTokenCost),
                 [&](int64_t n, int64_t tile) { body(p.index(n), tile); });
}

// Components of tokens first .. last - 1 of a sequence, each to a plane of its own: plane(c).
template <class T, class Plane>
void split(const View<const T>& from, BatchIndex b, int64_t count, Range range,
           const Plane& plane) {
  // A lambda captures these, which C++17 forbids for structured bindings.
  const int64_t first = range.first, last = range.last;
  const T* const at = from.sequence(b);
  // Of tokens that lie together, several are moved at a time, if the compiler knows how they lie.
  const auto together = [&](auto width) {
    T* planes[decltype(width)::value];
    for (int c = 0; c < width; ++c) planes[c] = plane(c);
    for (int64_t i = first; i < last; ++i)
      for (int c = 0; c < width; ++c) planes[c][i] = at[i * width + c];
  };
  const bool dense = from.component == 1 && from.token == count;
  if (dense && count == 2) return together(std::integral_constant<int, 2>());
  if (dense && count == 4) return together(std::integral_constant<int, 4>());
  for (int64_t c = 0; c < count; ++c) {
    T* const to = plane(c);
    for (int64_t i = first; i < last; ++i) to[i] = at[i * from.token + c * from.component];
  }
}

}  // namespace

template <class T>
Staging<T>::Staging(const PairParams<T>& p, bool backward)
    : value_dim(p.values ? p.value_dim : 2),
      p_(p),
      row_stride_(round_up(p.rows, kPadding)),
      key_stride_(round_up(p.keys, kPadding)),
      row_planes_(3 + (backward            ? value_dim + 1
                       : has_mass(p.score) ? 1
                                           : 0)),
      key_planes_(2 + (backward && p.values ? value_dim : 0)),
      backward_(backward),
      copies_values_(p.values && p.values.component != 1),
      copies_grads_(backward && p.values),
      rows_(room<T>(p.batch() * row_planes_ * row_stride_)),
      keys_(room<T>(p.batch() * key_planes_ * key_stride_)),
      values_(room<T>(copies_values_ ? p.batch() * p.keys * value_dim : 0)),
      grads_(room<T>(copies_grads_ ? p.batch() * p.rows * value_dim : 0)) {}

template <class T>
Staging<T>::Staging(const PairParams<T>& p) : Staging(p, false) {
  const bool statistics = is_thresholded(p.score) && !has_mass(p.score) && p.keys > 0;
  stage_keys();
  const std::unique_ptr<Moments[]> before = statistics ? tile_moments() : nullptr;
  for_each_tile(p, p.rows, [&](BatchIndex b, int64_t tile) {
    const Range range = tile_range(tile, kTile, p.rows);
    stage_queries(b, range);
    T* limit = row_plane(b, 2);
    if (statistics)
      find_thresholds(before.get() + p.flat(b) * tiles(p.keys), b, range);
    else
      std::fill(limit + range.first, limit + range.last, T(0));
  });
}

template <class T>
Staging<T>::Staging(const InteractBackwardParams<T>& params) : Staging(params.pair, true) {
  stage_keys();
  for_each_tile(p_, p_.rows, [&](BatchIndex b, int64_t tile) {
    const Range range = tile_range(tile, kTile, p_.rows);
    stage_queries(b, range);
    stage_gradients(params, b, range);
  });
}

template <class T>
Sequence<T> Staging<T>::sequence(BatchIndex b) const {
  Sequence<T> s{};
  s.visibility = p_.visibility(b);
  s.value_dim = value_dim;
  s.score = p_.score;
  s.eps = static_cast<T>(p_.eps);
  s.min_gate = p_.min_gate[b];
  s.whole_window = p_.whole_window;
  s.query_x = row_plane(b, 0);
  s.query_y = row_plane(b, 1);
  s.limit = row_plane(b, 2);
  s.key_x = key_plane(b, 0);
  s.key_y = key_plane(b, 1);
  if (p_.values) {
    s.values = copies_values_ ? value_record(b, 0) : p_.values.sequence(b);
    s.value_stride = copies_values_ ? value_dim : p_.values.token;
  }
  if (!backward_ && has_mass(p_.score)) s.limit_rest = limit_rests(b);
  if (backward_) {
    s.grad = row_plane(b, 3);
    s.grad_strength = row_plane(b, 3 + value_dim);
  }
  if (copies_grads_) {
    s.grad_records = grad_record(b, 0);
    s.value_planes = key_plane(b, 2);
  }
  s.row_stride = row_stride_;
  s.key_stride = key_stride_;
  return s;
}

template <class T>
void Staging<T>::stage_keys() const {
  for_each_tile(p_, p_.keys, [&](BatchIndex b, int64_t tile) {
    stage_keys(b, tile_range(tile, kTile, p_.keys));
  });
}

template <class T>
void Staging<T>::stage_keys(BatchIndex b, Range range) const {
  const auto [first, last] = range;
  split(p_.key_points, b, 2, range, [&](int64_t c) { return key_plane(b, c); });
  if (key_planes_ > 2)
    split(p_.values, b, value_dim, range, [&](int64_t c) { return key_plane(b, 2 + c); });
  if (copies_values_)
    for (int64_t j = first; j < last; ++j)
      for (int64_t c = 0; c < value_dim; ++c) value_record(b, j)[c] = p_.values.at(b, j, c);
  if (last == p_.keys)
    for (int64_t c = 0; c < key_planes_; ++c)
      std::fill(key_plane(b, c) + last, key_plane(b, c) + key_stride_, T(0));
}

template <class T>
void Staging<T>::stage_queries(BatchIndex b, Range range) const {
  T *x = row_plane(b, 0), *y = row_plane(b, 1);
  visit_score(p_.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<T>;
    for (int64_t i = range.first; i < range.last; ++i) {
      const Point<T> q = Score::query(load_point(p_.states, b, i), p_.coefficient[b]);
      x[i] = q.x;
      y[i] = q.y;
    }
  });
  if (range.last == p_.rows)
    for (int64_t c = 0; c < row_planes_; ++c)
      std::fill(row_plane(b, c) + range.last, row_plane(b, c) + row_stride_, T(0));
}

template <class T>
void Staging<T>::stage_gradients(const InteractBackwardParams<T>& backward, BatchIndex b,
                                 Range range) const {
  const int64_t first = range.first, last = range.last;
  const auto stage = [&](int64_t plane, const View<const T>& from) {
    split(from, b, 1, range, [&](int64_t) { return row_plane(b, plane); });
  };
  const View<const T>& context = backward.grad_context;
  stage(2, backward.threshold);
  split(context, b, value_dim, range, [&](int64_t c) { return row_plane(b, 3 + c); });
  T* const strength = row_plane(b, 3 + value_dim);
  // The strength of a mass is one, whatever its pairs.
  if (backward.grad_strength && !has_mass(p_.score))
    stage(3 + value_dim, backward.grad_strength);
  else
    std::fill(strength + first, strength + last, T(0));
  if (p_.mean) {
    const Visibility visibility = p_.visibility(b);
    T scale[kTile];
    for (int64_t i = first; i < last; ++i)
      scale[i - first] = p_.reduction_scale(visibility.visible_keys(i));
    for (int64_t c = 0; c <= value_dim; ++c) {
      T* const plane = row_plane(b, 3 + c);
      for (int64_t i = first; i < last; ++i) plane[i] *= scale[i - first];
    }
  }
  if (!copies_grads_) return;
  T* const records = grad_record(b, first);
  if (!p_.mean && context.component == 1 && context.token == value_dim) {
    const T* const from = context.sequence(b) + first * value_dim;
    std::copy(from, from + (last - first) * value_dim, records);
    return;
  }
  for (int64_t c = 0; c < value_dim; ++c) {
    const T* const plane = row_plane(b, 3 + c) + first;
    for (int64_t n = 0; n < last - first; ++n) records[n * value_dim + c] = plane[n];
  }
}

// [batch][tiles]: moments of the keys in front of a tile.
template <class T>
std::unique_ptr<Moments[]> Staging<T>::tile_moments() const {
  const int64_t stride = tiles(p_.keys);
  auto before = room<Moments>(p_.batch() * stride);
  for_each_block(p_.batch(), stride - 1, false, grain_for(kTile * kTokenCost),
                 [&](int64_t n, int64_t tile) {
                   const BatchIndex b = p_.index(n);
                   const T *x = key_plane(b, 0), *y = key_plane(b, 1);
                   const Range range = tile_range(tile, kTile, p_.visibility(b).key_end);
                   before[n * stride + tile + 1] = loops<T>().statistics.moments(
                       x, y, range.first, range.last, {double(x[0]), double(y[0])});
                 });
  for (int64_t n = 0; n < p_.batch(); ++n) {
    before[n * stride] = Moments{};
    for (int64_t tile = 1; tile < stride; ++tile)
      before[n * stride + tile].add(before[n * stride + tile - 1]);
  }
  return before;
}

// tau of the rows of a range, whose keys' moments in front of each tile stand in `before`.
template <class T>
void Staging<T>::find_thresholds(const Moments* before, BatchIndex b, Range range) const {
  const Windows<T> windows{p_.visibility(b),
                           p_.whole_window || !p_.causal,
                           {double(key_plane(b, 0)[0]), double(key_plane(b, 1)[0])},
                           key_plane(b, 0),
                           key_plane(b, 1),
                           0,
                           before,
                           p_.coefficient[b],
                           p_.eps};
  loops<T>().statistics.thresholds(windows, p_.states, b, range.first, range.last,
                                   row_plane(b, 2) + range.first);
}

template class Staging<float>;
template class Staging<double>;

}  // namespace qflux::cpu
