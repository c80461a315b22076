// A static tree over a set of keys that answers half-plane sums: for a row q and a threshold tau
// the sums over the keys with q . k > tau, in about the square root of their number, and fewer
// where the line cuts off a small cap.
//
// Keys are ordered along a space-filling curve; runs of kLeaf of them are leaves, runs of kFan
// nodes the next height. A node knows a box around its keys and their moments (math/tree.h).
//
//   KeyTree<float> tree(keys, value_dim, order, loops);       // O(n); `order` from spatial_order
//   loops.mass(tree.view(), rows, sums, &pairs);              // F(tau), its slope, the largest z
//   loops.context(tree.view(), rows, sums, context, &pairs);  // and sum (z - tau) v
//
// Trees over disjoint sets of keys add up: a cache that grows keeps a short tail of keys that it
// meets as a run (loops.run_mass, loops.run_context), makes a tree of a full tail and merges trees
// of equal size by building one over both, with the keys in spatial_order of their union. Rows in
// one group walk a tree together; they need not be neighbours, but it is cheaper if they are. For
// thresholds by mean and deviation tau is known and one `context` gives the answer, with the
// query's bias taken from tau; for sparsemax `MassSolver` (mass.h) says which tau to ask next.
#pragma once

#include <functional>
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
