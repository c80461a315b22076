// What a sweep does before it meets pairs: rows sorted by direction, keys with geometry marked,
// and an ellipse for each rectangle.
//
// A frame maps directions by a matrix of positive determinant, which keeps them in order around the
// circle and leaves the first one in place. So rows are sorted once, by merging, and the segments
// of a merge sort are the rectangles' rows level by level.
#include <utility>

#include "sweep.cuh"

namespace qflux::cuda {
namespace {

constexpr int kThreadsOfTokens = 256;

template <class T>
__device__ __forceinline__ Ranked ranked(const PairParams<T>& p, const View<const T>& limits,
                                         BatchIndex b, int64_t row) {
  constexpr uint32_t kLast = 0x7fffffff;
  const Point<T> x = load_point(p.states, b, row);
  // Rows without direction come last, in blocks of their own.
  const bool directed =
      is_tame(x.x) && is_tame(x.y) && is_tame(limits.at(b, row)) && (x.x != T(0) || x.y != T(0));
  uint32_t code = kLast;
  if (directed) code = static_cast<uint32_t>(pseudo_angle(x.x, x.y) * (kLast / kTurn));
  return static_cast<Ranked>(code) << 32 | row;
}

template <class T>
__device__ __forceinline__ bool is_tame_key(const PairParams<T>& p, BatchIndex b, int64_t key) {
  const Point<T> at = load_point(p.key_points, b, key);
  bool tame = is_tame(at.x) && is_tame(at.y);
  for (int64_t c = 0; p.values && tame && c < p.value_dim; ++c)
    tame = is_tame(p.values.at(b, key, c));
  return tame;
}

template <class T>
__global__ void __launch_bounds__(kThreadsOfTokens)
    prepare_tokens(PairParams<T> p, View<const T> limits, Sweep<T> sweep) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreadsOfTokens;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThreadsOfTokens + threadIdx.x;
  for (int64_t n = start; n < sweep.zeroed_count; n += stride) sweep.zeroed[n] = 0;
  for (int64_t n = start; n < p.batch() * p.rows; n += stride) {
    const BatchIndex b = p.index(n / p.rows);
    const int64_t row = n % p.rows;
    sweep.order[n] = row < p.visibility(b).row_end ? ranked(p, limits, b, row) : row;
  }
  for (int64_t n = start; n < p.batch() * p.keys; n += stride) {
    const BatchIndex b = p.index(n / p.keys);
    const int64_t key = n % p.keys;
    sweep.tame[n] = key >= p.visibility(b).key_end || is_tame_key(p, b, key);
  }
}

// Moments of `base` keys about the first of their sequence, a warp to each chunk.
template <class T>
__global__ void __launch_bounds__(kThreadsOfTokens) chunk_moments(PairParams<T> p, Sweep<T> sweep) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreadsOfTokens / kWarp;
  for (int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreadsOfTokens + threadIdx.x) / kWarp;
       n < p.batch() * sweep.chunks; n += stride) {
    const BatchIndex b = p.index(n / sweep.chunks);
    const int64_t begin = n % sweep.chunks * sweep.base;
    const int64_t all = p.visibility(b).key_end;
    const int64_t end = begin + sweep.base < all ? begin + sweep.base : all;
    Moments sums;
    if (begin < end) {
      const Point<T> first = load_point(p.key_points, b, 0);
      for (int64_t key = begin + lane; key < end; key += kWarp) {
        const Point<T> at = load_point(p.key_points, b, key);
        sums.add(static_cast<double>(at.x) - first.x, static_cast<double>(at.y) - first.y);
      }
    }
    const Moments total{sum_over_lanes(sums.count), sum_over_lanes(sums.x),
                        sum_over_lanes(sums.y),     sum_over_lanes(sums.xx),
                        sum_over_lanes(sums.xy),    sum_over_lanes(sums.yy)};
    if (lane == 0) sweep.moments[n] = total;
  }
}

// Each row finds its place in the union of two neighbouring segments: in front of it are those in
// front of it in its own, and those of the other that are smaller.
template <class T>
__global__ void __launch_bounds__(kThreadsOfTokens)
    merge_segments(PairParams<T> p, const Ranked* from, Ranked* to, int64_t width) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreadsOfTokens;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreadsOfTokens + threadIdx.x;
       n < p.batch() * p.rows; n += stride) {
    const int64_t sequence = n / p.rows, slot = n % p.rows;
    Visibility v = p.visibility(p.index(sequence));
    if (!p.causal) v.shift = 0;
    const int64_t position = slot + v.shift;
    if (position < 0 || slot >= v.row_end) continue;  // no rectangle's
    const int64_t start = position / (2 * width) * (2 * width);
    const int begin = static_cast<int>(row_at(v, start));
    const int middle = static_cast<int>(row_at(v, start + width));
    const int end = static_cast<int>(row_at(v, start + 2 * width));
    const Ranked* ranks = from + sequence * p.rows;
    const Ranked mine = ranks[slot];
    const bool left = slot < middle;
    int low = left ? middle : begin;
    const int other = low;
    for (int high = left ? end : middle; low < high;) {
      const int half = low + (high - low) / 2;
      if (ranks[half] < mine)
        low = half + 1;
      else
        high = half;
    }
    to[sequence * p.rows + begin + (slot - (left ? begin : middle)) + (low - other)] = mine;
  }
}

