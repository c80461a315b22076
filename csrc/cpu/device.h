// The CPU as a device for evolve.h: interactions and per-token loops on torch's thread pool.
#pragma once

#include <algorithm>

#include "../params.h"
#include "parallel.h"

namespace qflux::cpu {

class Device {
 public:
  // Raises for an instruction set that this machine does not run, before any thread needs it: what
  // is raised inside a loop loses its message on the way out.
  Device();

  template <class T>
  void interact(const InteractParams<T>& params);
  template <class T>
  void interact_backward(const InteractBackwardParams<T>& params);
  template <class T>
  void threshold_backward(const ThresholdBackwardParams<T>& params);

  template <class T, class Rule>
  void for_each_token(const PairParams<T>& p, const Rule& rule) {
    parallel_for(0, p.batch() * p.rows, 4096, [&](int64_t begin, int64_t end) {
      // By sequences: what depends on the sequence alone leaves the inner loop.
      for (int64_t n = begin; n < end;) {
        const BatchIndex b = p.index(n / p.rows);
        const int64_t first = n % p.rows, last = std::min(p.rows, first + end - n);
        for (int64_t i = first; i < last; ++i) rule(b, i);
        n += last - first;
      }
    });
  }
};

}  // namespace qflux::cpu
