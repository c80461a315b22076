// The CPU as a device for evolve.h: interactions and per-token loops on torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../params.h"

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
    torch::stable::parallel_for(0, p.batch() * p.rows, 4096, [&](int64_t begin, int64_t end) {
      BatchIndex b = p.index(begin / p.rows);
      int64_t i = begin % p.rows;
      for (int64_t n = begin; n < end; ++n) {
        rule(b, i);
        if (++i < p.rows) continue;
        i = 0;
        if (++b.inner == p.inner) b.inner = 0, ++b.outer;
      }
    });
  }
};

}  // namespace qflux::cpu