// A warp to each rectangle: the ellipse of the statistics of its middle row.
template <class T>
__global__ void __launch_bounds__(kThreadsOfTokens)
    find_frame(PairParams<T> p, Sweep<T> sweep, Level level) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreadsOfTokens / kWarp;
  for (int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreadsOfTokens + threadIdx.x) / kWarp;
       n < p.batch() * level.rectangles; n += stride) {
    const int64_t sequence = n / level.rectangles;
    const BatchIndex b = p.index(sequence);
    const Visibility v = p.visibility(b);
    const Rectangle where = rectangle(v, level, static_cast<int>(n % level.rectangles));
    if (where.empty()) continue;
    const int64_t middle = (int64_t(where.row_begin) + where.row_end) / 2;
    const int64_t seen = p.whole_window ? v.key_end : v.visible_keys(middle);
    int64_t chunks = (seen + sweep.base / 2) / sweep.base;
    chunks = chunks < 1 ? 1 : chunks < sweep.chunks ? chunks : sweep.chunks;
    Moments sums;
    for (int64_t c = lane; c < chunks; c += kWarp)
      sums.add(sweep.moments[sequence * sweep.chunks + c]);
    const Moments window{sum_over_lanes(sums.count), sum_over_lanes(sums.x),
                         sum_over_lanes(sums.y),     sum_over_lanes(sums.xx),
                         sum_over_lanes(sums.xy),    sum_over_lanes(sums.yy)};
    // A row from each of as many parts stands for all of them.
    const int64_t row = where.row_begin + int64_t(where.rows()) * lane / kWarp;
    const Point<T> x = load_point(p.states, b, row), shift = load_point(p.key_points, b, 0);
    const double rx = x.x, ry = x.y, square = sum_over_lanes(rx * rx + ry * ry) / kWarp;
    if (lane == 0) {
      const Frame frame =
          make_frame(window, {static_cast<double>(shift.x), static_cast<double>(shift.y)}, p.eps,
                     square, kScoreUnit<T>);
      sweep.frames[n] = frame;
      sweep.whitenings[n] = Whitening(frame);
    }
  }
}

Grid grid_of(int64_t threads) {
  return {ceil_div(threads < 1 ? 1 : threads, kThreadsOfTokens), kThreadsOfTokens};
}

}  // namespace

template <class T>
void prepare(const PairParams<T>& p, const View<const T>& limits, const Sweep<T>& sweep,
             Queue& queue) {
  const int64_t rows = p.batch() * p.rows, keys = p.batch() * p.keys;
  queue.launch(prepare_tokens<T>, grid_of(rows > keys ? rows : keys), p, limits, sweep);
  queue.launch(chunk_moments<T>, grid_of(p.batch() * sweep.chunks * kWarp), p, sweep);
}

template <class T>
void merge(const PairParams<T>& p, Sweep<T>& sweep, int64_t width, Queue& queue) {
  const Ranked* const from = sweep.order;
  std::swap(sweep.order, sweep.other_order);
  queue.launch(merge_segments<T>, grid_of(p.batch() * p.rows), p, from, sweep.order, width);
}

template <class T>
void find_frames(const PairParams<T>& p, const Sweep<T>& sweep, const Level& level, Queue& queue) {
  queue.launch(find_frame<T>, grid_of(p.batch() * level.rectangles * kWarp), p, sweep, level);
}

template void prepare(const PairParams<float>&, const View<const float>&, const Sweep<float>&,
                      Queue&);
template void prepare(const PairParams<double>&, const View<const double>&, const Sweep<double>&,
                      Queue&);
template void merge(const PairParams<float>&, Sweep<float>&, int64_t, Queue&);
template void merge(const PairParams<double>&, Sweep<double>&, int64_t, Queue&);
template void find_frames(const PairParams<float>&, const Sweep<float>&, const Level&, Queue&);
template void find_frames(const PairParams<double>&, const Sweep<double>&, const Level&, Queue&);

}  // namespace qflux::cuda
