// The part of CUDA that the kernels use, on the CPU, for tests: each thread of a block is a fibre
// that runs until it waits for others. Blocks run one after another, everything in one thread of
// the CPU, so a launch has returned when its kernel is done.
//
// Shared memory is poisoned before every block and guarded on both sides. The order in which the
// threads of a block take turns can be chosen: what differs between two orders lacks a barrier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define QFLUX_SHARED(type, name)                            \
  static ::qflux::emulator::SharedVariable<type> name##_of; \
  type& name = name##_of.enter()
#define QFLUX_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::qflux::emulator::dynamic_shared().enter()

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace qflux::emulator {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 256 * 1024;

struct Index {
  unsigned x;
};

enum class State { kReady, kBarrier, kVote, kShuffle, kDone };

// How the threads of a block take turns.
enum class Order : int { kForward, kReversed, kShuffled };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  int shuffles;                          // of this thread so far
  double lane_value[2];                  // of its last two shuffles: a neighbour may be one ahead
  std::array<uint32_t, 6> fragments[2];  // the same of products: left matrix, right matrix
  int votes;                             // the same of barriers that count votes
  bool vote[2];
};

class Guarded {
 public:
  virtual ~Guarded() = default;
  virtual bool intact() const = 0;
};

struct Machine {
  Order order = Order::kForward;
  int64_t max_blocks = 64, max_shared_bytes = 227 * 1024;  // of compute capability 9.0
  int64_t launches = 0;
  bool tensor_cores = true;
  int64_t products = 0;  // of fragments, by each thread
  int64_t picks = 0;     // of a set bit, by each thread: how often warps turn to one of their lanes
  size_t dynamic_bytes = 0;  // of the running launch
  int64_t block_serial = 0;
  int threads = 0, current = 0;
  std::vector<Fibre> fibres;
  std::vector<const Guarded*> shared;  // of the running block
  std::function<void()> body;
  ucontext_t scheduler;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}
inline int64_t max_blocks() { return machine().max_blocks; }
inline int64_t max_shared_bytes() { return machine().max_shared_bytes; }

class SharedMemory : public Guarded {
 public:
  unsigned char* enter(size_t size) {
    Machine& m = machine();
    if (serial_ != m.block_serial) {
      serial_ = m.block_serial;
      bytes_.assign(kGuard + size + kGuard, kPoison);
      m.shared.push_back(this);
    }
    return bytes_.data() + kGuard;
  }
  bool intact() const override {
    const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
    return std::all_of(bytes_.begin(), bytes_.begin() + kGuard, poisoned) &&
           std::all_of(bytes_.end() - kGuard, bytes_.end(), poisoned);
  }

 private:
  static constexpr int kGuard = 4096;
  static constexpr unsigned char kPoison = 0xff;  // NaN in either precision

  std::vector<unsigned char> bytes_;
  int64_t serial_ = -1;
};

template <class T>
class SharedVariable {
 public:
  T& enter() { return *reinterpret_cast<T*>(memory_.enter(sizeof(T))); }

 private:
  SharedMemory memory_;
};

class DynamicShared {
 public:
  unsigned char* enter() { return memory_.enter(machine().dynamic_bytes); }

 private:
  SharedMemory memory_;
};

inline DynamicShared& dynamic_shared() {
  static DynamicShared instance;
  return instance;
}

}  // namespace qflux::emulator

