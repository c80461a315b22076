// What both directions need to know of a pair's score.
#pragma once

#include "../math/score.h"
#include "../params.h"
#include "runtime.cuh"

namespace qflux::cuda {

template <class Pair>
struct MakePair;
template <class T>
struct MakePair<ThresholdPair<T>> {
  static __device__ __forceinline__ ThresholdPair<T> make(const PairParams<T>&, int64_t, T limit) {
    return {limit};
  }
};
template <class T>
struct MakePair<GatePair<T>> {
  static __device__ __forceinline__ GatePair<T> make(const PairParams<T>& p, int64_t b, T) {
    return {static_cast<T>(p.eps), p.min_gate[b]};
  }
};

template <class Pair>
constexpr bool kHasThreshold = false;
template <class T>
constexpr bool kHasThreshold<ThresholdPair<T>> = true;

template <class Pair, class T>
__device__ __forceinline__ Point<T> query(const PairParams<T>& p, int64_t b, int64_t row) {
  return Pair::query(load_point(p.states, b, row), p.coefficient[b]);
}

}  // namespace qflux::cuda
