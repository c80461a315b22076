// Which rows meet which keys, and how: causal sequences as dyadic blocks, each pair of a row block
// and a key block by geometry where that is cheaper than by pairs, and pair by pair otherwise.
#include "driver.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../../math/rectangles.h"
#include "../../math/score.h"
#include "directions.h"
#include "grouping.h"
#include "row_set.h"

namespace qflux::cpu {
namespace {

// Keys in front of a row in its own base block are met by the dense loop: the smallest block whose
// pairs cost more than its geometry.
constexpr int64_t kBase = 2048;
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

template <class T>
class Sweep {
 public:
  Sweep(const Loops<T>& loops, const Sequence<T>& sequence, const SweptRows* rows,
        const SweptGradients* gradients)
      : dense_(loops.dense),
        loops_(loops.sweep),
        s_(sequence),
        rows_(rows),
        gradients_(gradients),
        value_dim_(sequence.value_dim),
        // The moments of a key, or of a row for the keys' gradients, in whole vectors.
        width_(sequence.values ? ceil_div(3 * (sequence.value_dim + 1), 8) * 8 : 8) {}

  bool run() {
    const Visibility& visible = s_.visibility;
    const int64_t positions = visible.row_end + visible.shift;
    const int64_t extent =
        visible.causal ? positions - 1 : std::min(visible.row_end, visible.key_end);
    if (extent < kBase || !all_tame()) return false;
    prefix_moments();
    if (!visible.causal) {
      meet(whole_rectangle(visible));
      return true;
    }
    triangles(ceil_div(positions, kBase));
    const int64_t threads = thread_count();
    each_level(kBase, positions, [&](int64_t size) {
      const int64_t count = rectangle_count(positions, size);
      const auto body = [&](int64_t index) { meet(rectangle(visible, size, index)); };
      if (count >= threads)
        each(count, body);
      else
        for (int64_t index = 0; index < count; ++index) body(index);
    });
    return true;
  }

 private:
  void count_work(int which, int64_t pairs) const {
    if (rows_ && rows_->work) __atomic_fetch_add(&rows_->work[which], pairs, __ATOMIC_RELAXED);
  }
  bool backward() const { return gradients_ != nullptr; }
  // A weight is q . k + this.
  double bias_of(T limit) const {
    double bias = 0;
    visit_score(s_.score, [&](auto tag) {
      using Score = typename decltype(tag)::template of<double>;
      if constexpr (Score::kAffine) bias = Score::kBias + Score::offset(limit);
    });
    return bias;
  }

  // Of sequences that hold other numbers, every pair is left to the dense loops.
  bool all_tame() const {
    const int64_t rows = s_.visibility.row_end, keys = s_.visibility.key_end;
    bool fine = loops_.all_tame(s_.query_x, rows) && loops_.all_tame(s_.query_y, rows) &&
                loops_.all_tame(s_.limit, rows) && loops_.all_tame(s_.key_x, keys) &&
                loops_.all_tame(s_.key_y, keys);
    if (s_.values)
      for (int64_t j = 0; j < keys && fine; ++j)
        fine = loops_.all_tame(s_.values + j * s_.value_stride, value_dim_);
    if (backward()) {
      for (int64_t c = 0; c < value_dim_ && fine; ++c)
        fine = loops_.all_tame(s_.grad + c * s_.row_stride, rows);
      fine = fine && loops_.all_tame(s_.grad_strength, rows);
    }
    return fine;
  }

  // prefix_[n]: moments of the keys in front of key n * kBase, about key 0.
  void prefix_moments() {
    const int64_t keys = s_.visibility.key_end;
    prefix_.resize(ceil_div(keys, kBase) + 1);
    each(ceil_div(keys, kBase), [&](int64_t block) {
      Moments sums;
      for (int64_t j = block * kBase; j < std::min((block + 1) * kBase, keys); ++j)
        sums.add(double(s_.key_x[j]) - s_.key_x[0], double(s_.key_y[j]) - s_.key_y[0]);
      prefix_[block + 1] = sums;
    });
    for (size_t n = 1; n < prefix_.size(); ++n) prefix_[n].add(prefix_[n - 1]);
  }

