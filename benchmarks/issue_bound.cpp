// How many vector instructions this core issues a second: independent fused multiply-adds on the
// widest vectors, enough of them in flight to hide their latency, nothing else in the loop.
#include <chrono>
#include <cstdint>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kChains = 24;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kBytes = 32;
constexpr int kChains = 12;
#else
constexpr int kBytes = 16;
constexpr int kChains = 12;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

extern "C" int lanes() { return kBytes / sizeof(float); }

// Vector multiply-adds a second over about `seconds`, as the best of several short stretches.
extern "C" double issue_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  Vector chain[kChains];
  const Vector scale = 0.999999f - Vector{}, shift = 1e-6f - Vector{};
  for (int c = 0; c < kChains; ++c) chain[c] = static_cast<float>(c) - Vector{};
  constexpr int64_t kRounds = 200000;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  while (Clock::now() < end) {
    const auto start = Clock::now();
    for (int64_t n = 0; n < kRounds; ++n)
#pragma GCC unroll 24
      for (int c = 0; c < kChains; ++c) {
        chain[c] = chain[c] * scale + shift;
        asm volatile("" : "+v"(chain[c]));  // each multiply-add happens, in a register
      }
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = kRounds * kChains / elapsed;
    if (rate > best) best = rate;
  }
  return best;
}
