// What both directions need to know of a pair's score.
#pragma once

#include "../../math/score.h"
#include "../../params.h"
#include "runtime.cuh"

namespace qflux::cuda {

// Makes pairs of one sequence from what they do not share: the row's threshold.
template <class Pair>
struct PairOf;
template <class T>
struct PairOf<ThresholdPair<T>> {
  __device__ __forceinline__ PairOf(const PairParams<T>&, int64_t) {}
  __device__ __forceinline__ ThresholdPair<T> operator()(T limit) const { return {limit}; }
};
template <class T>
struct PairOf<ExcessPair<T>> {
  __device__ __forceinline__ PairOf(const PairParams<T>&, int64_t) {}
  __device__ __forceinline__ ExcessPair<T> operator()(T limit) const { return {{limit}}; }
};
template <class T>
struct PairOf<GatePair<T>> {
  T eps, min_gate;

  __device__ __forceinline__ PairOf(const PairParams<T>& p, int64_t b)
      : eps(static_cast<T>(p.eps)), min_gate(p.min_gate[b]) {}
  __device__ __forceinline__ GatePair<T> operator()(T) const { return {eps, min_gate}; }
};

// A gate's division is work enough for one iteration; unrolled, its registers would spill.
template <class Pair, class Sizes>
constexpr int kUnrollOf = kHasThreshold<Pair> ? Sizes::kUnroll : 1;

template <class Pair, class T>
__device__ __forceinline__ Point<T> query(const PairParams<T>& p, int64_t b, int64_t row) {
  return Pair::query(load_point(p.states, b, row), p.coefficient[b]);
}

}  // namespace qflux::cuda