  // The causal pairs of the base blocks. The first kBlock tokens of one are met together with its
  // last, and so on: as much work everywhere.
  void triangles(int64_t count) {
    constexpr int64_t kParts = kBase / kBlock / 2;
    each(count * kParts, [&](int64_t item) {
      const int64_t part = item % kParts;
      for (const int64_t n : {part, 2 * kParts - 1 - part}) triangle(item / kParts, n * kBlock);
    });
  }

  // The causal pairs of rows at kBlock positions of a base block, and of keys there.
  void triangle(int64_t block, int64_t offset) {
    const Visibility& visible = s_.visibility;
    const int64_t key = block * kBase, end = std::min(key + kBase, visible.row_end + visible.shift);
    const int64_t first = key + offset, last = std::min(first + kBlock, end);
    Sequence<T> s = from_key(s_, key);
    s.visibility = {row_at(visible, end), end - key, visible.shift - key, true};
    int32_t rows[kBlock];
    const int64_t row = row_at(visible, first), count = row_at(visible, last) - row;
    if (count > 0) {
      std::iota(rows, rows + count, static_cast<int32_t>(row));
      count_work(0, count * (row + visible.shift - key) + count * (count + 1) / 2);
      RowBlock results(*this);
      results.meet(s, row, row + count);
      results.add_to(rows, count);
    }
    if (backward() && gradients_->key && first < last) meet_keys(s, offset, last - key, key);
  }

  // The sums, or gradients, of at most kBlock rows.
  struct RowBlock {
    const Sweep& sweep;
    std::unique_ptr<double[]> context;  // [kBlock][value_dim]
    double strength[kBlock], point[kBlock][2], limit[kBlock];
    int32_t degree[kBlock];
    std::unique_ptr<T[]> met_context;

    explicit RowBlock(const Sweep& of)
        : sweep(of),
          context(room<double>(kBlock * of.value_dim_)),
          met_context(room<T>(kBlock * of.value_dim_)) {
      clear();
    }

    void clear() {
      std::fill_n(context.get(), kBlock * sweep.value_dim_, 0.0);
      std::fill_n(strength, kBlock, 0.0);
      std::fill_n(&point[0][0], 2 * kBlock, 0.0);
      std::fill_n(limit, kBlock, 0.0);
      std::fill_n(degree, kBlock, 0);
    }

    // Adds what rows first .. last - 1 of `s` get from its keys, pair by pair.
    void meet(const Sequence<T>& s, int64_t first, int64_t last) {
      const int64_t count = last - first, value_dim = sweep.value_dim_;
      if (sweep.backward()) {
        if (!sweep.gradients_->query) return;
        T met[2 * kBlock], met_limit[kBlock] = {};
        sweep.dense_.backward_rows(s, first, last, {met, nullptr, met_limit});
        for (int64_t n = 0; n < count; ++n)
          point[n][0] += met[2 * n], point[n][1] += met[2 * n + 1], limit[n] += met_limit[n];
        return;
      }
      T met_strength[kBlock];
      int32_t met_degree[kBlock];
      sweep.dense_.forward(s, first, last, {met_context.get(), met_strength, met_degree});
      for (int64_t n = 0; n < count * value_dim; ++n) context[n] += met_context[n];
      for (int64_t n = 0; n < count; ++n)
        strength[n] += met_strength[n], degree[n] += met_degree[n];
    }

    void add_to(const int32_t* rows, int64_t count) {
      const int64_t value_dim = sweep.value_dim_;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t row = rows[n];
        if (sweep.backward()) {
          if (!sweep.gradients_->query) continue;
          sweep.gradients_->query[2 * row] += point[n][0];
          sweep.gradients_->query[2 * row + 1] += point[n][1];
          if (sweep.gradients_->limit) sweep.gradients_->limit[row] += limit[n];
          continue;
        }
        for (int64_t c = 0; c < value_dim; ++c)
          sweep.rows_->context[row * value_dim + c] += context[n * value_dim + c];
        sweep.rows_->strength[row] += strength[n];
        sweep.rows_->degree[row] += degree[n];
      }
      clear();
    }
  };

