// Scalar counterparts of the vector operations in cpu/isa/simd.h, so that one formula serves both.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define QFLUX_INLINE __host__ __device__ __forceinline__
#else
// Forced, so that a copy compiled for one instruction set is never linked into another's loop.
#define QFLUX_INLINE inline __attribute__((always_inline))
#endif
// For what takes host lambdas, which device code may not call.
#define QFLUX_HOST_INLINE inline __attribute__((always_inline))

namespace qflux {

// clang-format off
QFLUX_INLINE float  multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
QFLUX_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
QFLUX_INLINE float  absolute(float a) { return fabsf(a); }
QFLUX_INLINE double absolute(double a) { return fabs(a); }
QFLUX_INLINE float  square_root(float a) { return sqrtf(a); }
QFLUX_INLINE double square_root(double a) { return sqrt(a); }

QFLUX_INLINE float  exponential(float a) { return expf(a); }
QFLUX_INLINE double exponential(double a) { return exp(a); }

QFLUX_INLINE double reciprocal(double a) { return 1 / a; }

QFLUX_INLINE float  not_negative(float a) { return a < 0 ? 0 : a; }  // of NaN: NaN
QFLUX_INLINE double not_negative(double a) { return a < 0 ? 0 : a; }

// A NaN stays one.
QFLUX_INLINE float at_most_one(float a) { return a > 1 ? 1 : a; }
QFLUX_INLINE double at_most_one(double a) { return a > 1 ? 1 : a; }
QFLUX_INLINE bool less(float a, float b) { return a < b; }
QFLUX_INLINE bool less(double a, double b) { return a < b; }
// Negated, so that a comparison with NaN holds.
QFLUX_INLINE bool not_less(float a, float b) { return !(a < b); }
QFLUX_INLINE bool not_less(double a, double b) { return !(a < b); }
QFLUX_INLINE bool not_less_equal(float a, float b) { return !(a <= b); }
QFLUX_INLINE bool not_less_equal(double a, double b) { return !(a <= b); }
QFLUX_INLINE float  select(bool mask, float a, float b) { return mask ? a : b; }
QFLUX_INLINE double select(bool mask, double a, double b) { return mask ? a : b; }
QFLUX_INLINE float  where(bool mask, float a) { return mask ? a : 0; }
QFLUX_INLINE double where(bool mask, double a) { return mask ? a : 0; }
// clang-format on

// On a GPU up to a unit in the last place, since an exact division branches; of infinity NaN there.
QFLUX_INLINE float reciprocal(float a) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
  return fmaf(r, fmaf(-a, r, 1.0f), r);
#else
  return 1 / a;
#endif
}

template <class T>
struct Point {
  T x, y;
};

}  // namespace qflux
