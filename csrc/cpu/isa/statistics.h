// Thresholds of a run of rows, and their gradients.
#pragma once

#include "../../math/statistics.h"
#include "../../params.h"

namespace qflux::cpu {

// Keys of a window whose moments are summed from zero; fixed, so that results never depend on the
// number of threads.
constexpr int64_t kMomentsTile = 512;

// The statistics windows of one sequence, all of which start with its first key.
template <class T>
struct Windows {
  Visibility visibility;
  bool whole;              // every row has all keys, instead of those that it sees
  Point<double> shift;     // the first key
  const T *key_x, *key_y;  // planes, of the keys from `base` on
  int64_t base;
  const Moments* before;  // of the keys in front of each tile of kMomentsTile
  double sigma, eps;
};

template <class T>
struct StatisticsLoops {
  // Of keys first .. last - 1, relative to `shift`.
  Moments (*moments)(const T* key_x, const T* key_y, int64_t first, int64_t last,
                     Point<double> shift);
  // tau of rows first .. last - 1; 0 for one that sees no key.
  void (*thresholds)(const Windows<T>&, const View<const T>& states, BatchIndex, int64_t first,
                     int64_t last, T* tau);
  // Everything of one sequence.
  void (*backward)(const ThresholdBackwardParams<T>&, BatchIndex);
};

}  // namespace qflux::cpu
