// A pool of threads in place of torch's, for the thread sanitizer: loaded first, it answers the
// calls that csrc/cpu/parallel.cpp makes. torch's own is not compiled for the sanitizer, which sees
// none of its barriers. Test-only.
//
// Loops are divided as finely as they may be, whatever their grain, so that small inputs have
// threads too. With QFLUX_OVERLAP set, a part runs into the next one: a race that must be found.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 4;
thread_local bool inside = false;

using Body = void (*)(int64_t begin, int64_t end, void* context);

bool run(Body body, int64_t begin, int64_t end, void* context) {
  const bool outer = inside;
  inside = true;
  bool done = true;
  try {
    body(begin, end, context);
  } catch (...) {
    done = false;
  }
  inside = outer;
  return done;
}

}  // namespace

extern "C" int32_t torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return 0;
}

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, Body body,
                                      void* context) {
  if (begin >= end) return 0;
  if (inside || end - begin == 1) return run(body, begin, end, context) ? 0 : 1;
  const int64_t parts = std::min(kThreads, end - begin);
  const int64_t over = std::getenv("QFLUX_OVERLAP") != nullptr ? 1 : 0;
  std::atomic<bool> done{true};
  const auto part = [&](int64_t number) {
    const int64_t first = begin + (end - begin) * number / parts;
    const int64_t last = begin + (end - begin) * (number + 1) / parts + over;
    if (!run(body, first, std::min(last, end), context)) done = false;
  };
  std::vector<std::thread> others;
  for (int64_t number = 1; number < parts; ++number) others.emplace_back(part, number);
  part(0);
  for (std::thread& other : others) other.join();
  return done ? 0 : 1;
}
