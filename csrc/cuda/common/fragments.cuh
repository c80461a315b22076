// Products of matrices that a warp holds in registers, by tensor cores: float32 in bfloat16 parts.
//
// A lane is `row` = lane / 4 and `pair` = lane % 4 of a fragment. In registers of two numbers, the
// first in the lower half, it holds
//  - of the left matrix (16 x 16) the columns 2 pair and 2 pair + 1 of rows row and row + 8, then
//    columns 2 pair + 8 and 2 pair + 9 of the same rows;
//  - of the right matrix (16 x 8) the rows 2 pair and 2 pair + 1 of column `row`, then rows
//    2 pair + 8 and 2 pair + 9;
//  - of their product, in float32, columns 2 pair and 2 pair + 1 of row `row`, then of row + 8.
#pragma once

#include "../../math/storage.h"
#include "runtime.cuh"

namespace qflux::cuda {

constexpr int kFragment = 16;        // rows of either matrix
constexpr int kFragmentColumns = 8;  // of the right one

// Parts of a number. Of the nine products of two numbers' parts those of the first and first, first
// and second, ..., in which the places add up to less than kParts, are what float32 can hold: the
// other three come to less than 2^-22 of the product, of either sign.
constexpr int kParts = 3;

__device__ __forceinline__ float first_of(uint32_t pair) { return float_of(pair << 16); }
__device__ __forceinline__ float second_of(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// Two numbers without what bfloat16 has no bits for.
__device__ __forceinline__ uint32_t cut(float first, float second) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(bits_of(first), bits_of(second), 0x7632);  // the upper halves
#else
  return bits_of(first) >> 16 | (bits_of(second) & 0xffff0000u);
#endif
}
// The parts of two numbers, with eight bits each: a number from 2^-110 on is their sum. The parts
// of what is not finite are not all finite.
__device__ __forceinline__ void cut_in_parts(float first, float second, uint32_t (&parts)[kParts]) {
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
    parts[n] = cut(first, second);
    first -= float_of(bits_of(first) & 0xffff0000u);
    second -= float_of(bits_of(second) & 0xffff0000u);
  }
}

// Two numbers rounded to the nearest of bfloat16.
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return narrow_bfloat16(first) | uint32_t{narrow_bfloat16(second)} << 16;
#endif
}
// The parts of two numbers, each the nearest to what those before leave, so that the products that
// are left out have either sign. Returns whether both numbers are the sums of their parts: not if
// they are not finite, or the first part overflows, or the last would be below 2^-133.
__device__ __forceinline__ bool round_in_parts(float first, float second,
                                               uint32_t (&parts)[kParts]) {
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
    parts[n] = round_pair(first, second);
    first -= first_of(parts[n]);
    second -= second_of(parts[n]);
  }
  return (first == 0) & (second == 0);
}
__device__ __forceinline__ bool has_parts(float number) {
  uint32_t parts[kParts];
  return round_in_parts(number, 0, parts);
}

// Adds the product of two fragments. What the hardware cannot hold in float32 it cuts off.
__device__ __forceinline__ void add_product(const uint32_t (&left)[4], uint32_t right_first,
                                            uint32_t right_second, float (&sum)[4]) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_first),
        "r"(right_second));
#else
  __trap();  // not launched where has_tensor_cores() is false
#endif
#elif !defined(__CUDACC__)
  emulator::multiply_fragments(left, {right_first, right_second}, sum);
#endif
}

}  // namespace qflux::cuda
