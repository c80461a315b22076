// Decoding meets few rows with many keys: a key in each lane, and of an index a node in each.
#pragma once

#include "../../math/score.h"
#include "decode.h"
#include "tree-build-inl.h"
#include "tree-pairs-inl.h"

namespace qflux::cpu {
namespace {
namespace decode {

using tree::larger;
using tree::largest_lane;
using tree::mask_of;
using tree::total;
using tree::total_count;

// Vectors of keys whose sums are taken in T from zero.
constexpr int64_t kTile = 128;
// Leaves whose sums are taken in T from zero.
constexpr int64_t kListed = 64;
// Columns that are summed together.
constexpr int kColumns = 4;

static_assert(kIndexFan % Vector<float>::kWidth == 0, "whole vectors of children");
static_assert(kLeaf % Vector<float>::kWidth == 0, "whole vectors of keys");

template <class T>
void set_box(const IndexView<T>& index, int64_t node, const Box<T>& box) {
  const T of[6] = {box.x, box.y, box.ax, box.ay, box.bx, box.by};
  for (int n = 0; n < 6; ++n) index.box(node)[n * kIndexFan] = of[n];
}

template <class T>
void build_leaves(const IndexView<T>& index, int64_t count, int64_t first, int64_t last,
                  bool exact_points) {
  for (int64_t leaf = first; leaf < last; ++leaf) {
    const int64_t size = lesser(kLeaf, count - leaf * kLeaf);
    const T* const keys = index.leaf(leaf);
    double x[kLeaf] = {}, y[kLeaf] = {}, v[kLeaf] = {};
    for (int64_t k = 0; k < size; ++k) {
      x[k] = keys[k];
      y[k] = keys[kLeaf + k];
    }
    set_box(index, leaf, tree::box_around<T>(x, y, size, exact_points));
    double* to = index.moments + leaf * index.width;
    for (int64_t c = -1; c < index.value_dim; ++c, to += kColumnMoments) {
      for (int64_t k = 0; k < size; ++k) v[k] = c < 0 ? 1.0 : double(keys[(2 + c) * kLeaf + k]);
      tree::column_moments(x, y, v, to);
    }
    for (double* end = index.moments + (leaf + 1) * index.width; to < end; ++to) *to = 0;
  }
}

template <class T>
void build_nodes(const IndexView<T>& index, int height, bool exact_points) {
  for (int32_t n = 0; n < index.size[height]; ++n) {
    const int32_t node = index.first[height] + n;
    const int32_t begin = index.first[height - 1] + n * kIndexFan;
    const int32_t all = index.first[height - 1] + index.size[height - 1];
    const int32_t end = begin + kIndexFan < all ? begin + kIndexFan : all;
    // The corners of boxes that are wide enough; what their rounding here loses is in the slack.
    double x[4 * kIndexFan], y[4 * kIndexFan];
    int64_t corners = 0;
    double* const to = index.moments + node * index.width;
    for (int64_t m = 0; m < index.width; ++m) to[m] = 0;
    for (int32_t child = begin; child < end; ++child) {
      double box[6];
      for (int k = 0; k < 6; ++k) box[k] = index.box(child)[k * kIndexFan];
      for (int corner = 0; corner < 4; ++corner) {
        const double a = corner & 1 ? 1.0 : -1.0, b = corner & 2 ? 1.0 : -1.0;
        x[corners] = box[0] + a * box[2] + b * box[4];
        y[corners++] = box[1] + a * box[3] + b * box[5];
      }
      const double* const from = index.moments + child * index.width;
      for (int64_t m = 0; m < index.width; ++m) to[m] += from[m];
    }
    set_box(index, node, tree::box_around<T>(x, y, corners, exact_points));
  }
}

// What a walk has seen of a tree: it looks at the blocks of children begin .. end - 1 next, whose
// places among those of their height are in Cut::blocks.
struct Walk {
  int32_t height;
  int64_t begin, end;
};

template <class T>
QFLUX_INLINE Vector<T> cut_height(const IndexView<T>& index, const Query<T>& query, Vector<T> most,
                                  Walk* walk, Cut<T>* out) {
  using V = Vector<T>;
  const V qx(query.x), qy(query.y), low(query.low), high(query.high);
  T lows[kIndexFan], highs[kIndexFan];
  const int32_t height = walk->height;
  int32_t* const blocks = out->blocks;
  int64_t nodes = out->node_count, leaves = out->leaf_count, next = walk->end;
  for (int64_t block = walk->begin; block < walk->end; ++block) {
    const int32_t place = blocks[block] * kIndexFan, node = index.first[height] + place;
    const int32_t count = index.size[height] - place;
    const uint32_t all = count >= kIndexFan ? 0xffffu : (1u << count) - 1u;
    uint32_t above = 0, below = 0;
    for (int r = 0; r < kIndexFan; r += V::kWidth) {
      const T* const from = index.box(node) + r;
      const Box<V> wide{load(from),
                        load(from + kIndexFan),
                        load(from + 2 * kIndexFan),
                        load(from + 3 * kIndexFan),
                        load(from + 4 * kIndexFan),
                        load(from + 5 * kIndexFan)};
      const Reach<V> span = reach(wide, qx, qy);
      const uint32_t whole = lane_bits(less(high, span.low)) & (all >> r);
      most = select(mask_of<T>(whole), larger(span.high, most), most);
      above |= whole << r;
      below |= lane_bits(less(span.high, low)) << r;
      store(lows + r, span.low);
      store(highs + r, span.high);
    }
    for (uint32_t left = above; left; left &= left - 1) {
      const int32_t at = node + __builtin_ctz(left);
      prefetch(index.moments + at * index.width, index.width);
      out->nodes[nodes++] = at;
    }
    for (uint32_t left = all & ~(above | below); left; left &= left - 1) {
      const int l = __builtin_ctz(left);
      if (height == 0) {
        prefetch(index.leaf(place + l), 2 * kLeaf);
        out->leaves[leaves] = place + l;
        out->low[leaves] = lows[l];
        out->high[leaves++] = highs[l];
      } else {
        prefetch(index.box(index.first[height - 1] + (place + l) * kIndexFan), 6 * kIndexFan);
        blocks[next++] = place + l;
      }
    }
  }
  out->node_count = nodes;
  out->leaf_count = leaves;
  *walk = {height - 1, walk->end, next};
  return most;
}

// A height of each tree after the other, so that what is fetched meanwhile is there when its turn
// comes.
template <class T>
void cut(const IndexView<T>* indices, int64_t count, const Query<T>& query, Cut<T>* cuts, T* top) {
  using V = Vector<T>;
  V most(*top);
  Walk walks[kMostTrees];
  for (int64_t n = 0; n < count; ++n) {
    prefetch(indices[n].box(indices[n].first[indices[n].height]), 6 * kIndexFan);
    walks[n] = {indices[n].height, 0, 1};
    cuts[n].blocks[0] = 0;
    cuts[n].node_count = cuts[n].leaf_count = 0;
  }
  for (bool more = count > 0; more;) {
    more = false;
    for (int64_t n = 0; n < count; ++n) {
      if (walks[n].begin == walks[n].end) continue;
      most = cut_height(indices[n], query, most, &walks[n], &cuts[n]);
      more = more || walks[n].begin < walks[n].end;
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    double sums[kColumnMoments] = {};
    for (int64_t i = 0; i < cuts[n].node_count; ++i)
      for (int m = 0; m < kColumnMoments; ++m)
        sums[m] += indices[n].moments[cuts[n].nodes[i] * indices[n].width + m];
    for (int m = 0; m < kColumnMoments; ++m) cuts[n].sums[m] = sums[m];
  }
  *top = largest_lane(most);
}

// What a row keeps of vectors of keys; with `kPoints` the sum of the keys too.
template <class T, bool kPoints = false>
class Kept {
  using V = Vector<T>;

 public:
  QFLUX_INLINE explicit Kept(const Query<T>& query)
      : x_(query.x),
        y_(query.y),
        bias_(query.bias),
        compare_(query.compare),
        shift_(query.shift),
        rest_(query.rest) {}

  // The weight of pairs of this product; that of NaN is zero.
  QFLUX_INLINE V add(V p) { return add(p, less(compare_, p)); }
  QFLUX_INLINE V add_keys(V kx, V ky) {
    const V p = inner_product(x_, y_, kx, ky, bias_);
    const Mask<T> kept = less(compare_, p);
    if constexpr (kPoints) {
      kx_ = kx_ + where(kept, kx);
      ky_ = ky_ + where(kept, ky);
    }
    return add(p, kept);
  }
  QFLUX_INLINE void take(Mass<T>* out) {
    out->excess += total(sum_);
    out->count += total_count<T>(counter_);
    sum_ = V(T(0));
    counter_ = typename V::Bits{};
  }
  QFLUX_INLINE void take_points(KeptMass<T>* out) {
    take(out);
    out->x += total(kx_);
    out->y += total(ky_);
    kx_ = ky_ = V(T(0));
  }

 private:
  QFLUX_INLINE V add(V p, Mask<T> kept) {
    const V w = where(kept, (p - shift_) - rest_);
    sum_ = sum_ + w;
    count(kept, counter_);
    return w;
  }

  const V x_, y_, bias_, compare_, shift_, rest_;
  V sum_ = V(T(0)), kx_ = V(T(0)), ky_ = V(T(0));
  typename V::Bits counter_ = typename V::Bits{};
};

// Numbers from `from` on, `valid` of them, and `behind` in the other lanes.
template <class T>
QFLUX_INLINE Vector<T> load_some(const T* from, int64_t valid, T behind) {
  T lane[Vector<T>::kWidth];
  for (int l = 0; l < Vector<T>::kWidth; ++l) lane[l] = l < valid ? from[l] : behind;
  return load(lane);
}

// Calls body(begin, whole, rest) for parts of a run: so many whole vectors, and then so many keys.
template <class T, class Body>
QFLUX_INLINE void each_part(int64_t count, const Body& body) {
  constexpr int64_t kPart = kTile * Vector<T>::kWidth;
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t size = lesser(kPart, count - begin), whole = size / Vector<T>::kWidth;
    body(begin, whole, size - whole * Vector<T>::kWidth);
  }
}

template <class T>
QFLUX_INLINE void add_top(Vector<T> top, Mass<T>* out) {
  const T largest = largest_lane(top);
  out->top = largest > out->top ? largest : out->top;
}

template <class T>
Tangent<T> highest_tangent(const T* tangents, Point<T> query) {
  using V = Vector<T>;
  static_assert(kTangents % V::kWidth == 0, "whole vectors of tangents");
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const V qx(query.x), qy(query.y);
  V highest(-kInfinity), inverse(T(0));
  for (int n = 0; n < kTangents; n += V::kWidth) {
    const T* const at = tangents + n;
    const V of = load(at + 2 * kTangents);
    const V p = multiply_add(qx, load(at), multiply_add(qy, load(at + kTangents), V(T(0)) - of));
    const Mask<T> higher = both(less(highest, p), less(V(T(0)), of));
    highest = select(higher, p, highest);
    inverse = select(higher, of, inverse);
  }
  T lane[V::kWidth], lane_inverse[V::kWidth];
  store(lane, highest);
  store(lane_inverse, inverse);
  Tangent<T> best{-kInfinity, T(0)};
  for (int l = 0; l < V::kWidth; ++l)
    if (lane[l] > best.threshold) best = {lane[l], lane_inverse[l]};
  return best;
}

template <class T>
void run_spread(const KeyPlanes<T>& keys, int64_t count, Point<T> query, Spread<T>* out) {
  using V = Vector<T>;
  const V qx(query.x), qy(query.y);
  V top(out->top);
  double sum = 0, squares = 0;
  each_part<T>(count, [&](int64_t begin, int64_t whole, int64_t rest) QFLUX_INLINE_LAMBDA {
    const T *x = keys.x + begin, *y = keys.y + begin;
    V first(T(0)), second(T(0));
    for (int64_t n = 0; n < whole; ++n, x += V::kWidth, y += V::kWidth) {
      const V p = inner_product(qx, qy, load(x), load(y), V(T(0)));
      top = larger(p, top);
      first = first + p;
      second = multiply_add(p, p, second);
    }
    sum += total(first);
    squares += total(second);
    for (int64_t n = 0; n < rest; ++n) {
      const T p = query.x * x[n] + query.y * y[n];
      top = larger(V(p), top);
      sum += p;
      squares += double(p) * p;
    }
  });
  Mass<T> most{0, 0, out->top};
  add_top(top, &most);
  out->top = most.top;
  const double size = static_cast<double>(count), mean = sum / size;
  out->mean = mean;
  out->deviation = square_root(squares / size > mean * mean ? squares / size - mean * mean : 0.0);
}

// With `kFirst` the mass too, as here in all that goes by columns.
template <class T, int kCount, bool kFirst>
void run_columns(const KeyPlanes<T>& keys, int64_t count, const Query<T>& query, const T* values,
                 KeptMass<T>* out, double* context) {
  using V = Vector<T>;
  Kept<T, kFirst> kept(query);
  each_part<T>(count, [&](int64_t begin, int64_t whole, int64_t rest) QFLUX_INLINE_LAMBDA {
    V sums[kCount];
    for (int c = 0; c < kCount; ++c) sums[c] = V(T(0));
    const T *x = keys.x + begin, *y = keys.y + begin, *v = values + begin;
    for (int64_t n = 0; n < whole; ++n, x += V::kWidth, y += V::kWidth, v += V::kWidth) {
      const V w = kept.add_keys(load(x), load(y));
      for (int c = 0; c < kCount; ++c)
        sums[c] = multiply_add(w, load(v + c * keys.stride), sums[c]);
    }
    if (rest) {
      const V w = kept.add_keys(load_some(x, rest, T(NAN)), load_some(y, rest, T(NAN)));
      for (int c = 0; c < kCount; ++c)
        sums[c] = multiply_add(w, load_some(v + c * keys.stride, rest, T(0)), sums[c]);
    }
    if constexpr (kFirst) kept.take_points(out);
    for (int c = 0; c < kCount; ++c) context[c] += total(sums[c]);
  });
}

// Calls body(columns, c) for columns c .. c + columns - 1 of so many, the number as a type.
template <class Body>
QFLUX_INLINE void each_columns(int64_t value_dim, const Body& body) {
  int64_t c = 0;
  for (; c + kColumns <= value_dim; c += kColumns) body(Constant<kColumns>(), c);
  for (; c + 2 <= value_dim; c += 2) body(Constant<2>(), c);
  if (c < value_dim) body(Constant<1>(), c);
}

template <class T>
void run_context(const KeyPlanes<T>& keys, int64_t count, const Query<T>& query, KeptMass<T>* out,
                 double* context) {
  each_columns(keys.value_dim, [&](auto columns, int64_t c) QFLUX_INLINE_LAMBDA {
    constexpr int kCount = decltype(columns)::kValue;
    const auto call = c == 0 ? run_columns<T, kCount, true> : run_columns<T, kCount, false>;
    call(keys, count, query, keys.values + c * keys.stride, out, context + c);
  });
}

template <class T, int kCount>
void gate_columns(const KeyPlanes<T>& keys, int64_t size, Point<T> query,
                  const InverseGate<Vector<T>>& pair, const T* values, Mass<T>* out,
                  double* context) {
  using V = Vector<T>;
  const V qx(query.x), qy(query.y), bias = pair.bias();
  each_part<T>(size, [&](int64_t begin, int64_t whole, int64_t rest) QFLUX_INLINE_LAMBDA {
    V sums[kCount], strength(T(0));
    typename V::Bits counter{};
    for (int c = 0; c < kCount; ++c) sums[c] = V(T(0));
    const T *x = keys.x + begin, *y = keys.y + begin, *v = values + begin;
    for (int64_t n = 0; n < whole; ++n, x += V::kWidth, y += V::kWidth, v += V::kWidth) {
      const V p = inner_product(qx, qy, load(x), load(y), bias);
      const Mask<T> kept = pair.kept(p);
      const V w = pair.weight(p, kept);
      strength = strength + w;
      count(kept, counter);
      for (int c = 0; c < kCount; ++c)
        sums[c] = multiply_add(w, load(v + c * keys.stride), sums[c]);
    }
    if (rest) {
      const Mask<T> there = lanes_between<T>(0, rest);
      const V p = inner_product(qx, qy, load_some(x, rest, T(0)), load_some(y, rest, T(0)), bias);
      const Mask<T> kept = both(pair.kept(p), there);
      // Without a key p is zero, of which a gate may be infinite.
      const V w = where(there, pair.weight(p, kept));
      strength = strength + w;
      count(kept, counter);
      for (int c = 0; c < kCount; ++c)
        sums[c] = multiply_add(w, load_some(v + c * keys.stride, rest, T(0)), sums[c]);
    }
    if (out) {
      out->excess += total(strength);
      out->count += total_count<T>(counter);
    }
    for (int c = 0; c < kCount; ++c) context[c] += total(sums[c]);
  });
}

template <class T>
void run_gate(const KeyPlanes<T>& keys, int64_t count, Point<T> query, T eps, T min_gate,
              Mass<T>* out, double* context) {
  using V = Vector<T>;
  const InverseGate<V> pair = InverseGate<V>::make(V(T(0)), V(eps), V(min_gate));
  each_columns(keys.value_dim, [&](auto columns, int64_t c) QFLUX_INLINE_LAMBDA {
    gate_columns<T, decltype(columns)::kValue>(keys, count, query, pair,
                                               keys.values + c * keys.stride,
                                               c == 0 ? out : nullptr, context + c);
  });
}

template <class T, int kCount, bool kFirst>
void leaf_columns(const IndexView<T>& index, const int32_t* leaves, int64_t count,
                  const Query<T>& query, int64_t column, KeptMass<T>* out, double* context) {
  using V = Vector<T>;
  Kept<T, kFirst> kept(query);
  V sums[kCount];
  for (int c = 0; c < kCount; ++c) sums[c] = V(T(0));
  for (int64_t n = 0; n < count; ++n) {
    const T* const keys = index.leaf(leaves[n]);
    const T* const values = keys + (2 + column) * kLeaf;
    for (int64_t k = 0; k < kLeaf; k += V::kWidth) {
      const V w = kept.add_keys(load(keys + k), load(keys + kLeaf + k));
      for (int c = 0; c < kCount; ++c)
        sums[c] = multiply_add(w, load(values + c * kLeaf + k), sums[c]);
    }
  }
  if constexpr (kFirst) kept.take_points(out);
  for (int c = 0; c < kCount; ++c) context[c] += total(sums[c]);
}

// The leaves of a cut that a row keeps whole, from the front of Cut::blocks, and behind them those
// that it crosses.
struct Listed {
  int64_t whole, crossed;
};

template <class T>
QFLUX_INLINE Listed list_leaves(const IndexView<T>& index, const Query<T>& query,
                                const Cut<T>& cut) {
  int32_t* const whole = cut.blocks;
  int32_t* const last = cut.blocks + cut.leaf_count;
  int64_t wholes = 0, crosses = 0;
  for (int64_t n = 0; n < cut.leaf_count; ++n) {
    const int32_t leaf = cut.leaves[n];
    if (cut.low[n] > query.high) {
      prefetch(index.moments + leaf * index.width, index.width);
      whole[wholes++] = leaf;
    } else if (!(cut.high[n] < query.low)) {
      prefetch(index.leaf(leaf), lesser(2 + index.value_dim, 8) * kLeaf);
      last[-++crosses] = leaf;
    }
  }
  return {wholes, crosses};
}

template <class T>
QFLUX_INLINE void gather_listed(const IndexView<T>& index, const Query<T>& query, const Cut<T>& cut,
                                Listed listed, KeptMass<T>* out, double* context) {
  using D = Vector<double>;
  constexpr int64_t kFew = 64;
  double few[kFew];
  const Array<double> many(index.width > kFew ? index.width : 0);
  double* const moments = index.width > kFew ? many.get() : few;
  for (int64_t m = 0; m < index.width; ++m) moments[m] = 0;
  const auto add = [&](const int32_t* list, int64_t count) QFLUX_INLINE_LAMBDA {
    for (int64_t m = 0; m < index.width; m += D::kWidth) {
      D sum = load(moments + m);
      for (int64_t n = 0; n < count; ++n)
        sum = sum + load(index.moments + list[n] * index.width + m);
      store(moments + m, sum);
    }
  };
  add(cut.nodes, cut.node_count);
  add(cut.blocks, listed.whole);
  const int32_t* const crossed = cut.blocks + cut.leaf_count - listed.crossed;
  for (int64_t n = 0; n < listed.crossed; n += kListed)
    each_columns(index.value_dim, [&](auto columns, int64_t c) QFLUX_INLINE_LAMBDA {
      constexpr int kCount = decltype(columns)::kValue;
      const auto call = c == 0 ? leaf_columns<T, kCount, true> : leaf_columns<T, kCount, false>;
      call(index, crossed + n, lesser(kListed, listed.crossed - n), query, c, out, context + c);
    });
  const double offset = query.offset();
  out->excess += weighed(moments, query.x, query.y, offset);
  out->count += moments[0];
  out->x += moments[1];
  out->y += moments[2];
  for (int64_t c = 0; c < index.value_dim; ++c)
    context[c] += weighed(moments + (c + 1) * kColumnMoments, query.x, query.y, offset);
}

template <class T>
void cut_context(const IndexView<T>* indices, int64_t count, const Cut<T>* cuts,
                 const Query<T>& query, KeptMass<T>* out, double* context) {
  Listed listed[kMostTrees];
  for (int64_t n = 0; n < count; ++n) listed[n] = list_leaves(indices[n], query, cuts[n]);
  for (int64_t n = 0; n < count; ++n)
    gather_listed(indices[n], query, cuts[n], listed[n], out, context);
}

// The lanes of a mask, one behind the other; a whole vector is written. Returns their number.
template <class T>
QFLUX_INLINE int64_t store_lanes(Mask<T> mask, Vector<T> v, T* to) {
  const uint32_t bits = lane_bits(mask);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)v.raw));
  else
    _mm512_storeu_pd(to, _mm512_maskz_compress_pd(static_cast<__mmask8>(bits), (__m512d)v.raw));
  return __builtin_popcount(bits);
#else
  if (!bits) return 0;
  T lane[Vector<T>::kWidth];
  store(lane, v);
  int64_t count = 0;
  for (int l = 0; l < Vector<T>::kWidth; ++l) {
    to[count] = lane[l];
    count += (bits >> l) & 1;
  }
  return count;
#endif
}

