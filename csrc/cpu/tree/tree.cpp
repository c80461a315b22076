#include "tree.h"

#include <algorithm>

#include "../parallel.h"

namespace qflux::cpu {
namespace {

// Leaves that one thread builds at a time.
constexpr int64_t kLeavesAtOnce = 32;

}  // namespace

template <class T>
KeyTree<T>::KeyTree(const Loops<T>& loops, const KeyPlanes<T>& keys, const int32_t* order,
                    int64_t count)
    : count_(count), view_{} {
  const int64_t leaves = ceil_div(count, kLeaf);
  const int64_t value_dim = keys.value_dim;
  const int64_t planes = 2 + value_dim;
  planes_ = room<T>(leaves * planes * kLeaf);
  order_ = room<int32_t>(count);
  T* const x = planes_.get();
  view_.keys = {x, x + kLeaf, x + 2 * kLeaf, kLeaf, value_dim};
  view_.width = moments_width(value_dim);
  int64_t nodes = leaves;
  view_.first[1] = static_cast<int32_t>(leaves);
  for (int64_t level = leaves; level > kFan;) {
    level = ceil_div(level, kFan);
    nodes += level;
    ++view_.height;
    view_.first[view_.height + 1] = static_cast<int32_t>(nodes);
  }
  // Walks look at kFan nodes from any on.
  boxes_ = room<Box<T>>(nodes + kFan);
  std::fill_n(&boxes_[nodes], kFan, Box<T>{});
  masses_ = room<double>(4 * nodes);
  moments_ = room<double>(view_.width * nodes);
  view_.boxes = boxes_.get();
  view_.masses = masses_.get();
  view_.moments = moments_.get();

  each(ceil_div(leaves, kLeavesAtOnce), [&](int64_t chunk) {
    const Range part = tile_range(chunk, kLeavesAtOnce, leaves);
    const int64_t begin = part.first * kLeaf, end = std::min(part.last * kLeaf, count);
    std::copy(order + begin, order + end, &order_[begin]);
    for (int64_t leaf = part.first; leaf < part.last; ++leaf)
      gather_leaf(keys, order, count, leaf, x + view_.leaf(leaf));
    loops.tree.build_leaves(view_, count, part.first, part.last, boxes_.get(), masses_.get(),
                            moments_.get());
  });
  for (int height = 1; height <= view_.height; ++height)
    loops.tree.build_nodes(view_, height, boxes_.get(), masses_.get(), moments_.get());
}

template <class T>
int64_t KeyTree<T>::bytes() const {
  const int64_t planes = view_.leaf(view_.first[1]);
  const int64_t node = sizeof(Box<T>) + (4 + view_.width) * sizeof(double);
  return planes * sizeof(T) + count_ * sizeof(int32_t) + view_.nodes() * node;
}

template class KeyTree<float>;
template class KeyTree<double>;

}  // namespace qflux::cpu
