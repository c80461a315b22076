// Points in an order in which neighbours lie together.
#pragma once

#include <cstdint>
#include <vector>

namespace qflux::cpu {

// The numbers 0 .. count - 1 of points along a Hilbert curve over their ranks by x and by y, so
// that clusters and outliers are told apart as well as points that are spread evenly. The points
// must be finite.
template <class T>
std::vector<int32_t> spatial_order(const T* x, const T* y, int64_t count);

}  // namespace qflux::cpu
