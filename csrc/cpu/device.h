// The CPU as a device for evolve.h: interactions and per-token loops on torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../params.h"

namespace qflux::cpu {

// The best instruction set of this machine; QFLUX_INSTRUCTION_SET=AVX2 or baseline asks for less.
const char* instruction_set();

class Device {
 public:
  template <class T>
  void interact(const InteractParams<T>& params);
  template <class T>
  void interact_backward(const InteractBackwardParams<T>& params);
  template <class T>
  void threshold_backward(const ThresholdBackwardParams<T>& params);

  template <class Rule>
  void for_each_token(int64_t batch, int64_t rows, const Rule& rule) {
    torch::stable::parallel_for(0, batch * rows, 4096, [&](int64_t begin, int64_t end) {
      int64_t b = begin / rows, i = begin % rows;
      for (int64_t n = begin; n < end; ++n) {
        rule(b, i);
        if (++i == rows) i = 0, ++b;
      }
    });
  }
};

}  // namespace qflux::cpu
