// Numbers of tensors as they are stored: as kernels compute, or in half precision, which kernels of
// a GPU widen where they load and round to the nearest, ties to even, where they store.
#pragma once

#include <cstring>

#include "scalar.h"

namespace qflux {

enum class Storage : int32_t { kSame, kFloat16, kBfloat16 };

QFLUX_INLINE uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}
QFLUX_INLINE float float_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

QFLUX_INLINE float widen_bfloat16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }
QFLUX_INLINE uint16_t narrow_bfloat16(float number) {
  const uint32_t bits = bits_of(number);
  if (number != number) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#if defined(__CUDA_ARCH__)
QFLUX_INLINE float widen_float16(uint16_t bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
  return number;
}
QFLUX_INLINE uint16_t narrow_float16(float number) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
  return bits;
}
#else
QFLUX_INLINE float widen_float16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, rest = uint32_t{bits} & 0x7fffu;
  const float magnitude = rest < 0x7c00u ? float_of(rest << 13) * 0x1p112f
                                         : float_of(rest << 13 | 0x7f800000u);  // not finite
  return float_of(bits_of(magnitude) | sign);
}
QFLUX_INLINE uint16_t narrow_float16(float number) {
  const uint32_t bits = bits_of(number), sign = bits >> 31 << 15, rest = bits & 0x7fffffffu;
  uint32_t magnitude;
  if (number != number)
    magnitude = 0x7fffu;
  else if (rest >= bits_of(65520.0f))  // rounds to infinity
    magnitude = 0x7c00u;
  else if (rest < bits_of(0x1p-14f))  // the sum is rounded to a multiple of the smallest number
    magnitude = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  else
    magnitude = (rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13;
  return static_cast<uint16_t>(magnitude | sign);
}
#endif

QFLUX_INLINE float widen(uint16_t bits, Storage storage) {
  return storage == Storage::kFloat16 ? widen_float16(bits) : widen_bfloat16(bits);
}
QFLUX_INLINE uint16_t narrow(float number, Storage storage) {
  return storage == Storage::kFloat16 ? narrow_float16(number) : narrow_bfloat16(number);
}

}  // namespace qflux
