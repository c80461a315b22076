// The owners of a pass and their sums: a vector lane for each owner, and how its sources are met.
#pragma once

#include "../../math/score.h"
#include "../../math/sums.h"
#include "dense.h"
#include "simd.h"

namespace qflux::cpu {
namespace {
namespace dense {

// Two vectors of owners share each broadcast and hide the latency of the sums; more would not fit
// the sixteen registers of AVX2.
constexpr int kVectors = 2;
// Sources whose sums are taken in T from zero: their rounding stays below that of a score, and
// passing them on to the totals costs a few percent. The general path stages a tile's weights too:
// 128 sources x 2 vectors x 64 bytes are 16 KB of L1.
constexpr int64_t kTile = 128;
// Value columns accumulated together.
constexpr int kColumns = 4;

static_assert(kPadding % (kVectors * Vector<float>::kWidth) == 0, "a group may overhang a plane");
static_assert(kBlock % (kVectors * Vector<float>::kWidth) == 0, "a block is made of whole groups");

// One sum of each lane, continued from tile to tile so that the error does not grow with their
// number: in float64 for float, compensated for double.
template <class T>
struct Total;
template <>
struct Total<float> {
  static constexpr int kWidth = Vector<float>::kWidth;
  double value[kWidth] = {};

  void add(Vector<float> part) {
    float lane[kWidth];
    store(lane, part);
    for (int l = 0; l < kWidth; ++l) value[l] += lane[l];
  }
  double precise(int lane) const { return value[lane]; }
  float get(int lane) const { return static_cast<float>(value[lane]); }
};
template <>
struct Total<double> {
  static constexpr int kWidth = Vector<double>::kWidth;
  double value[kWidth] = {}, error[kWidth] = {};

  void add(Vector<double> part) {
    double lane[kWidth];
    store(lane, part);
    for (int l = 0; l < kWidth; ++l) error[l] += add_exactly(value[l], lane[l]);
  }
  double precise(int lane) const { return get(lane); }
  double get(int lane) const { return CompensatedSum<double>{value[lane], error[lane]}.get(); }
};

// What a tile adds to totals. One function for all loops, as each would take the compiler longer to
// vectorize than the loop itself; its arguments are copies, so that the sums stay in registers.
template <class T>
QFLUX_NO_INLINE void add_each(Total<T>* totals, const Vector<T>* parts, int64_t count) {
  for (int64_t n = 0; n < count; ++n) totals[n].add(parts[n]);
}
template <class T, int kCount>
QFLUX_INLINE void add_parts(Total<T> (&totals)[kCount][kVectors],
                            const Vector<T> (&parts)[kCount][kVectors]) {
  add_each(totals[0], parts[0], kCount * kVectors);
}

// The owners of one pass: vectors of consecutive ones, and the sources that each vector meets.
template <class T>
struct Group {
  static constexpr int kWidth = Vector<T>::kWidth;
  static constexpr int kOwners = kVectors * kWidth;

  int64_t first, last;  // owners first .. last - 1; lanes from last on are padding
  int64_t begin[kVectors], end[kVectors];
  int64_t common_begin, common_end;  // met by every owner
  int64_t shift;                     // keys - rows
  // Of the sources that every owner meets, those that one of them may keep, and where in this list
  // each tile begins. Null: all.
  const int64_t *list, *tiles;

  int64_t start(int r) const { return first + r * kWidth; }
  int64_t lowest() const { return lesser(begin[0], common_begin); }
  int64_t highest() const { return greater(end[0], end[kVectors - 1]); }
};

template <class T>
Group<T> row_group(const Sequence<T>& s, int64_t row, int64_t last) {
  Group<T> group{};
  group.first = row;
  group.last = lesser(row + Group<T>::kOwners, last);
  group.shift = s.visibility.shift;
  group.common_end = s.visibility.visible_keys(row);
  for (int r = 0; r < kVectors; ++r)
    group.end[r] =
        group.start(r) < group.last
            ? s.visibility.visible_keys(lesser(group.start(r) + Group<T>::kWidth, group.last) - 1)
            : group.common_end;
  return group;
}

template <class T>
Group<T> key_group(const Sequence<T>& s, int64_t key, int64_t last) {
  Group<T> group{};
  const int64_t row_end = s.visibility.row_end;
  group.first = key;
  group.last = lesser(key + Group<T>::kOwners, last);
  group.shift = s.visibility.shift;
  group.common_begin = lesser(s.visibility.first_row(group.last - 1), row_end);
  group.common_end = row_end;
  for (int r = 0; r < kVectors; ++r) {
    group.begin[r] = group.start(r) < group.last
                         ? lesser(s.visibility.first_row(group.start(r)), group.common_begin)
                         : group.common_begin;
    group.end[r] = row_end;
  }
  return group;
}

// Calls body(r) for each vector of a group.
template <class Body>
QFLUX_INLINE void each_vector(const Body& body) {
  body(Constant<0>());
  body(Constant<1>());
  static_assert(kVectors == 2, "one call for each vector");
}

// Calls body(r, j, visible) for the keys j of a tile that vector r of rows meets: first those that
// every owner sees, then the edge of the causal triangle, where `visible` tells the lanes.
// With kApart one vector after the other: it needs fewer registers at a time. With kListed only the
// keys of the group's list.
template <bool kApart = false, bool kListed = false, class T, class Body>
QFLUX_INLINE void each_key(const Group<T>& group, int64_t tile, int64_t tile_end,
                           const Body& body) {
  const int64_t* at = kListed ? group.tiles + tile / kTile : nullptr;
  const int64_t main_begin = kListed ? at[0] : tile;
  const int64_t main_end = kListed ? at[1] : lesser(tile_end, group.common_end);
  const auto key = [&](int64_t n) QFLUX_INLINE_LAMBDA { return kListed ? group.list[n] : n; };
  if constexpr (kApart) {
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      for (int64_t n = main_begin; n < main_end; ++n) body(r, key(n), nullptr);
    });
  } else {
    for (int64_t n = main_begin; n < main_end; ++n)
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { body(r, key(n), nullptr); });
  }
  each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
    const int64_t end = lesser(tile_end, group.end[r]);
    for (int64_t j = greater(tile, group.common_end); j < end; ++j) {
      const Mask<T> visible = lanes_between<T>(j - group.shift - group.start(r), Group<T>::kWidth);
      body(r, j, &visible);
    }
  });
}