inline qflux::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace qflux::emulator {

inline void wait(State state) {
  Machine& m = machine();
  Fibre& fibre = m.fibres[m.current];
  fibre.state = state;
  swapcontext(&fibre.context, &m.scheduler);
}

inline void run_fibre() {
  machine().body();
  wait(State::kDone);
}

// Whether threads first .. last - 1 all wait for the same; if so they may continue.
inline bool release(int first, int last, State state) {
  auto& fibres = machine().fibres;
  for (int t = first; t < last; ++t)
    if (fibres[t].state != state) return false;
  for (int t = first; t < last; ++t) fibres[t].state = State::kReady;
  return true;
}

inline void run_thread(int thread) {
  Machine& m = machine();
  if (m.fibres[thread].state != State::kReady) return;
  m.current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  swapcontext(&m.scheduler, &m.fibres[thread].context);
}

// Each warp runs as far ahead of the others as barriers let it: the order that shows most races.
inline void run_until_barrier(std::mt19937& random) {
  Machine& m = machine();
  const auto in_order = [&](int count) {
    std::vector<int> turns(static_cast<size_t>(count));
    for (int n = 0; n < count; ++n) turns[n] = m.order == Order::kReversed ? count - 1 - n : n;
    if (m.order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    return turns;
  };
  for (const int warp : in_order((m.threads + kWarp - 1) / kWarp)) {
    const int first = warp * kWarp, last = std::min(first + kWarp, m.threads);
    do {
      for (const int lane : in_order(last - first)) run_thread(first + lane);
    } while (release(first, last, State::kShuffle));
  }
}

inline const char* run_block(std::mt19937& random) {
  Machine& m = machine();
  ++m.block_serial;
  m.shared.clear();
  for (int t = 0; t < m.threads; ++t) {
    Fibre& fibre = m.fibres[t];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    fibre.state = State::kReady;
    fibre.shuffles = fibre.votes = 0;
    makecontext(&fibre.context, run_fibre, 0);
  }
  do {
    run_until_barrier(random);
  } while (release(0, m.threads, State::kBarrier) || release(0, m.threads, State::kVote));
  for (int t = 0; t < m.threads; ++t)
    if (m.fibres[t].state != State::kDone) return "not all threads reach the same barrier";
  for (const Guarded* variable : m.shared)
    if (!variable->intact()) return "a write past the end of shared memory";
  return nullptr;
}

inline const char* run(int64_t blocks, int threads, int64_t dynamic_bytes,
                       const std::function<void()>& body) {
  Machine& m = machine();
  if (blocks < 1 || threads < 1 || threads > kMaxThreads || dynamic_bytes < 0 ||
      dynamic_bytes > m.max_shared_bytes)
    return "an invalid launch";
  ++m.launches;
  m.threads = threads;
  m.dynamic_bytes = static_cast<size_t>(dynamic_bytes);
  blockDim.x = static_cast<unsigned>(threads);
  m.body = body;
  if (m.fibres.size() < static_cast<size_t>(threads)) m.fibres.resize(static_cast<size_t>(threads));
  gridDim.x = static_cast<unsigned>(blocks);
  std::mt19937 random(1);
  const char* error = nullptr;
  for (int64_t block = 0; block < blocks && error == nullptr; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    error = run_block(random);
  }
  return error;
}

}  // namespace qflux::emulator

inline void __syncthreads() { qflux::emulator::wait(qflux::emulator::State::kBarrier); }
inline int __syncthreads_and(int vote) {
  using namespace qflux::emulator;
  Machine& m = machine();
  const int phase = m.fibres[m.current].votes++ % 2;
  m.fibres[m.current].vote[phase] = vote != 0;
  wait(State::kVote);
  return std::all_of(m.fibres.begin(), m.fibres.begin() + m.threads,
                     [&](const Fibre& fibre) { return fibre.vote[phase]; });
}

namespace qflux::emulator {

// Gives `value` to the warp and returns that of lane source(lane).
template <class Source>
double exchange(double value, const Source& source) {
  Machine& m = machine();
  const int self = m.current, lane = self % kWarp;
  const int phase = m.fibres[self].shuffles++ % 2;
  m.fibres[self].lane_value[phase] = value;
  wait(State::kShuffle);
  return m.fibres[self - lane + source(lane)].lane_value[phase];
}

inline float widen_half(uint32_t pair, int which) {
  const uint32_t bits = pair >> 16 * which << 16;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// The number without the bits below the last of a float32 of the size of `like`.
inline double cut_off(double number, double like) {
  const double last = std::ldexp(1, std::max(std::ilogb(like) - 23, -149));
  return std::trunc(number / last) * last;
}

// sum + a . b as a tensor core adds it up, with fewer bits than any is known to have: the terms
// lose what lies below the last bit of a float32 as large as the largest of them, and the sum what
// does not fit float32.
inline float add_dot(float sum, const float* a, const float* b, int count) {
  double terms[16 + 1] = {sum}, largest = std::abs(sum);
  for (int k = 0; k < count; ++k) {
    terms[k + 1] = static_cast<double>(a[k]) * b[k];
    largest = std::max(largest, std::abs(terms[k + 1]));
  }
  double total = 0;
  const bool finite =
      std::all_of(terms, terms + count + 1, [](double t) { return std::isfinite(t); });
  if (!finite || largest == 0) {
    for (int k = 0; k <= count; ++k) total += terms[k];
    return static_cast<float>(total);
  }
  for (int k = 0; k <= count; ++k) total += cut_off(terms[k], largest);
  return total == 0 ? 0 : static_cast<float>(cut_off(total, total));
}

// mma.m16n8k16 of bfloat16, eight places of k at a time.
inline void multiply_fragments(const uint32_t (&left)[4], const uint32_t (&right)[2],
                               float (&sum)[4]) {
  constexpr int kInner = 16, kAtOnce = 8;
  Machine& m = machine();
  const int self = m.current, lane = self % kWarp, warp = self - lane;
  const int phase = m.fibres[self].shuffles++ % 2;
  m.fibres[self].fragments[phase] = {left[0], left[1], left[2], left[3], right[0], right[1]};
  ++m.products;
  wait(State::kShuffle);
  const auto fragments = [&](int row, int k) {
    return m.fibres[warp + 4 * row + k % 8 / 2].fragments[phase];
  };
  for (int n = 0; n < 4; ++n) {
    const int half = n / 2, column = lane % 4 * 2 + n % 2;
    float a[kInner], b[kInner];
    for (int k = 0; k < kInner; ++k) {
      a[k] = widen_half(fragments(lane / 4, k)[half + k / 8 * 2], k % 2);
      b[k] = widen_half(fragments(column, k)[4 + k / 8], k % 2);
    }
    for (int k = 0; k < kInner; k += kAtOnce) sum[n] = add_dot(sum[n], a + k, b + k, kAtOnce);
  }
}

}  // namespace qflux::emulator

inline double __shfl_up_sync(unsigned /*mask*/, double value, int distance) {
  return qflux::emulator::exchange(
      value, [&](int lane) { return lane < distance ? lane : lane - distance; });
}

inline double __shfl_xor_sync(unsigned /*mask*/, double value, int bits) {
  return qflux::emulator::exchange(value, [&](int lane) { return lane ^ bits; });
}
inline float __shfl_xor_sync(unsigned mask, float value, int bits) {
  return static_cast<float>(__shfl_xor_sync(mask, static_cast<double>(value), bits));
}

inline unsigned __ballot_sync(unsigned /*mask*/, bool vote) {
  using namespace qflux::emulator;
  Machine& m = machine();
  const int self = m.current, phase = m.fibres[self].shuffles % 2;
  exchange(vote ? 1 : 0, [](int lane) { return lane; });
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    votes |= unsigned(m.fibres[self - self % kWarp + lane].lane_value[phase] != 0) << lane;
  return votes;
}

inline void __syncwarp() { qflux::emulator::wait(qflux::emulator::State::kShuffle); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) {
  ++qflux::emulator::machine().picks;
  return __builtin_ffs(static_cast<int>(bits));
}
