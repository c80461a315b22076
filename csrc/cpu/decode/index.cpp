#include "index.h"

#include <algorithm>
#include <limits>

#include "../isa/dense.h"
#include "../tree/order.h"
#include "../tree/tree.h"
#include "decode.h"

namespace qflux::cpu {
namespace {

// Leaves that one thread builds at a time.
constexpr int64_t kLeavesAtOnce = 32;
constexpr int64_t kAlign = 64;

template <class T>
int64_t node_bytes(int64_t value_dim) {
  return 6 * sizeof(T) + moments_width(value_dim) * sizeof(double);
}

}  // namespace

std::vector<Range> runs_of(int64_t tokens, int64_t chunk) {
  std::vector<Range> runs;
  int64_t size = chunk;
  while (size * kRunFactor <= tokens) size *= kRunFactor;
  for (int64_t begin = 0; begin + chunk <= tokens; size /= kRunFactor)
    for (; begin + size <= tokens; begin += size) runs.push_back({begin, begin + size});
  return runs;
}

template <class T>
int64_t index_unit(int64_t chunk, int64_t value_dim) {
  // Nodes of each height are rounded up to kIndexFan, which the last term has room for: a run of m
  // chunks has log(m) heights more than one of one.
  const int64_t leaves = chunk / kLeaf;
  const int64_t nodes = round_up(leaves + ceil_div(leaves, kIndexFan - 1), kIndexFan) + kIndexFan;
  return round_up(nodes * node_bytes<T>(value_dim) + (2 + value_dim) * chunk * sizeof(T), kAlign);
}

template <class T>
IndexView<T> index_view(uint8_t* memory, int64_t count, int64_t value_dim) {
  IndexView<T> view{};
  const int64_t leaves = ceil_div(count, kLeaf);
  view.value_dim = value_dim;
  view.width = moments_width(value_dim);
  int64_t size = leaves;
  for (;; ++view.height) {
    view.first[view.height] = static_cast<int32_t>(view.nodes);
    view.size[view.height] = static_cast<int32_t>(size);
    view.nodes += round_up(size, kIndexFan);
    if (size <= kIndexFan) break;
    size = ceil_div(size, kIndexFan);
  }
  view.moments = reinterpret_cast<double*>(memory);
  view.boxes = reinterpret_cast<T*>(view.moments + view.nodes * view.width);
  view.keys = view.boxes + 6 * view.nodes;
  return view;
}

template <class T>
void build_index(const Loops<T>& loops, const IndexView<T>& index, const KeyPlanes<T>& from,
                 int64_t count, bool exact_points) {
  const std::vector<int32_t> order = spatial_order(from.x, from.y, count);
  const int64_t leaves = index.size[0];
  each(ceil_div(leaves, kLeavesAtOnce), [&](int64_t chunk) {
    const Range part = tile_range(chunk, kLeavesAtOnce, leaves);
    for (int64_t leaf = part.first; leaf < part.last; ++leaf) {
      const int32_t* const numbers = order.data() + leaf * kLeaf;
      const int64_t size = std::min(kLeaf, count - leaf * kLeaf);
      T* to = index.leaf(leaf);
      const auto gather = [&](const T* plane, T behind) {
        for (int64_t k = 0; k < size; ++k) to[k] = plane[numbers[k]];
        std::fill(to + size, to + kLeaf, behind);
        to += kLeaf;
      };
      gather(from.x, std::numeric_limits<T>::quiet_NaN());
      gather(from.y, std::numeric_limits<T>::quiet_NaN());
      for (int64_t c = 0; c < from.value_dim; ++c) gather(from.values + c * from.stride, T(0));
    }
    loops.decode.build_leaves(index, count, part.first, part.last, exact_points);
  });
  for (int height = 1; height <= index.height; ++height)
    loops.decode.build_nodes(index, height, exact_points);
}

template int64_t index_unit<float>(int64_t, int64_t);
template int64_t index_unit<double>(int64_t, int64_t);
template IndexView<float> index_view(uint8_t*, int64_t, int64_t);
template IndexView<double> index_view(uint8_t*, int64_t, int64_t);
template void build_index(const Loops<float>&, const IndexView<float>&, const KeyPlanes<float>&,
                          int64_t, bool);
template void build_index(const Loops<double>&, const IndexView<double>&, const KeyPlanes<double>&,
                          int64_t, bool);

}  // namespace qflux::cpu
