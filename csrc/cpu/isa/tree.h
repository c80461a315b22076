// The hot loops over a tree of keys (cpu/tree/tree.h).
#pragma once

#include "../../math/tree.h"

namespace qflux::cpu {

// Keys of a leaf, children of a node, rows that share a walk.
constexpr int64_t kLeaf = 32;
constexpr int32_t kFan = 4;
constexpr int kGroup = 32;
constexpr int kHeights = 16;

template <class T>
QFLUX_INLINE void prefetch(const T* from, int64_t count) {
  for (int64_t n = 0; n < count; n += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(from + n);
}

// Sums of one row over the keys that it keeps.
template <class T>
struct Mass {
  double excess = 0, count = 0;  // sum of q . k - tau, and of 1
  T top;                         // the largest q . k met, or a bound on it; not below the row's own
};
// The same with the sum of the keys.
template <class T>
struct KeptMass : Mass<T> {
  double x = 0, y = 0;
};

// Of a row's gradient: sums of 1, u, k, u k with u = g . v.
struct KeptSums {
  double count = 0, u = 0, x = 0, y = 0, ux = 0, uy = 0;
};

// Keys in planes, padded to whole vectors.
template <class T>
struct KeyPlanes {
  const T *x, *y;
  const T* values;  // [value_dim][stride]
  int64_t stride, value_dim;
};

template <class T>
struct TreeView {
  // Of heights 0 (leaves) to `height`, whose nodes, at most kFan, are the roots: nodes
  // first[h] .. first[h + 1] - 1 are of height h, and node n of height h > 0 has up to kFan
  // children from child(h, n) on.
  int32_t height;
  int32_t first[kHeights + 1];
  // Leaf after leaf, each x, y and values of its keys, those behind the last key NaN: planes of the
  // first, from which those of a leaf are as many numbers away as leaf() says.
  KeyPlanes<T> keys;
  int64_t width;  // of the moments, a whole number of vectors
  const Box<T>* boxes;
  const double* masses;   // [nodes][4]: sums of 1, x, y
  const double* moments;  // [nodes][width]: each column of values, then that of ones

  QFLUX_INLINE int32_t nodes() const { return first[height + 1]; }
  QFLUX_INLINE int64_t leaf(int64_t n) const { return n * (2 + keys.value_dim) * kLeaf; }
  QFLUX_INLINE int32_t child(int h, int32_t node) const {
    return first[h - 1] + (node - first[h]) * kFan;
  }
};

// Rows as records: query x and y, tau, and what tau lost in rounding to T; for gradients -mean u in
// its place, and g[value_dim].
constexpr int64_t kRowNumbers = 4;
template <class T>
struct TreeRows {
  const T* records;
  int64_t stride, count;

  QFLUX_INLINE const T* at(int64_t n) const { return records + n * stride; }
};

// What keys gather from rows: by pairs, and by nodes that rows keep whole.
struct TreeGradients {
  double* pairs;  // [leaves][2 + value_dim][kLeaf]: of keys and values
  double* nodes;  // [nodes][width]
};

template <class T>
struct TreeLoops {
  // The boxes and moments of leaves first .. last - 1, and of all other nodes of a height.
  void (*build_leaves)(const TreeView<T>&, int64_t count, int64_t first, int64_t last, Box<T>*,
                       double* masses, double* moments);
  void (*build_nodes)(const TreeView<T>&, int height, Box<T>*, double* masses, double* moments);

  // One group of rows, at most kGroup; all add to their results, and `pairs` counts what was met
  // pair by pair.
  void (*mass)(const TreeView<T>&, const TreeRows<T>&, Mass<T>* sums, int64_t* pairs);
  void (*context)(const TreeView<T>&, const TreeRows<T>&, Mass<T>* sums, double* context,
                  int64_t* pairs);
  void (*row_gradient)(const TreeView<T>&, const TreeRows<T>&, KeptSums*);
  // Of the subtrees under roots first .. last - 1 of one height.
  void (*key_gradient)(const TreeView<T>&, const TreeRows<T>&, int height, int32_t first,
                       int32_t last, const TreeGradients&);
  // Then hands the sums of those nodes down to their keys; key n of the tree is key order[n] of
  // point [keys][2] and values [keys][value_dim], which are added to.
  void (*hand_down)(const TreeView<T>&, const TreeGradients&, int height, int32_t first,
                    int32_t last, const int32_t* order, int64_t count, double* point,
                    double* values);

  // One row and a run of `count` keys, pair by pair.
  void (*run_mass)(const KeyPlanes<T>&, int64_t count, const T* record, Mass<T>*);
  void (*run_context)(const KeyPlanes<T>&, int64_t count, const T* record, Mass<T>*,
                      double* context);
  void (*run_row_gradient)(const KeyPlanes<T>&, int64_t count, const T* record, KeptSums*);
  // A run of keys and rows of which row n sees the first visible + n: point [keys][2], values
  // [keys][value_dim].
  void (*run_key_gradient)(const KeyPlanes<T>&, int64_t count, const TreeRows<T>&, int64_t visible,
                           double* point, double* values);
};

}  // namespace qflux::cpu