// The same for the rows i that vector r of keys meets: first the edge, then the rest.
template <bool kApart = false, class T, class Body>
QFLUX_INLINE void each_row(const Group<T>& group, int64_t tile, int64_t tile_end,
                           const Body& body) {
  each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
    const int64_t end = lesser(tile_end, group.common_begin);
    for (int64_t i = greater(tile, group.begin[r]); i < end; ++i) {
      const Mask<T> visible = lanes_between<T>(0, i + group.shift - group.start(r) + 1);
      body(r, i, &visible);
    }
  });
  const int64_t main_begin = greater(tile, group.common_begin);
  const int64_t main_end = lesser(tile_end, group.common_end);
  if constexpr (kApart) {
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      for (int64_t i = main_begin; i < main_end; ++i) body(r, i, nullptr);
    });
  } else {
    for (int64_t i = main_begin; i < main_end; ++i)
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { body(r, i, nullptr); });
  }
}

// Those as values, for loops over columns that know neither the score nor the pass.
template <class T>
struct EachKey {
  const Group<T>& group;
  int64_t tile;
  template <class Body>
  QFLUX_INLINE void operator()(const Body& body) const {
    each_key(group, tile, tile + kTile, body);
  }
};
template <class T>
struct EachRow {
  const Group<T>& group;
  int64_t tile;
  template <class Body>
  QFLUX_INLINE void operator()(const Body& body) const {
    each_row(group, tile, tile + kTile, body);
  }
};

// acc + w * x on the visible lanes: what a lane may not see must not reach it even as 0 * NaN.
template <class T>
QFLUX_INLINE Vector<T> add_visible(const Mask<T>* visible, Vector<T> w, Vector<T> x,
                                   Vector<T> acc) {
  const Vector<T> sum = multiply_add(w, x, acc);
  return visible ? select(*visible, sum, acc) : sum;
}

// acc + w * x on the kept lanes.
template <class T>
QFLUX_INLINE Vector<T> add_kept(const Mask<T>* visible, Mask<T> kept, Vector<T> w, Vector<T> x,
                                Vector<T> acc) {
  return visible ? select(kept, multiply_add(w, x, acc), acc) : multiply_add_where(kept, w, x, acc);
}

template <class T>
QFLUX_INLINE Mask<T> kept_and_visible(Mask<T> kept, const Mask<T>* visible) {
  return visible ? both(kept, *visible) : kept;
}

template <class T>
void add_counts(const typename Vector<T>::Bits& counter, int32_t* counts) {
  for (int l = 0; l < Vector<T>::kWidth; ++l) counts[l] += static_cast<int32_t>(counter[l]);
}

// Writes sum `which` of the owners in `group` to out[owner - first of the block][which].
template <class T>
void take(const Group<T>& group, int64_t block_first, const Total<T>* totals, int64_t which,
          int64_t width, T* out) {
  for (int64_t i = group.first; i < group.last; ++i) {
    const int64_t n = i - group.first;
    out[(i - block_first) * width + which] =
        totals[n / Group<T>::kWidth].get(static_cast<int>(n % Group<T>::kWidth));
  }
}

template <class T>
void take_degrees(const Group<T>& group, int64_t block_first, const int32_t* counts, int32_t* out) {
  for (int64_t i = group.first; i < group.last; ++i) out[i - block_first] = counts[i - group.first];
}

// d w / d limit = -1 for every pair kept.
template <class T>
void take_limit(const Group<T>& group, int64_t block_first, const Total<T>* totals, T* out) {
  take(group, block_first, totals, 0, 1, out);
  for (int64_t i = group.first; i < group.last; ++i) out[i - block_first] = -out[i - block_first];
}

}  // namespace dense
}  // namespace
}  // namespace qflux::cpu
