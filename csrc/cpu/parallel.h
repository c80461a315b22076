// How loops are divided among the threads of torch's pool: by the data and the sizes only, never by
// the number of threads, so that results are bitwise repeatable.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace qflux::cpu {

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// torch's pool (parallel.cpp). Its headers take longer to compile than a unit here without them.
int64_t thread_count();
using Part = void (*)(const void* body, int64_t begin, int64_t end);
void share(int64_t begin, int64_t end, int64_t grain, const void* body, Part part);

// Calls body(first, last) for parts of begin .. end - 1, a thread for about `grain` or more of
// them.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  share(begin, end, grain, &body, [](const void* self, int64_t first, int64_t last) {
    (*static_cast<const Body*>(self))(first, last);
  });
}

struct Range {
  int64_t first, last;
};
inline Range tile_range(int64_t tile, int64_t size, int64_t end) {
  return {tile * size, std::min((tile + 1) * size, end)};
}

// Memory that a loop writes before it reads it.
template <class T>
std::unique_ptr<T[]> room(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

// Runs body(n, block) for every block of every sequence n. `balanced` pairs the first block with
// the last, whose parts of a causal triangle add up to the same work everywhere.
template <class Body>
void for_each_block(int64_t batch, int64_t count, bool balanced, int64_t grain, const Body& body) {
  const int64_t items = balanced ? (count + 1) / 2 : count;
  if (batch * items == 0) return;
  parallel_for(0, batch * items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / items, item = at % items;
      body(n, item);
      if (balanced && count - 1 - item != item) body(n, count - 1 - item);
    }
  });
}

// Enough blocks for a thread that its part is worth waking it for.
inline int64_t grain_for(int64_t pairs_per_block) {
  constexpr int64_t kPairs = 1 << 15;
  return pairs_per_block >= kPairs ? 1 : kPairs / (pairs_per_block < 1 ? 1 : pairs_per_block);
}

// Runs body(item) for each; inside another such loop, one after the other.
template <class Body>
void each(int64_t count, const Body& body) {
  if (count == 1) return body(0);
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) body(n);
  });
}

// A long loop in chunks that one thread takes at a time.
struct Chunks {
  static constexpr int64_t kSize = 1024, kMost = 16;
  int64_t total, count;
  explicit Chunks(int64_t n) : total(n), count(std::clamp<int64_t>(n / kSize, 1, kMost)) {}
  int64_t begin(int64_t chunk) const { return total * chunk / count; }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
};

}  // namespace qflux::cpu
