// The hot loops of decoding: single rows, an index of keys (cpu/decode/index.h), runs of keys.
#pragma once

#include "tree.h"

namespace qflux::cpu {

// Children of a node: a row meets all of them at once, a child in each lane.
constexpr int kIndexFan = 16;
constexpr int kIndexHeights = 8;
// Trees of a sequence: one for a digit of its length, at most.
constexpr int kMostTrees = 64;

// A tree over keys. Nodes first[h] .. first[h] + size[h] - 1 are of height h; those of height 0 are
// leaves of kLeaf keys, those of the largest, at most kIndexFan, the roots. Each first[h] is a
// multiple of kIndexFan, and so is the number of all nodes, some of which nobody uses.
template <class T>
struct IndexView {
  int32_t height;
  int32_t first[kIndexHeights], size[kIndexHeights];
  int64_t nodes;
  int64_t value_dim;
  int64_t width;    // of the moments, a whole number of vectors
  double* moments;  // [nodes][width]: of ones, then of each column of values
  T* boxes;         // [nodes / kIndexFan][6][kIndexFan]: the components of Box
  // [leaves][2 + value_dim][kLeaf]: x, y and values, what is behind the last key NaN, and zero.
  // Together, since a walk of a large tree meets few leaves of it and none twice.
  T* keys;

  QFLUX_INLINE T* box(int64_t node) const {
    return boxes + node / kIndexFan * 6 * kIndexFan + node % kIndexFan;
  }
  QFLUX_INLINE T* leaf(int64_t n) const { return keys + n * (2 + value_dim) * kLeaf; }
};

// A row: it keeps keys with p = q . k + bias > compare, which weigh (p - shift) - rest. A node with
// q . k > high everywhere is kept whole, one with q . k < low everywhere is dropped.
template <class T>
struct Query {
  T x, y, bias, compare, shift, rest, low, high;

  // A weight is q . k less this.
  QFLUX_INLINE double offset() const { return double(shift) + double(rest) - double(bias); }
};

// What a walk of an index leaves: nodes that a row keeps whole, and leaves that its boundary
// crosses, with the intervals of their q . k. There is room for all of them.
template <class T>
struct Cut {
  int32_t *nodes, *leaves;
  T *low, *high;
  int32_t* blocks;  // for the loops, a number for each node and one more
  int64_t node_count = 0, leaf_count = 0;
  double sums[kColumnMoments] = {};  // of the nodes: of 1, x, y
};

// The pairs of a row met one by one, sorted by two numbers between which its threshold is sought:
// of those above `high` only sums of 1 and of p - high, of the others above `low` their p.
template <class T>
struct PairBand {
  T low, high;
  T* products;  // with room for a vector more
  int64_t count = 0;
  Mass<T> above;
};

// The threshold of a mass over scores q . k is the largest of q . m - 1 / n over all sets of keys,
// n of mean m: a convex function of q that every set touches or bounds from below. Sets that rows
// kept stay, in planes of so many: m, 1 / n (zero: none), then numbers of who searches.
constexpr int kTangents = 64;
constexpr int kTangentNumbers = 3 * kTangents + 16;
template <class T>
struct Tangent {
  T threshold, inverse;  // q . m - 1 / n and 1 / n, which is zero where there is none
};

// Of the q . k of some keys.
template <class T>
struct Spread {
  T top;
  double mean, deviation;
};

template <class T>
struct DecodeLoops {
  // Boxes and moments of leaves first .. last - 1, and of all other nodes of a height. Without
  // `exact_points` a box is wider than its keys even where they are one point.
  void (*build_leaves)(const IndexView<T>&, int64_t count, int64_t first, int64_t last,
                       bool exact_points);
  void (*build_nodes)(const IndexView<T>&, int height, bool exact_points);

  // Walks of `count` trees for a row, at most kMostTrees; the largest q . k of the nodes that it
  // keeps whole joins `top`.
  void (*cut)(const IndexView<T>*, int64_t count, const Query<T>&, Cut<T>*, T* top);
  // What a row, or one with a boundary inside that of the cuts, keeps of them; or of `count` keys
  // in planes. Both add to their results.
  void (*cut_context)(const IndexView<T>*, int64_t count, const Cut<T>*, const Query<T>&,
                      KeptMass<T>*, double* context);
  void (*run_context)(const KeyPlanes<T>&, int64_t count, const Query<T>&, KeptMass<T>*,
                      double* context);
  // The pairs of leaves of a cut, or of keys in planes, that join a band of q . k; and the mass of
  // its products.
  void (*cut_band)(const IndexView<T>&, const Cut<T>&, Point<T> query, PairBand<T>*);
  void (*run_band)(const KeyPlanes<T>&, int64_t count, Point<T> query, PairBand<T>*);
  void (*band_mass)(const PairBand<T>&, const Query<T>&, Mass<T>*);
  Tangent<T> (*highest_tangent)(const T* tangents, Point<T> query);
  void (*run_spread)(const KeyPlanes<T>&, int64_t count, Point<T> query, Spread<T>*);
  // Context and mass of a row of the inverse gate.
  void (*run_gate)(const KeyPlanes<T>&, int64_t count, Point<T> query, T eps, T min_gate, Mass<T>*,
                   double* context);
};

}  // namespace qflux::cpu
