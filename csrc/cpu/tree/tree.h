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
// For a cache that grows: trees over disjoint sets of keys add up, since both calls add to their
// results. A short tail of keys is met as a run (loops.tree.run_mass, run_context; keys in planes
// that are readable to whole vectors). A full tail becomes a tree, and two trees of one size merge
// into the tree of both, built over the union of their keys; so each key is built in O(log n)
// times. `rows` are at most kGroup records (q, tau, rest) that all see every key of the tree; alone
// or as a group. Sparsemax asks ThresholdSearch (search.h) for the next tau until update() holds
// after a `context`; driver.cpp shows the loop. Start the search at the largest z less one, or at
// the root among any of the keys. Thresholds by mean and deviation are known beforehand and need no
// search, but pair loops of their own for equal degrees: `excess.add` and `kept_sums` of
// isa/tree-pairs-inl.h with the score's bias in the inner product and pairs kept at equality, and
// `walk` with comparisons to match.
#pragma once

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

// Numbers of a key's or row's moments, in whole vectors.
inline int64_t moments_width(int64_t value_dim) {
  return (kColumnMoments * (value_dim + 1) + 7) / 8 * 8;
}

}  // namespace qflux::cpu