  // Adds what keys first .. last - 1 of `s`, at most kBlock, get from its rows; key 0 of `s` is key
  // `offset` of the sequence.
  void meet_keys(const Sequence<T>& s, int64_t first, int64_t last, int64_t offset) {
    T point[2 * kBlock];
    const auto values = room<T>(s.values ? kBlock * value_dim_ : 0);
    dense_.backward_keys(s, first, last, {point, values.get()});
    for (int64_t n = 0; n < last - first; ++n) {
      const int64_t key = offset + first + n;
      gradients_->key[2 * key] += point[2 * n];
      gradients_->key[2 * key + 1] += point[2 * n + 1];
      if (s.values)
        for (int64_t c = 0; c < value_dim_; ++c)
          gradients_->values[key * value_dim_ + c] += values[n * value_dim_ + c];
    }
  }

  // Every pair of some rows with the keys of a rectangle.
  void meet_densely(const std::vector<int32_t>& list, const Rectangle<>& where) {
    if (list.empty() || where.keys() == 0) return;
    count_work(0, int64_t(list.size()) * where.keys());
    const RowSet<T> set(s_, list, backward());
    const Sequence<T> keys = from_key(s_, where.key_begin);
    each(ceil_div(set.count(), kBlock), [&](int64_t block) {
      const int64_t first = block * kBlock, last = std::min(first + kBlock, set.count());
      Sequence<T> s = set.as_rows(keys, first, last);
      s.visibility.key_end = where.keys();
      RowBlock results(*this);
      results.meet(s, 0, last - first);
      results.add_to(&set.row[first], last - first);
    });
    if (!backward() || !gradients_->key) return;
    Sequence<T> s = set.as_rows(keys, 0, set.count());
    s.visibility.key_end = where.keys();
    each(ceil_div(where.keys(), kBlock), [&](int64_t block) {
      const int64_t first = block * kBlock;
      meet_keys(s, first, std::min(first + kBlock, where.keys()), where.key_begin);
    });
  }

  // Adds what every row of a rectangle gets from every key of it.
  void meet(const Rectangle<>& where) {
    const int64_t rows = where.rows(), keys = where.keys();
    if (rows <= 0 || keys <= 0) return;
    const std::vector<int32_t> hopeful = rows_in_reach(where);
    if (int64_t(hopeful.size()) < kBase / 2 || keys < kBase / 2)
      return meet_densely(hopeful, where);
    const Frame frame = frame_of(where);
    if (!(frame.least > 0)) return meet_densely(hopeful, where);

    const auto angle = room<double>(rows), low = room<double>(rows), high = room<double>(rows);
    const Chunks chunks(rows);
    each(chunks.count, [&](int64_t chunk) {
      const int64_t n = chunks.begin(chunk), row = where.row_begin + n;
      loops_.view_rows(frame, s_.query_x + row, s_.query_y + row, s_.limit + row,
                       chunks.end(chunk) - n, &angle[n], &low[n], &high[n]);
    });
    // The rest is in no group.
    int64_t next = 0;
    for (const int32_t row : hopeful) {
      for (; next < row - where.row_begin; ++next) low[next] = high[next] = kNone;
      ++next;
    }
    for (; next < rows; ++next) low[next] = high[next] = kNone;
    std::vector<RowGroup> groups = group_rows(low.get(), high.get(), rows, keys);
    for (int64_t n = 0; n < rows; ++n) {
      const double middle = (low[n] + high[n]) / 2;
      if (!std::isfinite(middle)) continue;
      const auto after =
          std::upper_bound(groups.begin(), groups.end(), middle,
                           [](double h, const RowGroup& group) { return h < group.from; });
      RowGroup& group = *(after - 1);
      group.rows.push_back(static_cast<int32_t>(n));
      group.h = {std::min(group.h.low, low[n]), std::max(group.h.high, high[n])};
    }
    std::vector<int32_t> densely;
    for (const RowGroup& group : groups)
      if (group.dense || !meet_by_arcs(frame, group.h, group.rows, angle.get(), where))
        for (const int32_t n : group.rows)
          densely.push_back(static_cast<int32_t>(where.row_begin) + n);
    // Rows without direction are in no group.
    for (const int32_t row : hopeful) {
      const int64_t n = row - where.row_begin;
      if (!std::isfinite(low[n] + high[n])) densely.push_back(row);
    }
    std::sort(densely.begin(), densely.end());
    meet_densely(densely, where);
  }

