// The moments of the windows of a segment of rows, found by one block, and thresholds from them
// (math/statistics.h), in float64 for both precisions.
#pragma once

#include "../../math/statistics.h"
#include "../../params.h"
#include "runtime.cuh"
#include "traits.h"

namespace qflux::cuda {

constexpr int kScanWarps = kResidentWarps;  // of the largest block that scans
constexpr int kRowsPerThread = 4;

struct WarpSums {
  double at[kScanWarps][6];
};

__device__ __forceinline__ Moments shuffle_up(const Moments& m, int distance) {
  return {__shfl_up_sync(kAllLanes, m.count, distance), __shfl_up_sync(kAllLanes, m.x, distance),
          __shfl_up_sync(kAllLanes, m.y, distance),     __shfl_up_sync(kAllLanes, m.xx, distance),
          __shfl_up_sync(kAllLanes, m.xy, distance),    __shfl_up_sync(kAllLanes, m.yy, distance)};
}

// Replaces `sums` by those of all threads before this one, and returns those of the whole block.
// Nothing is taken by subtraction: a key that is not finite must not reach the rows before it.
__device__ __forceinline__ Moments scan_block(Moments& sums, WarpSums& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Moments inclusive = sums;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Moments lower = shuffle_up(inclusive, distance);
    if (lane >= distance) inclusive.add(lower);
  }
  const Moments lower = shuffle_up(inclusive, 1);
  __syncthreads();
  if (lane == kWarp - 1) {
    double* at = shared.at[warp];
    at[0] = inclusive.count, at[1] = inclusive.x, at[2] = inclusive.y;
    at[3] = inclusive.xx, at[4] = inclusive.xy, at[5] = inclusive.yy;
  }
  __syncthreads();
  Moments before, all;
  for (int n = 0; n < static_cast<int>(blockDim.x) / kWarp; ++n) {
    const double* at = shared.at[n];
    if (n == warp) before = all;
    all.add({at[0], at[1], at[2], at[3], at[4], at[5]});
  }
  if (lane > 0) before.add(lower);
  sums = before;
  return all;
}

template <class T>
__device__ __forceinline__ void add_key(Moments& sums, const PairParams<T>& p, BatchIndex b,
                                        int64_t key, Point<double> shift) {
  const Point<T> at = load_point(p.key_points, b, key);
  sums.add(at.x - shift.x, at.y - shift.y);
}

// Whether the windows of all rows of a sequence are all of its keys.
template <class T>
__device__ __forceinline__ bool has_whole_windows(const PairParams<T>& p) {
  return p.whole_window || !p.causal;
}

// Calls visit(row, visible keys, moments of the row's window, what they are relative to) for the
// rows segment .. segment + kRowsPerThread * blockDim.x - 1 of sequence b. The moments of all keys
// in front of the segment are summed afresh, those inside are scanned.
template <class T, class Visit>
__device__ __forceinline__ void for_each_window(const PairParams<T>& p, BatchIndex b,
                                                int64_t segment, WarpSums& shared,
                                                const Visit& visit) {
  const Visibility visibility = p.visibility(b);
  const bool whole = has_whole_windows(p);
  Point<double> shift{0, 0};
  if (visibility.key_end > 0) {
    const Point<T> first = load_point(p.key_points, b, 0);
    shift = {first.x, first.y};
  }

  // Row i adds key i + keys - rows, where there is one; the row before a sequence adds those that
  // its first row finds in front of its own.
  const auto seen_until = [&](int64_t row) {
    const int64_t end = row + visibility.shift + 1;
    return end < 0 ? 0 : end < visibility.key_end ? end : visibility.key_end;
  };
  const int64_t prior = whole ? visibility.key_end : seen_until(segment - 1);
  Moments strided;
  for (int64_t key = threadIdx.x; key < prior; key += blockDim.x)
    add_key(strided, p, b, key, shift);
  const Moments base = scan_block(strided, shared);

  const int64_t first = segment + threadIdx.x * kRowsPerThread;
  Moments window;
  if (!whole)
    for (int64_t key = seen_until(first - 1); key < seen_until(first + kRowsPerThread - 1); ++key)
      add_key(window, p, b, key, shift);
  scan_block(window, shared);
  window.add(base);

  for (int64_t row = first; row < first + kRowsPerThread && row < p.rows; ++row) {
    if (!whole)
      for (int64_t key = seen_until(row - 1); key < seen_until(row); ++key)
        add_key(window, p, b, key, shift);
    visit(row, visibility.visible_keys(row), window, shift);
  }
}

// tau of the rows of a segment into `out`, zero for those that see no key.
template <class T>
__device__ __forceinline__ void threshold_segment(const PairParams<T>& p, const View<T>& out,
                                                  BatchIndex b, int64_t segment, WarpSums& shared) {
  for_each_window(p, b, segment, shared,
                  [&](int64_t row, int64_t visible, const Moments& window, Point<double> shift) {
                    T tau = 0;
                    if (visible > 0) {
                      const Point<T> x = load_point(p.states, b, row);
                      tau = static_cast<T>(threshold(Point<double>{x.x, x.y}, window, shift,
                                                     p.coefficient[b], p.eps));
                    }
                    out.at(b, row) = tau;
                  });
}

}  // namespace qflux::cuda
