// How loops are divided among the threads of torch's pool: by the data and the sizes only, never by
// the number of threads, so that results are bitwise repeatable.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

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

// Loops one after the other, with what one thread does between them, in one wake-up of the pool.
// Thread 0 goes through `run(crew)`; in what it hands to `crew.share(count, body)` the others take
// part. Each takes the same items in every call, whose memory its core has seen, and then what
// others have left: no thread has to be there but the first.
class Crew {
 public:
  // At most so many threads.
  static constexpr int64_t kThreads = 16;

  // For at most so many loops. With several threads, or one, where waking others takes longer than
  // they would save.
  template <class Run>
  static void work(int64_t loops, bool together, const Run& run) {
    Crew crew(loops, together ? std::min(thread_count(), kThreads) : 1);
    if (crew.threads_ == 1) return run(crew);
    parallel_for(0, crew.threads_, 1, [&](int64_t begin, int64_t end) {
      if (begin == 0) {
        const Finish finish{crew.finished_};
        run(crew);
      }
      for (int64_t me = std::max<int64_t>(begin, 1); me < end; ++me) crew.help(me);
    });
  }

  template <class Body>
  void share(int64_t count, const Body& body) {
    if (threads_ == 1) {
      for (int64_t n = 0; n < count; ++n) body(n);
      return;
    }
    Loop& loop = loops_[opened_++];
    loop.count = count;
    loop.body = &body;
    loop.part = [](const void* self, int64_t n) { (*static_cast<const Body*>(self))(n); };
    loop.open.store(true, std::memory_order_release);
    take(loop, 0);
    for (int64_t done = 0; done < count;) {
      done = 0;
      for (int64_t t = 0; t < threads_; ++t)
        done += loop.lanes[t].done.load(std::memory_order_acquire);
    }
    if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(error_);
  }

 private:
  // However the first thread ends, the others stop waiting for it.
  struct Finish {
    std::atomic<bool>& finished;
    ~Finish() { finished.store(true, std::memory_order_release); }
  };
  // Items t, t + threads and so on; and how many items thread t has done, of whatever lane.
  struct alignas(64) Lane {
    std::atomic<int64_t> next{0}, done{0};
  };
  struct Loop {
    std::atomic<bool> open{false};
    int64_t count = 0;
    const void* body = nullptr;
    void (*part)(const void*, int64_t) = nullptr;
    Lane lanes[kThreads];
  };

  Crew(int64_t loops, int64_t threads) : threads_(threads), loops_(threads > 1 ? loops : 0) {}

  void take(Loop& loop, int64_t me) {
    int64_t done = 0;
    for (int64_t n = 0; n < threads_; ++n) {
      const int64_t owner = (me + n) % threads_;
      Lane& lane = loop.lanes[owner];
      for (;;) {
        const int64_t item = owner + threads_ * lane.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= loop.count) break;
        try {
          loop.part(loop.body, item);
        } catch (...) {
          if (!failed_.exchange(true)) error_ = std::current_exception();
        }
        ++done;
      }
    }
    loop.lanes[me].done.store(done, std::memory_order_release);
  }
  void help(int64_t me) {
    for (Loop& loop : loops_) {
      while (!loop.open.load(std::memory_order_acquire)) {
        if (finished_.load(std::memory_order_acquire)) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      take(loop, me);
    }
  }

  const int64_t threads_;
  std::atomic<bool> finished_{false}, failed_{false};
  std::exception_ptr error_;
  size_t opened_ = 0;
  std::vector<Loop> loops_;
};

// A long loop in chunks of about `size` that one thread takes at a time. They depend on the sizes
// alone.
struct Chunks {
  int64_t total, count;
  explicit Chunks(int64_t n, int64_t size = 1024, int64_t most = 16)
      : total(n), count(std::clamp<int64_t>(n / size, 1, most)) {}
  int64_t begin(int64_t chunk) const { return total * chunk / count; }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
};

}  // namespace qflux::cpu