  // The rows of a rectangle whose threshold is not beyond what any of its keys can score.
  std::vector<int32_t> rows_in_reach(const Rectangle<>& where) const {
    double farthest = 0;
    for (int64_t j = where.key_begin; j < where.key_end; ++j)
      farthest = std::max(farthest, absolute(double(s_.key_x[j])) + absolute(double(s_.key_y[j])));
    std::vector<int32_t> rows;
    for (int64_t i = where.row_begin; i < where.row_end; ++i) {
      const double reach =
          (absolute(double(s_.query_x[i])) + absolute(double(s_.query_y[i]))) * farthest;
      const double most = HardThreshold<double>::kBias + reach;
      if (!(most + kScoreUnit<T> * most < s_.limit[i])) rows.push_back(static_cast<int32_t>(i));
    }
    return rows;
  }

  // The ellipse of the statistics that the rows' thresholds came from, at the middle row.
  Frame frame_of(const Rectangle<>& where) const {
    const Visibility& visible = s_.visibility;
    const int64_t middle = (where.row_begin + where.row_end) / 2;
    const int64_t seen = s_.whole_window ? visible.key_end : visible.visible_keys(middle);
    const size_t block = std::min<size_t>((seen + kBase / 2) / kBase, prefix_.size() - 1);
    double square = 0;
    const int64_t step = std::max<int64_t>(where.rows() / 256, 1);
    int64_t sampled = 0;
    for (int64_t row = where.row_begin; row < where.row_end; row += step, ++sampled) {
      const double x = 2 * s_.query_x[row], y = 2 * s_.query_y[row];
      square += x * x + y * y;
    }
    return make_frame(prefix_[std::max<size_t>(block, 1)], {s_.key_x[0], s_.key_y[0]}, s_.eps,
                      square / sampled, kScoreUnit<T>);
  }

  // One group of rows against the keys of a rectangle; false, having added nothing, where so many
  // pairs would have to be tested that the dense loop is as fast.
  bool meet_by_arcs(const Frame& frame, Interval h, const std::vector<int32_t>& list,
                    const double* angle, const Rectangle<>& where) {
    Directions sorted = sort_by_direction(list, angle);
    const Classes classes = classify(loops_, s_, frame, h, sorted.map(), where, 2 * width_);
    const int64_t keys = where.keys(), rows = list.size();
    double entries = 0;
    for (int32_t b = 0; b < classes.blocks; ++b) entries += double(classes.entries(b));
    if (entries * (kRankBlock + kEntryCost) > double(rows) * double(keys)) return false;

    for (int32_t& n : sorted.order) n += static_cast<int32_t>(where.row_begin);
    const RowSet<T> set(s_, std::move(sorted.order), backward());
    const auto moments = inner_moments(classes, where);
    if (backward() && gradients_->key) keys_from_inner_rows(set, classes, where);
    // Lists of a few blocks at a time, so that memory stays O(S) however wide the band.
    const int64_t most = std::max<int64_t>(8 * keys, int64_t(1) << 16);
    for (int32_t begin = 0; begin < classes.blocks;) {
      int32_t end = begin;
      int64_t size = 0;
      while (end < classes.blocks && (end == begin || size + classes.entries(end) <= most))
        size += classes.entries(end++);
      meet_bands(set, classes, begin, end, size, moments.get(), where);
      begin = end;
    }
    return true;
  }

  // The vectors of keys [begin, end) of the sequence, width_ numbers each.
  void key_vectors(int64_t begin, int64_t end, double* vectors) const {
    for (int64_t j = begin; j < end; ++j, vectors += width_) {
      const double x = s_.key_x[j], y = s_.key_y[j];
      if (!s_.values) {
        const double numbers[8] = {1, x, y, x * x, x * y, y * y, 0, 0};
        std::copy_n(numbers, 8, vectors);
        continue;
      }
      const T* value = s_.values + j * s_.value_stride;
      double* at = vectors;
      for (int64_t c = 0; c <= value_dim_; ++c, at += 3) {
        const double v = c < value_dim_ ? double(value[c]) : 1.0;
        at[0] = v;
        at[1] = v * x;
        at[2] = v * y;
      }
      std::fill(at, vectors + width_, 0.0);
    }
  }