// Pairs on their way into a band.
template <class T>
class Sorted {
  using V = Vector<T>;

 public:
  QFLUX_INLINE Sorted(Point<T> query, PairBand<T>* band)
      : x_(query.x),
        y_(query.y),
        low_(band->low),
        high_(band->high),
        top_(band->above.top),
        band_(band),
        to_(band->products + band->count) {}

  QFLUX_INLINE void add(V kx, V ky) {
    const V p = inner_product(x_, y_, kx, ky, V(T(0)));
    const Mask<T> above = less(high_, p);
    top_ = larger(p, top_);
    sum_ = sum_ + where(above, p - high_);
    count(above, counter_);
    to_ += store_lanes(both(less(low_, p), not_less(high_, p)), p, to_);
  }
  QFLUX_INLINE void take() {
    band_->above.excess += total(sum_);
    band_->above.count += total_count<T>(counter_);
    sum_ = V(T(0));
    counter_ = typename V::Bits{};
  }
  QFLUX_INLINE ~Sorted() {
    take();
    add_top(top_, &band_->above);
    band_->count = to_ - band_->products;
    store(to_, V(T(NAN)));
  }

 private:
  const V x_, y_, low_, high_;
  V top_, sum_ = V(T(0));
  typename V::Bits counter_ = typename V::Bits{};
  PairBand<T>* const band_;
  T* to_;
};

