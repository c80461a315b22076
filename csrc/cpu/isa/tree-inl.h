// The hot loops of a tree. A group of rows walks it together, a row in each lane: a node that a row
// keeps whole goes into its sums, and leaves that its boundary crosses are listed and met pair by
// pair, a key in each lane.
#pragma once

#include "tree-build-inl.h"
#include "tree-pairs-inl.h"

namespace qflux::cpu {
namespace {
namespace tree {

// Leaves or nodes that are listed before rows meet them; also how many sums of a leaf are added up
// in T.
constexpr int kListed = 64;

// Nodes that row l met, of `count` with a bit for each of their rows; how many. Behind the last
// there is room for kAtOnce nodes, which have no rows.
constexpr int kAtOnce = 16;
QFLUX_INLINE int nodes_of(const int32_t* nodes, const uint32_t* rows, int count, int l,
                          int32_t* out) {
  int found = 0;
#if defined(__AVX512F__)
  const __m512i bit = _mm512_set1_epi32(int(1u << l));
  for (int n = 0; n < count; n += kAtOnce) {
    const __mmask16 there = _mm512_test_epi32_mask(_mm512_loadu_si512(rows + n), bit);
    _mm512_storeu_si512(out + found,
                        _mm512_maskz_compress_epi32(there, _mm512_loadu_si512(nodes + n)));
    found += __builtin_popcount(there);
  }
#else
  for (int n = 0; n < count; ++n) {
    out[found] = nodes[n];
    found += rows[n] >> l & 1;
  }
#endif
  return found;
}

// A group of rows in lanes; those without a row keep nothing.
template <class T>
struct Lanes {
  using V = Vector<T>;
  static constexpr int kVectors = kGroup / V::kWidth;

  V x[kVectors], y[kVectors], tau[kVectors];
  uint32_t all;

  explicit Lanes(const TreeRows<T>& rows) : all(rows.count == 32 ? ~0u : (1u << rows.count) - 1u) {
    T numbers[3][kGroup];
    for (int l = 0; l < kGroup; ++l)
      for (int n = 0; n < 3; ++n)
        numbers[n][l] = l < rows.count ? rows.at(l)[n] : n == 2 ? T(INFINITY) : T(0);
    for (int r = 0; r < kVectors; ++r) {
      x[r] = load(numbers[0] + r * V::kWidth);
      y[r] = load(numbers[1] + r * V::kWidth);
      tau[r] = load(numbers[2] + r * V::kWidth);
    }
  }
};

// Nodes that some rows of a group met, with a bit for each of these rows.
struct Hits {
  int32_t node[kListed + kAtOnce];
  uint32_t rows[kListed + kAtOnce];
  int size = 0;