  // For each block of rows the moments of the keys that all of them keep for certain.
  std::unique_ptr<double[]> inner_moments(const Classes& classes, const Rectangle<>& where) const {
    const Chunks& chunks = classes.chunks;
    const int32_t blocks = classes.blocks;
    constexpr int64_t kTile = 64;
    const int64_t size = 2 * width_;
    std::vector<double> bins(chunks.count * (blocks + 1) * size, 0.0);
    each(chunks.count, [&](int64_t chunk) {
      const auto vectors = room<double>(kTile * width_);
      double* own = &bins[chunk * (blocks + 1) * size];
      for (int64_t j = chunks.begin(chunk); j < chunks.end(chunk); j += kTile) {
        const int64_t end = std::min(j + kTile, chunks.end(chunk));
        key_vectors(where.key_begin + j, where.key_begin + end, vectors.get());
        loops_.add_spans(vectors.get(), width_, &classes.spans[j], end - j, blocks, own);
      }
    });
    auto moments = room<double>(blocks * width_);
    std::vector<double> running(size, 0.0);
    for (int32_t b = 0; b < blocks; ++b) {
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
        loops_.add_bins(running.data(), &bins[(chunk * (blocks + 1) + b) * size], width_);
      for (int64_t c = 0; c < width_; ++c)
        moments[b * width_ + c] = running[c] + running[width_ + c];
    }
    return moments;
  }

  // What each row of a block gets from the keys that the block keeps for certain.
  void add_inner(const RowSet<T>& set, int64_t first, int64_t last, const double* m,
                 RowBlock& results) const {
    for (int64_t n = 0; n < last - first; ++n) {
      const double qx = set.plane(0)[first + n], qy = set.plane(1)[first + n];
      if (backward()) {
        const auto grad = [&](int64_t c) { return double(set.plane(3 + c)[first + n]); };
        double x = 0, y = 0, upstream = 0;
        if (!s_.values) {
          x = grad(0) * m[3] + grad(1) * m[4] + grad(2) * m[1];
          y = grad(0) * m[4] + grad(1) * m[5] + grad(2) * m[2];
          upstream = grad(0) * m[1] + grad(1) * m[2] + grad(2) * m[0];
        } else {
          for (int64_t c = 0; c <= value_dim_; ++c) {
            x += grad(c) * m[3 * c + 1];
            y += grad(c) * m[3 * c + 2];
            upstream += grad(c) * m[3 * c];
          }
        }
        results.point[n][0] += x;
        results.point[n][1] += y;
        results.limit[n] -= upstream;
        continue;
      }
      const double bias = bias_of(set.plane(2)[first + n]);
      if (!s_.values) {
        results.context[2 * n] += bias * m[1] + qx * m[3] + qy * m[4];
        results.context[2 * n + 1] += bias * m[2] + qx * m[4] + qy * m[5];
        results.strength[n] += bias * m[0] + qx * m[1] + qy * m[2];
        results.degree[n] += static_cast<int32_t>(m[0]);
        continue;
      }
      const auto sum = [&](int64_t c) {
        return bias * m[3 * c] + qx * m[3 * c + 1] + qy * m[3 * c + 2];
      };
      for (int64_t c = 0; c < value_dim_; ++c) results.context[n * value_dim_ + c] += sum(c);
      results.strength[n] += sum(value_dim_);
      results.degree[n] += static_cast<int32_t>(m[3 * value_dim_]);
    }
  }

  // The vectors that keys sum over rows, the mirror image of key_vectors: (bias g, q g) for each
  // column, or with values that are the keys what their two gradients need together.
  void row_vectors(const RowSet<T>& set, int64_t first, int64_t last, double* vectors) const {
    for (int64_t n = first; n < last; ++n, vectors += width_) {
      const double qx = set.plane(0)[n], qy = set.plane(1)[n];
      const double bias = bias_of(set.plane(2)[n]);
      const auto grad = [&](int64_t c) { return double(set.plane(3 + c)[n]); };
      if (!s_.values) {
        const double gx = grad(0), gy = grad(1), gs = grad(2);
        const double numbers[8] = {2 * qx * gx,
                                   qx * gy + qy * gx,
                                   2 * qy * gy,
                                   gs * qx + bias * gx,
                                   gs * qy + bias * gy,
                                   0,
                                   0,
                                   0};
        std::copy_n(numbers, 8, vectors);
        continue;
      }
      double* at = vectors;
      for (int64_t c = 0; c <= value_dim_; ++c, at += 3) {
        at[0] = grad(c) * bias;
        at[1] = grad(c) * qx;
        at[2] = grad(c) * qy;
      }
      std::fill(at, vectors + width_, 0.0);
    }
  }

