// What every pass over pairs knows of its sequence: sizes, scores, and who owns the sums.
#pragma once

#include "../../math/score.h"
#include "../../params.h"
#include "runtime.cuh"

namespace qflux::cuda {

// Positions in a sequence; launch_gather refuses sequences that 32 bits cannot count.
struct Range {
  int begin, end;
};

__device__ __forceinline__ constexpr int lesser(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ constexpr int greater(int a, int b) { return a > b ? a : b; }

// What a pair adds to a sum if it is kept. The compiler branches around more than a few
// instructions that one comparison guards, which costs three a pair; each of these carries the
// guard itself.
#if defined(__CUDACC__)
#define QFLUX_GUARDED(instruction) \
  "{ .reg .pred kept; setp.ne.u32 kept, %1, 0; @kept " instruction "; }"
__device__ __forceinline__ void multiply_add_if(unsigned kept, float a, float b, float& sum) {
  asm(QFLUX_GUARDED("fma.rn.f32 %0, %2, %3, %0") : "+f"(sum) : "r"(kept), "f"(a), "f"(b));
}
__device__ __forceinline__ void multiply_add_if(unsigned kept, double a, double b, double& sum) {
  asm(QFLUX_GUARDED("fma.rn.f64 %0, %2, %3, %0") : "+d"(sum) : "r"(kept), "d"(a), "d"(b));
}
__device__ __forceinline__ void add_if(unsigned kept, float a, float& sum) {
  asm(QFLUX_GUARDED("add.rn.f32 %0, %0, %2") : "+f"(sum) : "r"(kept), "f"(a));
}
__device__ __forceinline__ void add_if(unsigned kept, double a, double& sum) {
  asm(QFLUX_GUARDED("add.rn.f64 %0, %0, %2") : "+d"(sum) : "r"(kept), "d"(a));
}
#undef QFLUX_GUARDED
#else
template <class T>
inline void multiply_add_if(bool kept, T a, T b, T& sum) {
  if (kept) sum = multiply_add(a, b, sum);
}
template <class T>
inline void add_if(bool kept, T a, T& sum) {
  if (kept) sum += a;
}
#endif

// A gate's division is work enough for one iteration; unrolled, its registers would spill.
template <class Score, class Sizes>
constexpr int kUnrollOf = Score::kThresholded ? Sizes::kUnroll : 1;

template <class Score, class T>
__device__ __forceinline__ Point<T> query(const PairParams<T>& p, BatchIndex b, int64_t row) {
  return Score::query(load_point(p.states, b, row), p.coefficient[b]);
}

// One sequence of a call with InteractParams or InteractBackwardParams.
template <class T, class ScoreOfPair, class ParamsOfCall>
struct SequencePass {
  using Scalar = T;
  using Score = ScoreOfPair;
  using Params = ParamsOfCall;

  const Params& params;
  BatchIndex b;
  T eps, min_gate;

  __device__ __forceinline__ SequencePass(const Params& p, BatchIndex sequence)
      : params(p),
        b(sequence),
        eps(static_cast<T>(p.pair.eps)),
        min_gate(p.pair.min_gate[sequence]) {}

  __device__ __forceinline__ Visibility visibility() const { return params.pair.visibility(b); }
  __device__ __forceinline__ T limit(int row) const {
    return Score::kThresholded ? params.threshold.at(b, row) : T(0);
  }
  // Of a mass, what the limit lost by rounding takes the place of eps.
  __device__ __forceinline__ Score score(T limit, T rest = T(0)) const {
    return Score::make(limit, Score::kMass ? rest : eps, min_gate);
  }
  // A key's record: its point and, where `kColumns` is not zero, so many columns of its value.
  template <int kColumns>
  __device__ __forceinline__ void fetch_key(int key, int column, T* record) const {
    const Point<T> point = load_point(params.pair.key_points, b, key);
    record[0] = point.x;
    record[1] = point.y;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) record[2 + c] = value(key, column + c);
  }
  __device__ __forceinline__ T value(int key, int column) const {
    return column < params.pair.value_dim ? params.pair.values.load(b, key, column) : T(0);
  }
};

// Rows own the sums and meet keys.
template <class T, class Score, class Params>
struct OwnsRows : SequencePass<T, Score, Params> {
  using SequencePass<T, Score, Params>::SequencePass;

  QFLUX_INLINE static int64_t owners(const Params& p) { return p.pair.rows; }
  QFLUX_INLINE static int64_t sources(const Params& p) { return p.pair.keys; }
  __device__ __forceinline__ int valid() const {
    return static_cast<int>(this->visibility().row_end);
  }
  __device__ __forceinline__ Range range(int row) const {
    return {0, static_cast<int>(this->visibility().visible_keys(row))};
  }
};

// Keys own the sums and meet rows.
template <class T, class Score, class Params>
struct OwnsKeys : SequencePass<T, Score, Params> {
  using SequencePass<T, Score, Params>::SequencePass;

  QFLUX_INLINE static int64_t owners(const Params& p) { return p.pair.keys; }
  QFLUX_INLINE static int64_t sources(const Params& p) { return p.pair.rows; }
  __device__ __forceinline__ int valid() const {
    return static_cast<int>(this->visibility().key_end);
  }
  __device__ __forceinline__ Range range(int key) const {
    const Visibility v = this->visibility();
    return {static_cast<int>(v.first_row(key)), static_cast<int>(v.row_end)};
  }
};

}  // namespace qflux::cuda
