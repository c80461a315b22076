#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace qflux::cpu {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void share(int64_t begin, int64_t end, int64_t grain, const void* body, Part part) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { part(body, first, last); });
}

}  // namespace qflux::cpu
