// Thresholds from moments of the keys (math/statistics.h), and back from gradients of thresholds to
// rows and keys, in float64 for both precisions.
//
// A block owns a segment of rows. It sums the moments of all keys in front of the segment afresh
// and scans those inside, so that no block waits for another and nothing has to be stored. The
// keys read twice are few beside the pairs: one for each kSegment rows.
//
// Backward, what the windows of a segment's rows pass to their keys is stored as sums from each row
// to the segment's last, so that a key, whose rows are all from some row on, adds one record of
// that row's segment and one of each later segment.
#include "launch.h"
#include "runtime.cuh"
#include "statistics.h"
#include "thresholds.cuh"

namespace qflux::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kScanBlocksPerSm = 2;
constexpr int64_t kSegment = kScanThreads * kRowsPerThread;

int64_t segments_of(int64_t tokens) { return (tokens + kSegment - 1) / kSegment; }

template <class T>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    threshold_segments(PairParams<T> p, View<T> out, int64_t segments) {
  QFLUX_SHARED(WarpSums, shared);
  const int64_t batch = p.batch();
  for (int64_t work = blockIdx.x; work < batch * segments; work += gridDim.x)
    threshold_segment(p, out, p.index(work % batch), work / batch * kSegment, shared);
}

// The records of one sequence: gradients of the sums over windows, `Moments` without their count.
struct WindowGrads {
  double* data;  // [rows][kWindowSums]

  __device__ __forceinline__ Moments at(int64_t row) const {
    const double* from = data + row * kWindowSums;
    return {0, from[0], from[1], from[2], from[3], from[4]};
  }
  __device__ __forceinline__ void set(int64_t row, const Moments& sums) const {
    double* to = data + row * kWindowSums;
    to[0] = sums.x, to[1] = sums.y, to[2] = sums.xx, to[3] = sums.xy, to[4] = sums.yy;
  }
};

template <class T>
__device__ __forceinline__ WindowGrads window_grads(const ThresholdBackwardParams<T>& params,
                                                    int64_t sequence) {
  return {params.window_grads + sequence * params.pair.rows * kWindowSums};
}

// What rows get, and records for their keys.
template <class T>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    threshold_rows_backward(ThresholdBackwardParams<T> params, int64_t segments) {
  QFLUX_SHARED(WarpSums, shared);
  const PairParams<T>& p = params.pair;
  const int64_t batch = p.batch();
  for (int64_t work = blockIdx.x; work < batch * segments; work += gridDim.x) {
    const int64_t sequence = work % batch, segment = work / batch * kSegment;
    const BatchIndex b = p.index(sequence);
    const WindowGrads records = window_grads(params, sequence);
    for_each_window(p, b, segment, shared,
                    [&](int64_t row, int64_t visible, const Moments& window, Point<double> shift) {
                      ThresholdGradient<double> of{};
                      if (visible > 0) {
                        const Point<T> x = load_point(p.states, b, row);
                        of = threshold_vjp(Point<double>{x.x, x.y}, window, shift, p.coefficient[b],
                                           p.eps, double(params.grad_threshold.at(b, row)));
                        add_point(params.grad_states, b, row,
                                  Point<T>{static_cast<T>(of.x.x), static_cast<T>(of.x.y)});
                        if (params.grad_coefficient)
                          params.grad_coefficient.at(b, row) += static_cast<T>(of.sigma);
                      }
                      records.set(row, of.sums);
                    });
    __syncthreads();

    // From the last rows to the first.
    const int64_t first = segment + (kScanThreads - 1 - threadIdx.x) * kRowsPerThread;
    const int64_t end = first + kRowsPerThread < p.rows ? first + kRowsPerThread : p.rows;
    Moments sums;
    for (int64_t row = end - 1; row >= first; --row) sums.add(records.at(row));
    scan_block(sums, shared);
    for (int64_t row = end - 1; row >= first; --row) {
      sums.add(records.at(row));
      records.set(row, sums);
    }
  }
}

// What keys get from the windows that they are in.
template <class T>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    threshold_keys_backward(ThresholdBackwardParams<T> params, int64_t segments) {
  QFLUX_SHARED(WarpSums, shared);
  const PairParams<T>& p = params.pair;
  const int64_t batch = p.batch();
  const bool whole = has_whole_windows(p);
  for (int64_t work = blockIdx.x; work < batch * segments; work += gridDim.x) {
    const int64_t sequence = work % batch, begin = work / batch * kSegment;
    const BatchIndex b = p.index(sequence);
    const Visibility visibility = p.visibility(b);
    const WindowGrads records = window_grads(params, sequence);
    const int64_t end =
        begin + kSegment < visibility.key_end ? begin + kSegment : visibility.key_end;
    if (begin >= end) continue;
    // The segment in which the last key's rows begin, which is that of the first key or the next.
    const int64_t last = whole ? -1 : visibility.first_row(end - 1) / kSegment;
    Moments strided;
    for (int64_t row = (last + 1 + threadIdx.x) * kSegment; row < visibility.row_end;
         row += kScanThreads * kSegment)
      strided.add(records.at(row));
    const Moments later = scan_block(strided, shared);

    const Point<T> origin = load_point(p.key_points, b, 0);
    for (int64_t key = begin + threadIdx.x; key < end; key += kScanThreads) {
      Moments sums = later;
      const int64_t row = visibility.first_row(key);
      if (!whole && row < visibility.row_end) {
        if (row / kSegment < last && last * kSegment < visibility.row_end)
          sums.add(records.at(last * kSegment));
        sums.add(records.at(row));
      }
      const Point<T> at = load_point(p.key_points, b, key);
      const double dx = static_cast<double>(at.x) - origin.x;
      const double dy = static_cast<double>(at.y) - origin.y;
      add_point(params.grad_keys, b, key,
                Point<T>{static_cast<T>(sums.x + 2 * sums.xx * dx + sums.xy * dy),
                         static_cast<T>(sums.y + sums.xy * dx + 2 * sums.yy * dy)});
    }
  }
}

template <class T>
const char* run(const PairParams<T>& p, const View<T>& out, void* stream) {
  const int64_t segments = segments_of(p.rows);
  return launch(threshold_segments<T>, {p.batch() * segments, kScanThreads}, stream, p, out,
                segments);
}

template <class T>
const char* run(const ThresholdBackwardParams<T>& params, void* stream) {
  const PairParams<T>& p = params.pair;
  if (p.batch() == 0 || p.rows == 0 || p.keys == 0) return nullptr;
  const int64_t of_rows = segments_of(p.rows), of_keys = segments_of(p.keys);
  Queue queue(stream);
  queue.launch(threshold_rows_backward<T>, {p.batch() * of_rows, kScanThreads}, params, of_rows);
  queue.launch(threshold_keys_backward<T>, {p.batch() * of_keys, kScanThreads}, params, of_keys);
  return queue.error();
}

}  // namespace

const char* thresholds(const PairParams<float>& params, const View<float>& out, void* stream) {
  return run(params, out, stream);
}
const char* thresholds(const PairParams<double>& params, const View<double>& out, void* stream) {
  return run(params, out, stream);
}
const char* threshold_backward(const ThresholdBackwardParams<float>& params, void* stream) {
  return run(params, stream);
}
const char* threshold_backward(const ThresholdBackwardParams<double>& params, void* stream) {
  return run(params, stream);
}

}  // namespace qflux::cuda
