// A matrix times a vector: what a linear map costs when one token has to read all its weights.
#pragma once

#include <cstdint>

namespace qflux::cpu {

template <class T>
struct MatvecLoops {
  // out[r] = weight[r] . x + bias[r] for rows first .. last - 1 of `count` contiguous numbers each;
  // a null bias is zero.
  void (*rows)(const T* weight, const T* bias, int64_t count, const T* x, int64_t first,
               int64_t last, T* out);
};

}  // namespace qflux::cpu
