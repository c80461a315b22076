#include "index.h"

#include <algorithm>

#include "../isa/dense.h"
#include "../tree/order.h"
#include "../tree/tree.h"
#include "decode.h"

namespace qflux::cpu {
namespace {

// Leaves that one thread builds at a time.
constexpr int64_t kLeavesAtOnce = 32;
constexpr int64_t kAlign = 64;

// The tree of so many keys, without its memory.
template <class T>
IndexView<T> shape_of(int64_t count, int64_t value_dim) {
  IndexView<T> view{};
  view.value_dim = value_dim;
  view.width = moments_width(value_dim);
  int64_t size = ceil_div(count, kLeaf);
  for (;; ++view.height) {
    view.first[view.height] = static_cast<int32_t>(view.nodes);
    view.size[view.height] = static_cast<int32_t>(size);
    view.nodes += round_up(size, kIndexFan);
    if (size <= kIndexFan) return view;
    size = ceil_div(size, kIndexFan);
  }
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
IndexView<T> index_view(uint8_t* memory, int64_t count, int64_t value_dim) {
  IndexView<T> view = shape_of<T>(count, value_dim);
  view.moments = reinterpret_cast<double*>(memory);
  view.boxes = reinterpret_cast<T*>(view.moments + view.nodes * view.width);
  view.keys = view.boxes + 6 * view.nodes;
  return view;
}

template <class T>
int64_t index_unit(int64_t chunk, int64_t value_dim) {
  // Small runs have the most nodes for a chunk, since those of each height are rounded up.
  constexpr int64_t kLargest = 1 << 12;
  int64_t unit = 0;
  for (int64_t chunks = 1; chunks <= kLargest; chunks *= kRunFactor) {
    const IndexView<T> view = shape_of<T>(chunks * chunk, value_dim);
    const int64_t node = 6 * sizeof(T) + view.width * sizeof(double);
    const int64_t bytes = view.nodes * node + (2 + value_dim) * chunks * chunk * sizeof(T);
    unit = std::max(unit, ceil_div(bytes, chunks));
  }
  return round_up(unit, kAlign);
}

template <class T>
void build_index(const Loops<T>& loops, const IndexView<T>& index, const KeyPlanes<T>& from,
                 int64_t count, bool exact_points) {
  const std::vector<int32_t> order = spatial_order(from.x, from.y, count);
  const int64_t leaves = index.size[0];
  each(ceil_div(leaves, kLeavesAtOnce), [&](int64_t chunk) {
    const Range part = tile_range(chunk, kLeavesAtOnce, leaves);
    for (int64_t leaf = part.first; leaf < part.last; ++leaf)
      gather_leaf(from, order.data(), count, leaf, index.leaf(leaf));
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
