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
    // How many knots but the last are not beyond it: no branch, since it would be as often wrong.
    int64_t after = 0;
    for (int64_t half = kKnots / 2; half > 0; half /= 2)
      after += half & -static_cast<int64_t>(knots_[after + half - 1] <= value);
    after += static_cast<int64_t>(knots_[after] <= value);
    if (after == 0) return 0;
    const int64_t n = after - 1;
    const double low = knots_[n], width = knots_[n + 1] - low;
    const double part = width > 0 ? std::min((value - low) / width, 1.0) : 0.0;
    constexpr int64_t kSteps = (int64_t{1} << kBits) / kKnots;
    return static_cast<uint32_t>(n * kSteps + static_cast<int64_t>(part * (kSteps - 1)));
  }

 private:
  T knots_[kKnots + 1];
};

// The Hilbert curve, so many bits of both coordinates at a time: what they add to the place, and
// how what is left of them is turned. A turn exchanges the coordinates (1), or takes both from the
// other end (2), or does both.
constexpr int kStep = 4;
constexpr uint32_t kStepCells = 1 << kStep;

struct Curve {
  uint8_t place[4][kStepCells * kStepCells] = {};
  uint8_t turn[4][kStepCells * kStepCells] = {};
};

constexpr Curve hilbert_curve() {
  Curve curve;
  for (uint32_t turn = 0; turn < 4; ++turn)
    for (uint32_t cell = 0; cell < kStepCells * kStepCells; ++cell) {
      uint32_t place = 0, now = turn;
      for (int bit = kStep - 1; bit >= 0; --bit) {
        const uint32_t a = (cell >> (kStep + bit) & 1) ^ (now >> 1);
        const uint32_t b = (cell >> bit & 1) ^ (now >> 1);
        const uint32_t right = now & 1 ? b : a, top = now & 1 ? a : b;
        place = place << 2 | ((3 * right) ^ top);
        now ^= top ? 0 : 1 + 2 * right;
      }
      curve.place[turn][cell] = static_cast<uint8_t>(place);
      curve.turn[turn][cell] = static_cast<uint8_t>(now);
    }
  return curve;
}

constexpr Curve kCurve = hilbert_curve();

// The place of a cell on the curve.
uint32_t hilbert(uint32_t x, uint32_t y) {
  uint32_t place = 0, turn = 0;
  for (int bit = kBits - kStep; bit >= 0; bit -= kStep) {
    const uint32_t cell = (x >> bit & (kStepCells - 1)) << kStep | (y >> bit & (kStepCells - 1));
    place = place << 2 * kStep | kCurve.place[turn][cell];
    turn = kCurve.turn[turn][cell];
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
    const int64_t end = chunks.end(chunk);
    for (int64_t n = chunks.begin(chunk); n < end; ++n)
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
