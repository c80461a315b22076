// A static tree over a set of keys that answers half-plane sums: for a row q and a threshold tau
// the sums over the keys with q . k > tau, in about the square root of their number, and fewer
// where the line cuts off a small cap.
//
// Keys are ordered along a space-filling curve; runs of kLeaf of them are leaves, runs of kFan
// nodes the next height. A node knows a box around its keys and their moments (math/tree.h).
//
//   order = spatial_order(x, y, n);                     // order.h
//   KeyTree<float> tree(loops, planes, order, n);       // planes: x, y and values; O(n)
//   loops.tree.mass(tree.view(), rows, sums, &pairs);   // adds F(tau), its slope, the largest z
//   loops.tree.context(tree.view(), rows, sums, context, &pairs);  // and sum (z - tau) v
//
// `rows` are at most kGroup records (q, tau, rest) that all see every key of the tree; alone or as
// a group. Trees over disjoint sets of keys add up, since both calls add to their results.
// Sparsemax asks ThresholdSearch (search.h) for the next tau until update() holds after a
// `context`; driver.cpp shows the loop. A cache, whose rows are few and which keeps its trees, has
// trees of its own (cpu/decode/index.h).
#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "../isa/dispatch.h"
#include "../isa/tree.h"

namespace qflux::cpu {

template <class T>
class KeyTree {
 public:
  // The keys at `order`, `count` of them, of planes.
  KeyTree(const Loops<T>& loops, const KeyPlanes<T>& keys, const int32_t* order, int64_t count);

  const TreeView<T>& view() const { return view_; }
  int64_t count() const { return count_; }
  const int32_t* order() const { return order_.get(); }
  int64_t bytes() const;

 private:
  int64_t count_;
  TreeView<T> view_;
  std::unique_ptr<T[]> planes_;
  std::unique_ptr<Box<T>[]> boxes_;
  std::unique_ptr<double[]> masses_, moments_;
  std::unique_ptr<int32_t[]> order_;
};

// The keys of a leaf, of `count` in an order: x, y and values [2 + value_dim][kLeaf], what is
// behind the last key NaN, and zero.
template <class T>
void gather_leaf(const KeyPlanes<T>& keys, const int32_t* order, int64_t count, int64_t leaf,
                 T* to) {
  const int32_t* const numbers = order + leaf * kLeaf;
  const int64_t size = std::min(kLeaf, count - leaf * kLeaf);
  const auto gather = [&](const T* from, T behind) {
    for (int64_t n = 0; n < size; ++n) to[n] = from[numbers[n]];
    std::fill(to + size, to + kLeaf, behind);
    to += kLeaf;
  };
  gather(keys.x, std::numeric_limits<T>::quiet_NaN());
  gather(keys.y, std::numeric_limits<T>::quiet_NaN());
  for (int64_t c = 0; c < keys.value_dim; ++c) gather(keys.values + c * keys.stride, T(0));
}

// Numbers of a key's or row's moments, in whole vectors.
inline int64_t moments_width(int64_t value_dim) {
  return (kColumnMoments * (value_dim + 1) + 7) / 8 * 8;
}

}  // namespace qflux::cpu