  // The gradients that keys get from the rows that keep them for certain.
  void keys_from_inner_rows(const RowSet<T>& set, const Classes& classes,
                            const Rectangle<>& where) {
    const Chunks& chunks = classes.chunks;
    const int32_t blocks = classes.blocks;
    const int64_t size = 2 * width_;
    // Running sums over blocks, each in two doubles.
    std::vector<double> sums((blocks + 1) * size, 0.0);
    each(blocks, [&](int64_t block) {
      const int64_t first = block * kRankBlock;
      const int64_t last = std::min<int64_t>(first + kRankBlock, set.count());
      const auto vectors = room<double>(kRankBlock * width_);
      row_vectors(set, first, last, vectors.get());
      loops_.add_vectors(&sums[(block + 1) * size], vectors.get(), last - first, width_);
    });
    for (int32_t b = 1; b <= blocks; ++b)
      loops_.add_bins(&sums[b * size], &sums[(b - 1) * size], width_);

    each(chunks.count, [&](int64_t chunk) {
      const auto total = room<double>(width_);
      for (int64_t j = chunks.begin(chunk); j < chunks.end(chunk); ++j) {
        const Span& span = classes.spans[j];
        if (span.inner_count == 0) continue;
        const int32_t stop = span.inner + span.inner_count;
        const auto add = [&](int32_t begin, int32_t end, bool more) {
          const double *low = &sums[begin * size], *high = &sums[end * size];
          for (int64_t c = 0; c < width_; ++c) {
            const double part = (high[c] - low[c]) + (high[width_ + c] - low[width_ + c]);
            total[c] = more ? total[c] + part : part;
          }
        };
        add(span.inner, std::min(stop, blocks), false);
        if (stop > blocks) add(0, stop - blocks, true);
        add_to_key(where.key_begin + j, total.get());
      }
    });
  }

  void add_to_key(int64_t key, const double* m) {
    const double kx = s_.key_x[key], ky = s_.key_y[key];
    double x = 0, y = 0;
    if (!s_.values) {
      x = m[0] * kx + m[1] * ky + m[3];
      y = m[1] * kx + m[2] * ky + m[4];
    } else {
      const T* value = s_.values + key * s_.value_stride;
      for (int64_t c = 0; c <= value_dim_; ++c) {
        const double v = c < value_dim_ ? double(value[c]) : 1.0;
        x += v * m[3 * c + 1];
        y += v * m[3 * c + 2];
        if (c < value_dim_)
          gradients_->values[key * value_dim_ + c] +=
              m[3 * c] + kx * m[3 * c + 1] + ky * m[3 * c + 2];
      }
    }
    gradients_->key[2 * key] += x;
    gradients_->key[2 * key + 1] += y;
  }

  // Blocks begin .. end - 1: certain keys from their moments, the others from lists, pair by pair.
  void meet_bands(const RowSet<T>& set, const Classes& classes, int32_t begin, int32_t end,
                  int64_t entries, const double* moments, const Rectangle<>& where) {
    const Chunks& chunks = classes.chunks;
    const int32_t blocks = classes.blocks;
    const int64_t count = end - begin, parts = chunks.count;
    count_work(1, entries * kRankBlock);
    // starts[block][chunk]: where the chunk's keys begin in the list of a block.
    std::vector<int64_t> starts(count * parts + 1, 0);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t chunk = 0; chunk < parts; ++chunk)
        starts[b * parts + chunk + 1] =
            starts[b * parts + chunk] + classes.tested[chunk * (blocks + 1) + begin + b];
    const auto list = room<int32_t>(entries);
    each(parts, [&](int64_t chunk) {
      std::vector<int64_t> next(count);
      for (int64_t b = 0; b < count; ++b) next[b] = starts[b * parts + chunk];
      const auto append = [&](int32_t from, int32_t to, int32_t key) {
        for (int32_t b = std::max(from, begin); b < std::min(to, end); ++b)
          list[next[b - begin]++] = key;
      };
      for (int64_t j = chunks.begin(chunk); j < chunks.end(chunk); ++j) {
        const Band band = band_of(classes.spans[j], blocks);
        for (const BlockRange& range : {band.before, band.after}) {
          const int32_t stop = range.start + range.count;
          append(range.start, std::min(stop, blocks), static_cast<int32_t>(j));
          if (stop > blocks) append(0, stop - blocks, static_cast<int32_t>(j));
        }
      }
    });

