// Staging of sources into shared memory, reading them back, and sums that outlast a tile.
#pragma once

#include "../../math/sums.h"
#include "runtime.cuh"
#include "traits.h"

namespace qflux::cuda {

template <class T>
struct Wide;
template <>
struct Wide<float> {
  using Type = float4;
};
template <>
struct Wide<double> {
  using Type = double2;
};

__device__ __forceinline__ void unpack(float4 from, float* to) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}
__device__ __forceinline__ void unpack(double2 from, double* to) { to[0] = from.x, to[1] = from.y; }

// Records from a 16-byte boundary on; all threads of a warp read the same ones.
template <int kCount, int kWidth, class T>
__device__ __forceinline__ void read_records(const T* from, T (&to)[kCount][kWidth]) {
  using Type = typename Wide<T>::Type;
  constexpr int kPart = sizeof(Type) / sizeof(T);
  T flat[kCount * kWidth];
#pragma unroll
  for (int n = 0; n < kCount * kWidth / kPart; ++n)
    unpack(reinterpret_cast<const Type*>(from)[n], flat + n * kPart);
#pragma unroll
  for (int n = 0; n < kCount * kWidth; ++n) to[n / kWidth][n % kWidth] = flat[n];
}

// A record at any place, and one put there by fetch(record).
template <int kWidth, class T>
__device__ __forceinline__ void read_record(const T* from, T (&to)[kWidth]) {
#pragma unroll
  for (int c = 0; c < kWidth; ++c) to[c] = from[c];
}
template <int kWidth, class T, class Fetch>
__device__ __forceinline__ void put_record(T* place, const Fetch& fetch) {
  T record[kWidth] = {};
  fetch(record);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) place[c] = record[c];
}

// Fills records 0 .. count - 1 by fetch(n, record), and one of zeros after an odd count for the
// tiles that are read in twos.
template <int kWidth, class T, class Fetch>
__device__ __forceinline__ void stage(T* tile, int count, int threads, const Fetch& fetch) {
  // Unrolled, the addresses in flight would cost the registers of the pair loop.
#pragma unroll 1
  for (int n = threadIdx.x; n < count + count % 2; n += threads)
    put_record<kWidth>(tile + n * kWidth, [&](T(&record)[kWidth]) {
      if (n < count) fetch(n, record);
    });
}

}  // namespace qflux::cuda
