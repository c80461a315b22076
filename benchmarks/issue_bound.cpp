// How many vector instructions this core issues a second: independent fused multiply-adds on the
// widest vectors, enough of them in flight to hide their latency, nothing else in the loop.
#include <chrono>
#include <cstdint>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

extern "C" int lanes() { return kBytes / sizeof(float); }

// Vector multiply-adds a second over about `seconds`, as the best of several short stretches.
extern "C" double issue_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  // Twelve chains: a latency of four to six cycles, two a cycle. Named, since an array would be
  // kept in memory.
  const Vector scale = 0.999999f - Vector{}, shift = 1e-6f - Vector{};
  Vector c0 = shift, c1 = shift, c2 = shift, c3 = shift, c4 = shift, c5 = shift;
  Vector c6 = shift, c7 = shift, c8 = shift, c9 = shift, c10 = shift, c11 = shift;
  const auto step = [&](Vector& chain) __attribute__((always_inline)) {
    chain = chain * scale + shift;
    asm volatile("" : "+v"(chain));  // each multiply-add happens, in a register
  };
  constexpr int64_t kRounds = 200000;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  while (Clock::now() < end) {
    const auto start = Clock::now();
    for (int64_t n = 0; n < kRounds; ++n) {
      step(c0), step(c1), step(c2), step(c3), step(c4), step(c5);
      step(c6), step(c7), step(c8), step(c9), step(c10), step(c11);
    }
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = kRounds * 12 / elapsed;
    if (rate > best) best = rate;
  }
  return best;
}
