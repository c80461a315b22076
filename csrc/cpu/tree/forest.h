// The trees of one sequence: which rows meet which keys by tree and which pair by pair
// (math/rectangles.h).
#pragma once

#include <vector>

#include "../../math/rectangles.h"
#include "../isa/dense.h"
#include "../parallel.h"
#include "tree.h"

namespace qflux::cpu {

// Keys in front of a row in its own base block are met pair by pair.
constexpr int64_t kTreeBase = 512;
// Rows that are stored together, neighbours in space beside one another: so few that those of a
// small tree are near, and trees with more rows go through all of a block as they go through space.
constexpr int64_t kRowBlock = 1024;

// The trees of a level; without a causal mask the one tree of all keys.
template <class T>
struct TreeLevel {
  int64_t size;
  std::vector<Rectangle<>> where;
  std::vector<std::unique_ptr<KeyTree<T>>> trees;
  std::vector<int32_t> rows;  // where they are stored, those of a rectangle at its place in order
};

template <class T>
class Forest {
 public:
  Forest(const Loops<T>& loops, const Sequence<T>& sequence);

  const KeyPlanes<T>& keys() const { return keys_; }
  const std::vector<TreeLevel<T>>& levels() const { return levels_; }

  // Which row of the sequence is stored at a place, and the reverse.
  int64_t row_at_place(int64_t place) const { return rows_[place]; }
  int64_t place_of_row(int64_t row) const { return places_[row]; }

  // The keys of its own base block that a row sees.
  Range base_keys(int64_t row) const {
    const int64_t end = visible_.visible_keys(row), place = row + visible_.shift;
    const int64_t begin = place / kTreeBase * kTreeBase;
    return visible_.causal && end > 0 && begin < end ? Range{begin, end} : Range{0, 0};
  }

 private:
  void stage_keys(const Sequence<T>& s);
  void store_rows();

  const Visibility visible_;
  std::unique_ptr<T[]> planes_;
  KeyPlanes<T> keys_;
  std::vector<TreeLevel<T>> levels_;
  std::vector<int32_t> rows_, places_;
};

}  // namespace qflux::cpu
