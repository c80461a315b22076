// How a sweep divides the pairs of a sequence: the dyadic schedule of docs/subquadratic.md.
//
// A causal sequence is cut into base blocks. Pairs inside a base block are met one by one; the
// others form rectangles in levels: on the level of `size`, keys [middle - size, middle) meet the
// rows at positions [middle, middle + size) for every odd multiple `middle` of size. Without a
// causal mask all pairs are one rectangle.
//
// Rows are counted by position, such that a row and the last key that it sees share theirs.
#pragma once

#include "visibility.h"

namespace qflux {

template <class Index = int64_t>
struct Rectangle {
  Index row_begin, row_end, key_begin, key_end;

  QFLUX_INLINE Index rows() const { return row_end - row_begin; }
  QFLUX_INLINE Index keys() const { return key_end - key_begin; }
  QFLUX_INLINE bool empty() const { return rows() <= 0 || keys() <= 0; }
};

// The first row at or behind a position.
QFLUX_INLINE int64_t row_at(const Visibility& v, int64_t position) {
  const int64_t row = position - v.shift;
  return row < 0 ? 0 : row < v.row_end ? row : v.row_end;
}

// Rectangles of a level of a causal sequence of `keys` keys, where its rows end too.
QFLUX_INLINE int64_t rectangle_count(int64_t keys, int64_t size) {
  return keys > size ? (keys - size + 2 * size - 1) / (2 * size) : 0;
}

template <class Index = int64_t>
QFLUX_INLINE Rectangle<Index> rectangle(const Visibility& v, int64_t size, int64_t index) {
  const int64_t middle = (2 * index + 1) * size;
  return {static_cast<Index>(row_at(v, middle)), static_cast<Index>(row_at(v, middle + size)),
          static_cast<Index>(middle - size),
          static_cast<Index>(middle < v.key_end ? middle : v.key_end)};
}

template <class Index = int64_t>
QFLUX_INLINE Rectangle<Index> whole_rectangle(const Visibility& v) {
  return {0, static_cast<Index>(v.row_end), 0, static_cast<Index>(v.key_end)};
}

// Calls body(size) for the levels of a causal sequence, ascending; `base` is the size of a base
// block, the levels' smallest.
template <class Body>
QFLUX_HOST_INLINE void each_level(int64_t base, int64_t keys, const Body& body) {
  for (int64_t size = base; size < keys; size *= 2) body(size);
}

}  // namespace qflux
