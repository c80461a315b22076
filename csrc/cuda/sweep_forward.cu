// The forward sweep: the rectangles, then each row's own base block by the dense kernel.
#include "forward.cuh"
#include "launch.h"
#include "statistics.h"
#include "sweep_rows.cuh"

namespace qflux::cuda {
namespace {

template <class T>
struct SweptParams : InteractParams<T> {
  Sweep<T> sweep;
};

// Rows against the keys of a rectangle.
template <class T, bool kOwn>
struct FarForward : Forward<T, ThresholdPair, kOwn, true> {
  using Base = Forward<T, ThresholdPair, kOwn, true>;
  using Base::b, Base::params, Base::kSums;
  static constexpr bool kOwnValues = kOwn;

  __device__ __forceinline__ FarForward(const InteractParams<T>& p, int64_t sequence)
      : Base(p, sequence) {}

  __device__ __forceinline__ T limit(int row) const { return params.threshold.at(b, row); }
  __device__ __forceinline__ bool has_geometry(int row, int /*column*/) const {
    const Point<T> x = load_point(params.pair.states, b, row);
    return is_tame(x.x) && is_tame(x.y) && is_tame(limit(row));
  }
  __device__ __forceinline__ void keep(const Sweep<T>&, int64_t, int, int) const {}
  __device__ __forceinline__ void sum_records(const Sweep<T>&, const SuperBlock<T>&) const {}
  // `slots`: moments of the certain keys, `tested`: sums over the others.
  __device__ __forceinline__ void add(const Sweep<T>& sweep, int row, int column,
                                      const typename Base::Owner& owner, const double* slots,
                                      const double (&tested)[kSums]) const {
    constexpr int kColumns = Base::kColumnSums;
    constexpr double kBias = ThresholdPair<T>::kBias;
    const auto weighted = [&](int c) {
      if (slots == nullptr) return 0.0;
      const double* m = slots + 3 * c;
      return kBias * m[0] + owner.query.x * m[1] + owner.query.y * m[2];
    };
    const int64_t at = b * params.pair.rows + row, depth = Base::columns(params);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column + c < depth) sweep.context[at * depth + column + c] += weighted(c) + tested[c];
    if (column > 0) return;
    sweep.strength[at] += weighted(kColumns) + tested[kColumns];
    sweep.degree[at] += (slots ? slots[3 * kColumns] : 0.0) + tested[kColumns + 1];
  }
};

// Rows against the keys of their own base block; the results of both.
template <class T, bool kOwn>
struct NearForward : Forward<T, ThresholdPair, kOwn, true> {
  using Base = Forward<T, ThresholdPair, kOwn, true>;
  using Params = SweptParams<T>;
  using Base::b, Base::params, Base::kColumnSums, Base::kSums;
  const Sweep<T>& sweep;

  __device__ __forceinline__ NearForward(const Params& p, int64_t sequence)
      : Base(p, sequence), sweep(p.sweep) {}

  // What a row may meet here.
  QFLUX_INLINE static int64_t others(const Params& p) { return p.pair.causal ? p.sweep.base : 0; }
  __device__ __forceinline__ Range range(int row) const {
    const Visibility v = Base::visibility();
    const int end = v.causal ? static_cast<int>(v.visible_keys(row)) : 0;
    return {base_begin(sweep.base, row, v, end), end};
  }
  __device__ __forceinline__ void store(int row, int column, bool last,
                                        const T (&sums)[kSums]) const {
    const int64_t at = b * params.pair.rows + row, depth = Base::columns(params);
    T both[kSums];
#pragma unroll
    for (int c = 0; c < kColumnSums; ++c)
      both[c] = column + c < depth
                    ? static_cast<T>(sums[c] + sweep.context[at * depth + column + c])
                    : T(0);
    both[kColumnSums] = static_cast<T>(sums[kColumnSums] + sweep.strength[at]);
    both[kColumnSums + 1] = sums[kColumnSums + 1];
    Base::store(row, column, last, both);
    if (column == 0 && params.degree)
      params.degree.at(b, row) += static_cast<int32_t>(sweep.degree[at]);
  }
};

template <class T, bool kOwn>
const char* sweep(const SweptParams<T>& params, void* stream) {
  using Far = FarForward<T, kOwn>;
  SweptParams<T> swept = params;
  const PairParams<T>& pair = params.pair;
  const InteractParams<T>& plain = params;
  const char* error = sweep_levels(
      pair, as_const(params.threshold), swept.sweep, stream,
      [&](const Level& level) -> const char* {
        const Grid grid{super_blocks(pair, level), kSuperThreads};
        const char* failed = launch(view_blocks<Far>, grid, stream, plain, swept.sweep, level, 0);
        const int depth = static_cast<int>(Far::columns(plain));
        for (int column = 0; column < depth && failed == nullptr; column += Far::kColumnSums)
          failed = launch(meet_keys<Far>, grid, stream, plain, swept.sweep, level, column);
        return failed;
      });
  return error ? error : launch_gather<NearForward<T, kOwn>>(swept, pair.causal, stream);
}

template <class T>
int64_t measure(const PairParams<T>& pair, int64_t base, bool backward) {
  if (pair.batch == 0 || pair.rows == 0 || pair.keys == 0) return 0;
  if (pair.rows > kMaxLength || pair.keys > kMaxLength) return 0;
  Divider memory(nullptr);
  divide(pair, base, backward, memory);
  return memory.used();
}

template <class T>
const char* run(int64_t base, const InteractParams<T>& params, void* scratch, void* stream) {
  const PairParams<T>& pair = params.pair;
  if (pair.batch == 0 || pair.rows == 0) return nullptr;
  if (scratch == nullptr || measure(pair, base, false) == 0) return interact(params, stream);
  if (const char* error = thresholds(pair, params.threshold, stream)) return error;
  SweptParams<T> swept{params, {}};
  Divider memory(scratch);
  swept.sweep = divide(pair, base, false, memory);
  return pair.values ? sweep<T, true>(swept, stream) : sweep<T, false>(swept, stream);
}

}  // namespace

int64_t sweep_bytes_by(int64_t base, const PairParams<float>& pair, bool backward) {
  return measure(pair, base, backward);
}
int64_t sweep_bytes_by(int64_t base, const PairParams<double>& pair, bool backward) {
  return measure(pair, base, backward);
}
int64_t sweep_bytes(const PairParams<float>& pair, bool backward) {
  return measure(pair, kSweepBase, backward);
}
int64_t sweep_bytes(const PairParams<double>& pair, bool backward) {
  return measure(pair, kSweepBase, backward);
}
const char* interact_by(int64_t base, const InteractParams<float>& params, void* scratch,
                        void* stream) {
  return run(base, params, scratch, stream);
}
const char* interact_by(int64_t base, const InteractParams<double>& params, void* scratch,
                        void* stream) {
  return run(base, params, scratch, stream);
}

}  // namespace qflux::cuda