template <class T>
void cut_band(const IndexView<T>& index, const Cut<T>& cut, Point<T> query, PairBand<T>* band) {
  Sorted<T> sorted(query, band);
  for (int64_t n = 0; n < cut.leaf_count; ++n) {
    const T* const keys = index.leaf(cut.leaves[n]);
    for (int64_t k = 0; k < kLeaf; k += Vector<T>::kWidth)
      sorted.add(load(keys + k), load(keys + kLeaf + k));
    if (n % kListed == kListed - 1) sorted.take();
  }
}

template <class T>
void run_band(const KeyPlanes<T>& keys, int64_t count, Point<T> query, PairBand<T>* band) {
  using V = Vector<T>;
  Sorted<T> sorted(query, band);
  each_part<T>(count, [&](int64_t begin, int64_t whole, int64_t rest) QFLUX_INLINE_LAMBDA {
    const T *x = keys.x + begin, *y = keys.y + begin;
    for (int64_t n = 0; n < whole; ++n, x += V::kWidth, y += V::kWidth)
      sorted.add(load(x), load(y));
    if (rest) sorted.add(load_some(x, rest, T(NAN)), load_some(y, rest, T(NAN)));
    sorted.take();
  });
}

template <class T>
void band_mass(const PairBand<T>& band, const Query<T>& query, Mass<T>* out) {
  Kept<T> kept(query);
  constexpr int64_t kPart = kTile * Vector<T>::kWidth;
  for (int64_t begin = 0; begin < band.count; begin += kPart) {
    const int64_t end = lesser(begin + kPart, band.count);
    for (int64_t n = begin; n < end; n += Vector<T>::kWidth) kept.add(load(band.products + n));
    kept.take(out);
  }
}

template <class T>
constexpr DecodeLoops<T> kLoops = {build_leaves<T>,    build_nodes<T>, cut<T>,      cut_context<T>,
                                   run_context<T>,     cut_band<T>,    run_band<T>, band_mass<T>,
                                   highest_tangent<T>, run_spread<T>,  run_gate<T>};

}  // namespace decode
}  // namespace
}  // namespace qflux::cpu
