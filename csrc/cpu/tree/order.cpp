#include "order.h"

#include <algorithm>

#include "../parallel.h"

namespace qflux::cpu {
namespace {

constexpr int kBits = 16;  // of a coordinate on the curve
constexpr int64_t kSample = 4096, kKnots = 256;

// Ranks among a sample, interpolated.
template <class T>
class Ranks {
 public:
  Ranks(const T* values, int64_t count) {
    const int64_t step = std::max<int64_t>(count / kSample, 1);
    std::vector<T> sample;
    for (int64_t n = 0; n < count; n += step) sample.push_back(values[n]);
    std::sort(sample.begin(), sample.end());
    const int64_t last = sample.size() - 1;
    for (int64_t n = 0; n <= kKnots; ++n) knots_[n] = sample[last * n / kKnots];
  }

  uint32_t operator()(T value) const {
    const T* const after = std::upper_bound(knots_, knots_ + kKnots, value);
    if (after == knots_) return 0;
    const int64_t n = after - knots_ - 1;
    const double low = knots_[n], width = knots_[n + 1] - low;
    const double part = width > 0 ? std::min((value - low) / width, 1.0) : 0.0;
    constexpr int64_t kSteps = (int64_t{1} << kBits) / kKnots;
    return static_cast<uint32_t>(n * kSteps + static_cast<int64_t>(part * (kSteps - 1)));
  }

 private:
  T knots_[kKnots + 1];
};

// The place of a cell on the Hilbert curve.
uint32_t hilbert(uint32_t x, uint32_t y) {
  uint32_t place = 0;
  for (int bit = kBits - 1; bit >= 0; --bit) {
    const uint32_t right = (x >> bit) & 1, top = (y >> bit) & 1;
    place = (place << 2) | ((3 * right) ^ top);
    // Turn what is left into the quadrant's own curve.
    const uint32_t flip = (top == 0 && right == 1) ? ~0u : 0u;
    x ^= flip;
    y ^= flip;
    const uint32_t swap = top == 0 ? x ^ y : 0u;
    x ^= swap;
    y ^= swap;
  }
  return place;
}

}  // namespace

template <class T>
std::vector<int32_t> spatial_order(const T* x, const T* y, int64_t count) {
  std::vector<int32_t> order(count);
  if (count == 0) return order;
  const Ranks<T> rank_x(x, count), rank_y(y, count);
  std::vector<uint64_t> from(count), to(count);
  const Chunks chunks(count);
  each(chunks.count, [&](int64_t chunk) {
    for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n)
      from[n] = uint64_t{hilbert(rank_x(x[n]), rank_y(y[n]))} << 32 | static_cast<uint32_t>(n);
  });
  // A counting sort by each digit of the place.
  constexpr int kDigit = 11;
  constexpr int64_t kCells = 1 << kDigit;
  for (int shift = 32; shift < 64; shift += kDigit) {
    int64_t start[kCells + 1] = {};
    for (const uint64_t at : from) ++start[((at >> shift) & (kCells - 1)) + 1];
    for (int64_t cell = 0; cell < kCells; ++cell) start[cell + 1] += start[cell];
    for (const uint64_t at : from) to[start[(at >> shift) & (kCells - 1)]++] = at;
    from.swap(to);
  }
  for (int64_t n = 0; n < count; ++n) order[n] = static_cast<int32_t>(from[n]);
  return order;
}

template std::vector<int32_t> spatial_order(const float*, const float*, int64_t);
template std::vector<int32_t> spatial_order(const double*, const double*, int64_t);

}  // namespace qflux::cpu