  QFLUX_INLINE void add(int32_t at, uint32_t of) {
    node[size] = at;
    rows[size] = of;
    size += of != 0;
  }
};

// Takes all nodes under roots first .. last - 1: those of which a row keeps all, but not all of
// their parent, to inside(hits), those leaves that its boundary crosses to crossed(hits), at most
// kListed at a time; and to above(rows, high) the upper ends of the reach of each of the former.
// What becomes of a node hardly repeats, so nothing here branches on it.
template <class T, class Above, class Inside, class Crossed>
QFLUX_INLINE void walk(const TreeView<T>& tree, const Lanes<T>& lanes, int height, int32_t first,
                       int32_t last, const Above& above, const Inside& inside,
                       const Crossed& crossed) {
  using V = Vector<T>;
  struct Entry {
    int32_t node;
    int16_t height;
    uint32_t rows;
  };
  Entry stack[kHeights * kFan];
  int size = 0;
  Hits whole, leaves;
  // Nodes begin .. end - 1, at most kFan, of a height.
  const auto meet = [&](int32_t begin, int32_t end, int of_height,
                        uint32_t rows) QFLUX_INLINE_LAMBDA {
    const bool leaf = of_height == 0;
    for (int32_t node = begin + kFan; node-- > begin;) {
      const uint32_t asked = node < end ? rows : 0;
      const Box<T>& box = tree.boxes[node];
      const Box<V> wide{V(box.x), V(box.y), V(box.ax), V(box.ay), V(box.bx), V(box.by)};
      uint32_t kept = 0, dropped = 0;
      V high[Lanes<T>::kVectors];
      for (int r = 0; r < Lanes<T>::kVectors; ++r) {
        const Reach<V> span = reach(wide, lanes.x[r], lanes.y[r]);
        high[r] = span.high;
        kept |= lane_bits(less(lanes.tau[r], span.low)) << (r * V::kWidth);
        dropped |= lane_bits(less(span.high, lanes.tau[r])) << (r * V::kWidth);
      }
      kept &= asked;
      const uint32_t rest = asked & ~(kept | dropped);
      above(kept, high);
      whole.add(node, kept);
      leaves.add(node, leaf ? rest : 0);
      stack[size] = {node, static_cast<int16_t>(of_height), rest};
      size += !leaf && rest != 0;
    }
    if (whole.size > kListed - kFan) inside(whole), whole.size = 0;
    if (leaves.size > kListed - kFan) crossed(leaves), leaves.size = 0;
  };
  for (int32_t root = first; root < last; root += kFan) {
    meet(root, last, height, lanes.all);
    while (size > 0) {
      const Entry at = stack[--size];
      meet(tree.child(at.height, at.node), tree.first[at.height], at.height - 1, at.rows);
    }
  }
  if (whole.size) inside(whole);
  if (leaves.size) crossed(leaves);
}

template <class T, class Above, class Inside, class Crossed>
QFLUX_INLINE void walk(const TreeView<T>& tree, const Lanes<T>& lanes, const Above& above,
                       const Inside& inside, const Crossed& crossed) {
  walk(tree, lanes, tree.height, tree.first[tree.height], tree.first[tree.height + 1], above,
       inside, crossed);
}

template <class Body>
QFLUX_INLINE void each_row_of(uint32_t rows, const Body& body) {
  for (; rows; rows &= rows - 1) body(__builtin_ctz(rows));
}

// Calls body(row, nodes, count) for each row of a group that met any of these nodes.
template <class Body>
QFLUX_INLINE void each_row_of(Hits& hits, const Body& body) {
  uint32_t any = 0;
  for (int n = 0; n < hits.size; ++n) any |= hits.rows[n];
  for (int n = 0; n < kAtOnce; ++n) hits.rows[hits.size + n] = 0;
  each_row_of(any, [&](int l) QFLUX_INLINE_LAMBDA {
    int32_t nodes[kListed + kAtOnce];
    body(l, nodes, nodes_of(hits.node, hits.rows, hits.size, l, nodes));
  });
}

template <class T>
void mass(const TreeView<T>& tree, const TreeRows<T>& rows, Mass<T>* sums, int64_t* pairs) {
  using V = Vector<T>;
  using D = Vector<double>;
  constexpr int kDoubles = kGroup / D::kWidth;
  const Lanes<T> lanes(rows);
  D inner[kColumnMoments][kDoubles];
  V top[Lanes<T>::kVectors];
  for (auto& column : inner)
    for (D& part : column) part = D(0.0);
  for (V& part : top) part = V(T(-INFINITY));
  walk(
      tree, lanes,
      [&](uint32_t kept, const V* high) QFLUX_INLINE_LAMBDA {
        for (int r = 0; r < Lanes<T>::kVectors; ++r)
          top[r] = select(mask_of<T>(kept >> (r * V::kWidth)), larger(high[r], top[r]), top[r]);
      },
      [&](const Hits& whole) QFLUX_INLINE_LAMBDA {
        for (int n = 0; n < whole.size; ++n) {
          const double* mass = tree.masses + 4 * whole.node[n];
          for (int r = 0; r < kDoubles; ++r) {
            const Mask<double> mask = mask_of<double>(whole.rows[n] >> (r * D::kWidth));
            for (int m = 0; m < kColumnMoments; ++m)
              inner[m][r] = add_where(mask, D(mass[m]), inner[m][r]);
          }
        }
      },
      [&](Hits& leaves) QFLUX_INLINE_LAMBDA {
        each_row_of(leaves, [&](int l, const int32_t* list, int count) QFLUX_INLINE_LAMBDA {
          mass_of(tree.keys, {list, count, kLeaf, tree.leaf(1)}, rows.at(l), &sums[l]);
          *pairs += count * kLeaf;
        });
      });
  double moments[kColumnMoments][kGroup];
  T tops[kGroup];
  for (int m = 0; m < kColumnMoments; ++m)
    for (int r = 0; r < kDoubles; ++r) store(moments[m] + r * D::kWidth, inner[m][r]);
  for (int r = 0; r < Lanes<T>::kVectors; ++r) store(tops + r * V::kWidth, top[r]);
  for (int l = 0; l < rows.count; ++l) {
    const T* q = rows.at(l);
    const double own[kColumnMoments] = {moments[0][l], moments[1][l], moments[2][l]};
    sums[l].excess += weighed(own, q[0], q[1], double(q[2]) + q[3]);
    sums[l].count += own[0];
    sums[l].top = tops[l] > sums[l].top ? tops[l] : sums[l].top;
  }
}

// Adds the moments of nodes.
template <class T>
void add_moments(const TreeView<T>& tree, const int32_t* nodes, int64_t count, double* sums) {
  using D = Vector<double>;
  for (int64_t m = 0; m < tree.width; m += D::kWidth) {
    D sum = load(sums + m);
    for (int64_t n = 0; n < count; ++n) sum = sum + load(tree.moments + nodes[n] * tree.width + m);
    store(sums + m, sum);
  }
}

// A walk that adds up, for each row, the moments of what it keeps whole: moments [kGroup][width].
template <class T, class Crossed>
QFLUX_INLINE void walk_for_moments(const TreeView<T>& tree, const TreeRows<T>& rows,
                                   double* moments, const Crossed& crossed) {
  const Lanes<T> lanes(rows);
  walk(
      tree, lanes, [](uint32_t, const Vector<T>*) QFLUX_INLINE_LAMBDA {},
      [&](Hits& whole) QFLUX_INLINE_LAMBDA {
        each_row_of(whole, [&](int l, const int32_t* list, int count) QFLUX_INLINE_LAMBDA {
          add_moments(tree, list, count, moments + l * tree.width);
        });
      },
      [&](Hits& leaves) QFLUX_INLINE_LAMBDA { each_row_of(leaves, crossed); });
}

// Numbers on the stack where they are few.
class Room {
 public:
  explicit Room(int64_t count)
      : many_(count > kFew ? count : 0), numbers_(count > kFew ? many_.get() : few_) {
    if (count <= kFew)
      for (int64_t n = 0; n < count; ++n) few_[n] = 0;
  }
  double* get() const { return numbers_; }

