// The forward sweep: the rectangles, then each row's own base block by the dense kernel.
#include "../common/launch.h"
#include "../common/statistics.h"
#include "../dense/forward.cuh"
#include "rows.cuh"

namespace qflux::cuda {
namespace {

template <class T>
struct SweptParams : InteractParams<T> {
  Sweep<T> sweep;
};

// Rows against the keys of a rectangle.
template <class T, bool kOwn>
struct FarForward : Forward<T, HardThreshold<T>, kSweptValues<T, kOwn>, true> {
  using Base = Forward<T, HardThreshold<T>, kSweptValues<T, kOwn>, true>;
  using Base::Base, Base::b, Base::limit, Base::params, Base::kSums;
  static constexpr bool kOwnValues = kOwn;

  __device__ __forceinline__ bool has_geometry(int row, int /*column*/) const {
    const Point<T> x = load_point(params.pair.states, b, row);
    return is_tame(x.x) && is_tame(x.y) && is_tame(limit(row));
  }
  __device__ __forceinline__ void keep(const Sweep<T>&, int64_t, int, int) const {}
  __device__ __forceinline__ void sum_records(const Sweep<T>&, const SuperBlock<T>&) const {}
  // `slots`: moments of the certain keys, `tested`: sums over the others.
  __device__ __forceinline__ void add(const Sweep<T>& sweep, int64_t sequence, int row, int column,
                                      const typename Base::Owner& owner, const double* slots,
                                      const double (&tested)[kSums]) const {
    constexpr int kColumns = Base::kColumnSums;
    constexpr double kBias = HardThreshold<T>::kBias;
    const auto weighted = [&](int c) {
      if (slots == nullptr) return 0.0;
      const double* m = slots + 3 * c;
      return kBias * m[0] + owner.query.x * m[1] + owner.query.y * m[2];
    };
    const int64_t at = sequence * params.pair.rows + row, value_dim = Base::columns(params);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column + c < value_dim)
        sweep.context[at * value_dim + column + c] += weighted(c) + tested[c];
    if (column > 0) return;
    sweep.strength[at] += weighted(kColumns) + tested[kColumns];
    sweep.degree[at] += (slots ? slots[3 * kColumns] : 0.0) + tested[kColumns + 1];
  }
};

// Rows against the keys of their own base block; the results of both.
template <class T, bool kOwn>
struct NearForward : Forward<T, HardThreshold<T>, kSweptValues<T, kOwn>, true> {
  using Base = Forward<T, HardThreshold<T>, kSweptValues<T, kOwn>, true>;
  using Params = SweptParams<T>;
  using Base::b, Base::params, Base::kColumnSums, Base::kSums;
  const Sweep<T>& sweep;

  __device__ __forceinline__ NearForward(const Params& p, BatchIndex sequence)
      : Base(p, sequence), sweep(p.sweep) {}

  // What a row may meet here.
  QFLUX_INLINE static int64_t sources(const Params& p) { return p.pair.causal ? p.sweep.base : 0; }
  __device__ __forceinline__ Range range(int row) const {
    return near_keys(sweep.base, Base::visibility(), row);
  }
  __device__ __forceinline__ void store(int row, int column, bool last,
                                        const T (&sums)[kSums]) const {
    const int64_t at = params.pair.flat(b) * params.pair.rows + row;
    const int64_t value_dim = Base::columns(params);
    T both[kSums];
#pragma unroll
    for (int c = 0; c < kColumnSums; ++c)
      both[c] = column + c < value_dim
                    ? static_cast<T>(sums[c] + sweep.context[at * value_dim + column + c])
                    : T(0);
    both[kColumnSums] = static_cast<T>(sums[kColumnSums] + sweep.strength[at]);
    both[kColumnSums + 1] = sums[kColumnSums + 1];
    Base::store(row, column, last, both);
    if (column == 0 && params.degree)
      params.degree.at(b, row) += static_cast<int32_t>(sweep.degree[at]);
  }
};

template <class T, bool kOwn>
void sweep(SweptParams<T>& params, Queue& queue) {
  using Far = FarForward<T, kOwn>;
  const PairParams<T>& pair = params.pair;
  const InteractParams<T>& plain = params;
  queue.then([&](void* stream) { return thresholds(pair, params.threshold, stream); });
  sweep_levels(pair, as_const(params.threshold), params.sweep, queue, [&](const Level& level) {
    const Grid grid{super_blocks(pair, level), kSuperThreads};
    const int value_dim = static_cast<int>(Far::columns(plain));
    queue.launch(view_blocks<Far>, grid, plain, params.sweep, level, 0);
    for (int column = 0; column < value_dim; column += Far::kColumnSums)
      queue.launch(meet_keys<Far>, grid, plain, params.sweep, level, column);
  });
  queue.then([&](void* stream) {
    return launch_gather<NearForward<T, kOwn>, false>(params, pair.causal, stream);
  });
}

}  // namespace

template <class T>
int64_t sweep_bytes_by(int64_t base, const PairParams<T>& pair, bool backward) {
  if (pair.score != ScoreKind::kHardThreshold) return 0;
  if (pair.batch() == 0 || pair.rows == 0 || pair.keys == 0) return 0;
  if (pair.rows > kMaxLength || pair.keys > kMaxLength) return 0;
  Divider memory(nullptr);
  divide(pair, base, backward, memory);
  return memory.used();
}

template <class T>
const char* interact_by(int64_t base, const InteractParams<T>& params, void* scratch,
                        void* stream) {
  const PairParams<T>& pair = params.pair;
  if (pair.batch() == 0 || pair.rows == 0) return nullptr;
  if (scratch == nullptr || sweep_bytes_by(base, pair, false) == 0) return interact(params, stream);
  Divider memory(scratch);
  SweptParams<T> swept{params, divide(pair, base, false, memory)};
  Queue queue(stream);
  pair.values ? sweep<T, true>(swept, queue) : sweep<T, false>(swept, queue);
  return queue.error();
}

template int64_t sweep_bytes_by(int64_t, const PairParams<float>&, bool);
template int64_t sweep_bytes_by(int64_t, const PairParams<double>&, bool);
template const char* interact_by(int64_t, const InteractParams<float>&, void*, void*);
template const char* interact_by(int64_t, const InteractParams<double>&, void*, void*);

int64_t sweep_bytes(const PairParams<float>& pair, bool backward) {
  return sweep_bytes_by(kSweepBase, pair, backward);
}
int64_t sweep_bytes(const PairParams<double>& pair, bool backward) {
  return sweep_bytes_by(kSweepBase, pair, backward);
}

}  // namespace qflux::cuda