    const bool key_pass = backward() && gradients_->key;
    const int64_t columns = 2 + (s_.values ? value_dim_ : 0);
    const auto entry_grads = room<T>(key_pass ? entries * columns : 0);
    const Sequence<T> keys = from_key(s_, where.key_begin);
    each(count, [&](int64_t b) {
      const int64_t first = (begin + b) * kRankBlock;
      const int64_t last = std::min<int64_t>(first + kRankBlock, set.count());
      RowBlock results(*this);
      add_inner(set, first, last, moments + (begin + b) * width_, results);
      KeyTile<T> tile(s_, backward());
      const Sequence<T> rows = set.as_rows(keys, first, last);
      for (int64_t n = starts[b * parts]; n < starts[(b + 1) * parts]; n += kListTile) {
        const int64_t size = std::min(kListTile, starts[(b + 1) * parts] - n);
        const Sequence<T> s = tile.gather(rows, &list[n], size);
        results.meet(s, 0, last - first);
        if (key_pass)
          for (int64_t j = 0; j < size; j += kBlock)
            record_keys(s, j, std::min(j + kBlock, size), &entry_grads[(n + j) * columns]);
      }
      results.add_to(&set.row[first], last - first);
    });
    if (!key_pass) return;
    // Each chunk adds up for its own keys, block by block.
    each(parts, [&](int64_t chunk) {
      for (int64_t b = 0; b < count; ++b)
        for (int64_t n = starts[b * parts + chunk]; n < starts[b * parts + chunk + 1]; ++n) {
          const int64_t key = where.key_begin + list[n];
          const T* from = &entry_grads[n * columns];
          gradients_->key[2 * key] += from[0];
          gradients_->key[2 * key + 1] += from[1];
          for (int64_t c = 2; c < columns; ++c)
            gradients_->values[key * value_dim_ + c - 2] += from[c];
        }
    });
  }

  // The gradients of keys first .. last - 1 of `s`, at most kBlock: point, then values.
  void record_keys(const Sequence<T>& s, int64_t first, int64_t last, T* out) const {
    T point[2 * kBlock];
    const int64_t columns = 2 + (s.values ? value_dim_ : 0);
    const auto values = room<T>(s.values ? kBlock * value_dim_ : 0);
    dense_.backward_keys(s, first, last, {point, values.get()});
    for (int64_t n = 0; n < last - first; ++n) {
      out[n * columns] = point[2 * n];
      out[n * columns + 1] = point[2 * n + 1];
      if (s.values) std::copy_n(&values[n * value_dim_], value_dim_, out + n * columns + 2);
    }
  }

  const DenseLoops<T>& dense_;
  const SweepLoops<T>& loops_;
  const Sequence<T>& s_;
  const SweptRows* rows_;
  const SweptGradients* gradients_;
  const int64_t value_dim_, width_;
  std::vector<Moments> prefix_;
};

}  // namespace

template <class T>
bool sweep_forward(const Loops<T>& loops, const Sequence<T>& s, const SweptRows& out) {
  return Sweep<T>(loops, s, &out, nullptr).run();
}

template <class T>
bool sweep_backward(const Loops<T>& loops, const Sequence<T>& s, const SweptGradients& out) {
  return Sweep<T>(loops, s, nullptr, &out).run();
}

template bool sweep_forward(const Loops<float>&, const Sequence<float>&, const SweptRows&);
template bool sweep_forward(const Loops<double>&, const Sequence<double>&, const SweptRows&);
template bool sweep_backward(const Loops<float>&, const Sequence<float>&, const SweptGradients&);
template bool sweep_backward(const Loops<double>&, const Sequence<double>&, const SweptGradients&);

}  // namespace qflux::cpu