 private:
  static constexpr int64_t kFew = (kGroup + 1) * 16;
  double few_[kFew];
  const Array<double> many_;
  double* const numbers_;
};

template <class T>
void context(const TreeView<T>& tree, const TreeRows<T>& rows, Mass<T>* sums, double* contexts,
             int64_t* pairs) {
  const int64_t value_dim = tree.keys.value_dim;
  const Room moments(kGroup * tree.width);
  walk_for_moments(tree, rows, moments.get(), [&](int l, const int32_t* leaves, int64_t count) {
    context_of(tree.keys, {leaves, count, kLeaf, tree.leaf(1)}, rows.at(l), &sums[l],
               contexts + l * value_dim);
    *pairs += count * kLeaf;
  });
  for (int l = 0; l < rows.count; ++l) {
    const double* column = moments.get() + l * tree.width;
    const T* q = rows.at(l);
    const double x = q[0], y = q[1], tau = double(q[2]) + q[3];
    for (int64_t c = 0; c < value_dim; ++c, column += kColumnMoments)
      contexts[l * value_dim + c] += weighed(column, x, y, tau);
    sums[l].excess += weighed(column, x, y, tau);
    sums[l].count += column[0];
  }
}

template <class T>
void row_gradient(const TreeView<T>& tree, const TreeRows<T>& rows, KeptSums* sums) {
  const int64_t value_dim = tree.keys.value_dim;
  const Room moments(kGroup * tree.width);
  walk_for_moments(tree, rows, moments.get(), [&](int l, const int32_t* leaves, int64_t count) {
    kept_sums_of(tree.keys, {leaves, count, kLeaf, tree.leaf(1)}, rows.at(l), &sums[l]);
  });
  for (int l = 0; l < rows.count; ++l) {
    const double* column = moments.get() + l * tree.width;
    const T* grad = rows.at(l) + kRowNumbers;
    KeptSums& sum = sums[l];
    for (int64_t c = 0; c < value_dim; ++c, column += kColumnMoments) {
      sum.u += grad[c] * column[0];
      sum.ux += grad[c] * column[1];
      sum.uy += grad[c] * column[2];
    }
    sum.count += column[0];
    sum.x += column[1];
    sum.y += column[2];
  }
}

// What rows add to the sums of a node that they keep whole.
template <class T>
void row_moments(const T* record, int64_t value_dim, double* to) {
  const double x = record[0], y = record[1], tau = record[2];
  for (int64_t c = 0; c <= value_dim; ++c, to += kColumnMoments) {
    const double grad = c < value_dim ? record[kRowNumbers + c] : record[3];
    to[0] = -tau * grad;
    to[1] = x * grad;
    to[2] = y * grad;
  }
}

template <class T>
void key_gradient(const TreeView<T>& tree, const TreeRows<T>& rows, int height, int32_t first,
                  int32_t last, const TreeGradients& out) {
  using V = Vector<T>;
  using D = Vector<double>;
  const int64_t value_dim = tree.keys.value_dim, width = tree.width, stride = tree.keys.stride;
  const Lanes<T> lanes(rows);
  // Of each row, and behind them of all; made when a node wants them.
  const Room moments((kGroup + 1) * width);
  double* const common = moments.get() + kGroup * width;
  bool made = false;
  const auto make_moments = [&] {
    made = true;
    for (int l = 0; l < rows.count; ++l) {
      double* own = moments.get() + l * width;
      row_moments(rows.at(l), value_dim, own);
      for (int64_t m = 0; m < width; ++m) common[m] += own[m];
    }
  };
  visit_columns(value_dim, [&](auto columns) QFLUX_INLINE_LAMBDA {
    walk(
        tree, lanes, height, first, last, [](uint32_t, const V*) QFLUX_INLINE_LAMBDA {},
        [&](const Hits& whole) QFLUX_INLINE_LAMBDA {
          if (!made) make_moments();
          for (int n = 0; n < whole.size; ++n) {
            double* to = out.nodes + whole.node[n] * width;
            for (int64_t m = 0; m < width; m += D::kWidth) {
              D sum = load(to + m);
              if (whole.rows[n] == lanes.all)
                sum = sum + load(common + m);
              else
                each_row_of(whole.rows[n], [&](int l) QFLUX_INLINE_LAMBDA {
                  sum = sum + load(moments.get() + l * width + m);
                });
              store(to + m, sum);
            }
          }
        },
        [&](const Hits& leaves) QFLUX_INLINE_LAMBDA {
          for (int n = 0; n < leaves.size; ++n) {
            int32_t list[kGroup];
            int64_t count = 0;
            each_row_of(leaves.rows[n], [&](int l) QFLUX_INLINE_LAMBDA { list[count++] = l; });
            const int64_t leaf = tree.leaf(leaves.node[n]);
            // As many vectors as have room for the sums of their columns.
            constexpr int kCount = decltype(columns)::kValue > 4 ? 1 : kTogether;
            for (int64_t k = leaf; k < leaf + kLeaf; k += kCount * V::kWidth)
              meet_rows<decltype(columns)::kValue, false, kCount>(
                  tree.keys, k, rows, list, count, 0,
                  [&](int64_t c, int64_t key, V sum) QFLUX_INLINE_LAMBDA {
                    double* const to = out.pairs + c * stride + key;
                    each_wide(sum, [&](int l, D part)
                                       QFLUX_INLINE_LAMBDA { store(to + l, load(to + l) + part); });
                  });
          }
        });
  });
}

template <class T>
void hand_down(const TreeView<T>& tree, const TreeGradients& sums, int height, int32_t first,
               int32_t last, const int32_t* order, int64_t count, double* point, double* values) {
  const int64_t value_dim = tree.keys.value_dim, width = tree.width, stride = tree.keys.stride;
  for (; height > 0; --height) {
    for (int32_t node = first; node < last; ++node) {
      const int32_t begin = tree.child(height, node), end = tree.first[height];
      for (int32_t child = begin; child < begin + kFan && child < end; ++child)
        for (int64_t m = 0; m < width; ++m)
          sums.nodes[child * width + m] += sums.nodes[node * width + m];
    }
    const int32_t begin = tree.child(height, first), end = tree.child(height, last);
    first = begin;
    last = end < tree.first[height] ? end : tree.first[height];
  }
  for (int64_t n = first * kLeaf; n < lesser(last * kLeaf, count); ++n) {
    const double* column = sums.nodes + n / kLeaf * width;
    const int64_t at = tree.leaf(n / kLeaf) + n % kLeaf;
    const double kx = tree.keys.x[at], ky = tree.keys.y[at];
    double x = sums.pairs[at], y = sums.pairs[stride + at];
    const int64_t key = order[n];
    for (int64_t c = 0; c < value_dim; ++c, column += kColumnMoments) {
      const double v = tree.keys.values[c * stride + at];
      x += v * column[1];
      y += v * column[2];
      values[key * value_dim + c] +=
          sums.pairs[(2 + c) * stride + at] + column[0] + kx * column[1] + ky * column[2];
    }
    point[2 * key] += x + column[1];
    point[2 * key + 1] += y + column[2];
  }
}

template <class T>
void run_mass(const KeyPlanes<T>& keys, int64_t count, const T* record, Mass<T>* out) {
  mass_of(keys, {nullptr, 1, count, 0}, record, out);
}
template <class T>
void run_context(const KeyPlanes<T>& keys, int64_t count, const T* record, Mass<T>* out,
                 double* context) {
  context_of(keys, {nullptr, 1, count, 0}, record, out, context);
}
template <class T>
void run_row_gradient(const KeyPlanes<T>& keys, int64_t count, const T* record, KeptSums* out) {
  kept_sums_of(keys, {nullptr, 1, count, 0}, record, out);
}

template <class T>
void run_key_gradient(const KeyPlanes<T>& keys, int64_t count, const TreeRows<T>& rows,
                      int64_t visible, double* point, double* values) {
  using V = Vector<T>;
  const int64_t value_dim = keys.value_dim;
  visit_columns(value_dim, [&](auto columns) QFLUX_INLINE_LAMBDA {
    for (int64_t k = 0; k < count; k += V::kWidth) {
      const int64_t valid = lesser(V::kWidth, count - k);
      const auto add = [&](int64_t c, int64_t, V sum) QFLUX_INLINE_LAMBDA {
        T lane[V::kWidth];
        store(lane, sum);
        for (int64_t l = 0; l < valid; ++l)
          (c < 2 ? point[2 * (k + l) + c] : values[(k + l) * value_dim + c - 2]) += lane[l];
      };
      // Row n sees keys up to visible + n - 1: the first rows see some of this vector's, the others
      // all.
      const int64_t from = greater(0, k + 1 - visible);
      const int64_t full = lesser(greater(from, k + V::kWidth - visible), rows.count);
      for (int64_t n = from; n < rows.count;) {
        const bool edge = n < full;
        const int64_t end = lesser(n + kRowsAtOnce, edge ? full : rows.count);
        const TreeRows<T> part{rows.at(n), rows.stride, end - n};
        if (edge)
          meet_rows<decltype(columns)::kValue, true, 1>(keys, k, part, nullptr, end - n,
                                                        visible + n - k, add);
        else
          meet_rows<decltype(columns)::kValue, false, 1>(keys, k, part, nullptr, end - n, 0, add);
        n = end;
      }
    }
  });
}

template <class T>
constexpr TreeLoops<T> kLoops = {build_leaves<T>,     build_nodes<T>,     mass<T>,
                                 context<T>,          row_gradient<T>,    key_gradient<T>,
                                 hand_down<T>,        run_mass<T>,        run_context<T>,
                                 run_row_gradient<T>, run_key_gradient<T>};

}  // namespace tree
}  // namespace
}  // namespace qflux::cpu
