// Thresholds from moments of the keys (math/statistics.h), in float64 for both precisions.
//
// A block owns a segment of rows. It sums the moments of all keys in front of the segment afresh
// and scans those inside, so that no block waits for another and nothing has to be stored. The
// keys read twice are few beside the pairs: one for each kSegment rows.
#include "runtime.cuh"
#include "statistics.h"
#include "thresholds.cuh"

namespace qflux::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kScanBlocksPerSm = 2;
constexpr int64_t kSegment = kScanThreads * kRowsPerThread;

template <class T>
__global__ void __launch_bounds__(kScanThreads, kScanBlocksPerSm)
    threshold_segments(PairParams<T> p, View<T> out, int64_t segments) {
  QFLUX_SHARED(WarpSums, shared);
  for (int64_t work = blockIdx.x; work < p.batch * segments; work += gridDim.x) {
    const int64_t b = work % p.batch, segment = work / p.batch * kSegment;
    threshold_segment(p, out, b, segment, shared);
  }
}

template <class T>
const char* run(const PairParams<T>& p, const View<T>& out, void* stream) {
  const int64_t segments = (p.rows + kSegment - 1) / kSegment;
  return launch(threshold_segments<T>, {p.batch * segments, kScanThreads}, stream, p, out,
                segments);
}

}  // namespace

const char* thresholds(const PairParams<float>& params, const View<float>& out, void* stream) {
  return run(params, out, stream);
}
const char* thresholds(const PairParams<double>& params, const View<double>& out, void* stream) {
  return run(params, out, stream);
}

}  // namespace qflux::cuda
