#include "decode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../math/sweep.h"
#include "../tree/search.h"
#include "index.h"

namespace qflux::cpu {
namespace {

// Rows that a thread takes at a time.
constexpr int64_t kRows = 8;
// A walk costs about as many pairs as the root of the keys times this; a search, so many walks.
constexpr double kWalk = 64;
constexpr int64_t kSearch = 3;
// Half the band in which a threshold is sought, as a part of the way in which a normal distribution
// falls by a factor of e there; how many times wider the one is that follows a miss; and how many
// of them reach as far as the threshold may be.
constexpr double kBand = 0.35, kWider = 2, kSteps = 16;
// Rows that leave tangents before these say where a threshold is; how fast it is forgotten how far
// above them thresholds were, in 1 / n, and below which distance one adds nothing.
constexpr int kTrusted = 16;
constexpr double kForget = 0.8, kWorth = 0.02;
// Bound on the rounding of a bias, relative to it and to the threshold.
template <class T>
constexpr double kBiasUnit = sizeof(T) == 4 ? 0x1p-20 : 0x1p-48;

// The keys of a sequence from token `first` on.
template <class T>
KeyPlanes<T> planes_of(const CachedKeys<T>& keys, BatchIndex b, int64_t first) {
  const View<const T>& values = keys.values ? keys.values : keys.points;
  const int64_t at = first - keys.base;
  const T* const point = keys.points.sequence(b) + at;
  return {point, point + keys.points.component, values.sequence(b) + at, values.component,
          keys.value_dim};
}

template <class T>
T below(T number) {
  return std::nextafter(number, -std::numeric_limits<T>::infinity());
}

// Memory that a thread keeps from row to row: new pages for every row would cost more than the row.
template <class T>
class Kept {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      size_ = count + count / 2;
      memory_ = room<T>(size_);
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};
template <class T>
struct Scratch {
  Kept<int32_t> places;
  Kept<T> reaches, products;
  std::vector<IndexView<T>> trees;
  std::vector<Cut<T>> cuts;
};
template <class T>
Scratch<T>& scratch() {
  thread_local Scratch<T> mine;
  return mine;
}

// The tangents that a sequence has, if it keeps any, as one of its rows meets them. What a row
// finds joins them when tokens have come behind `end` of them: rows at one length have one guess,
// whichever were there before, and so the same bits again.
template <class T>
class Tangents {
 public:
  Tangents(const Loops<T>& loops, T* numbers, Point<T> query, int64_t end)
      : numbers_(numbers), end_(static_cast<T>(end)) {
    if (!numbers_) return;
    if (found(kInverse) > 0 && found(kEnd) != end_) take_found();
    highest_ = loops.decode.highest_tangent(numbers_, query);
  }

  // Below the threshold, by as much as rounding may put it above, or minus infinity.
  double bound() const {
    return highest_.threshold - kBiasUnit<T> * std::abs(double(highest_.threshold));
  }
  // Whether the threshold is likely to be no further above the bound than reach().
  bool trusted() const { return highest_.inverse > 0 && numbers_[2 * kTangents + kTrusted] > 0; }
  double reach() const { return found(kFarthest) * highest_.inverse; }

  void add(const KeptMass<T>& mass, double tau) const {
    if (!numbers_ || found(kInverse) > 0) return;
    const double inverse = 1 / mass.count;
    const double distance =
        highest_.inverse > 0 ? (tau - highest_.threshold) / highest_.inverse : 0;
    found(kX) = static_cast<T>(mass.x * inverse);
    found(kY) = static_cast<T>(mass.y * inverse);
    found(kInverse) = static_cast<T>(inverse);
    found(kDistance) = static_cast<T>(distance);
    found(kEnd) = end_;
  }

 private:
  // Numbers behind the tangents: the place of the next; by how many times 1 / n thresholds were
  // above the bound lately; and what was found at the length `end`.
  enum Number { kNext, kFarthest, kX, kY, kInverse, kDistance, kEnd };
  static_assert(kEnd < kTangentNumbers - 3 * kTangents, "room for them");

  T& found(Number number) const { return numbers_[3 * kTangents + number]; }

  void take_found() const {
    const bool enough = numbers_[2 * kTangents + kTrusted] > 0;
    const double distance = found(kDistance);
    found(kFarthest) =
        static_cast<T>(enough ? std::max(distance, kForget * found(kFarthest)) : distance);
    if (!enough || distance >= kWorth) {
      T& next = found(kNext);
      const int at = next > 0 && next < kTangents ? static_cast<int>(next) : 0;
      numbers_[at] = found(kX);
      numbers_[kTangents + at] = found(kY);
      numbers_[2 * kTangents + at] = found(kInverse);
      next = static_cast<T>(at + 1);
    }
    found(kInverse) = 0;
  }

  T* const numbers_;
  const T end_;
  Tangent<T> highest_{-std::numeric_limits<T>::infinity(), T(0)};
};

// Rows of one sequence.
template <class T>
class SequenceRows {
 public:
  // `runs` are those of the index, `trees` what they have for a sequence without padding.
  SequenceRows(const CachedRows<T>& params, int64_t n, const std::vector<Range>& runs,
               const std::vector<IndexView<T>>& trees)
      : params_(params),
        p_(params.pair),
        loops_(loops<T>()),
        n_(n),
        b_(p_.index(n)),
        start_(std::max<int64_t>(params.keys.start[b_], 0)),
        visible_{p_.rows, params.keys.end - start_, params.keys.end - start_ - p_.rows, true},
        covered_(std::max(params.index.tokens, start_)) {
    trees_.clear();
    cuts_.clear();
    if (runs.empty()) return;
    const CachedIndex& index = params.index;
    int64_t nodes = 0, leaves = 0;
    for (size_t r = 0; r < runs.size(); ++r) {
      const int64_t padding = std::max<int64_t>(start_ - runs[r].first, 0);
      const int64_t count = runs[r].last - runs[r].first - padding;
      if (count <= 0) continue;
      IndexView<T> tree = moved(trees[r], n * index.stride);
      if (padding > 0)
        tree =
            index_view<T>(reinterpret_cast<uint8_t*>(tree.moments), count, params.keys.value_dim);
      nodes += tree.nodes;
      leaves += tree.size[0];
      trees_.push_back(tree);
    }
    int32_t* at = scratch_.places.get(2 * nodes + leaves + 1);
    T* reach = scratch_.reaches.get(2 * leaves);
    for (const IndexView<T>& tree : trees_) {
      const int64_t size = tree.size[0];
      cuts_.push_back({at, at + tree.nodes, reach, reach + size, at + tree.nodes + size});
      at += 2 * tree.nodes + size;
      reach += 2 * size;
    }
  }

  bool run(int64_t first, int64_t last) {
    T limit[kRows] = {};
    if (is_thresholded(p_.score) && !has_mass(p_.score)) find_thresholds(first, last, limit);
    const int64_t value_dim = params_.keys.value_dim;
    std::vector<double> context(value_dim);
    for (int64_t row = first; row < last; ++row) {
      const int64_t seen = std::max<int64_t>(visible_.visible_keys(row), 0);
      const T tau = limit[row - first];
      std::fill(context.begin(), context.end(), 0.0);
      KeptMass<T> sums{{0, 0, -std::numeric_limits<T>::infinity()}};
      Point<T> q{};
      visit_score(p_.score, [&](auto tag) {
        using Score = typename decltype(tag)::template of<T>;
        q = Score::query(load_point(p_.states, b_, row), p_.coefficient[b_]);
      });
      if (!(is_tame(q.x) && is_tame(q.y) && is_tame(tau))) return false;
      if (seen > 0) {
        if (p_.score == ScoreKind::kInverseGate)
          loops_.decode.run_gate(tail(start_), seen, q, static_cast<T>(p_.eps), p_.min_gate[b_],
                                 &sums, context.data());
        else if (has_mass(p_.score))
          search(q, seen, &sums, context.data());
        else {
          const Query<T> query = threshold_query(q, tau);
          cut(query);
          gather(query, seen, &sums, context.data());
        }
      }
      write(row, seen, sums, context.data());
    }
    return true;
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  int64_t tree_count() const { return static_cast<int64_t>(trees_.size()); }
  KeyPlanes<T> tail(int64_t first) const { return planes_of(params_.keys, b_, first); }

  // As interact finds them, to the bit.
  void find_thresholds(int64_t first, int64_t last, T* limit) const {
    const KeyPlanes<T> planes = planes_of(params_.keys, b_, params_.keys.base);
    const Windows<T> windows{visible_,
                             false,
                             params_.moments.first_key(n_),
                             planes.x,
                             planes.y,
                             params_.keys.base - start_,
                             params_.moments.before(n_),
                             p_.coefficient[b_],
                             p_.eps};
    loops_.statistics.thresholds(windows, p_.states, b_, first, last, limit);
  }

  Query<T> threshold_query(Point<T> q, T tau) const {
    constexpr double kBias = HardThreshold<T>::kBias;
    const double boundary = double(tau) - kBias, room = kBiasUnit<T> * (1 + std::abs(double(tau)));
    const T shift = p_.score == ScoreKind::kSoftThreshold ? tau : T(0);
    // A pair at the threshold is kept.
    return {q.x,   q.y,  static_cast<T>(kBias),           below(tau),
            shift, T(0), static_cast<T>(boundary - room), static_cast<T>(boundary + room)};
  }
  static Query<T> mass_query(Point<T> q, T tau, T rest) {
    return {q.x, q.y, T(0), tau, tau, rest, tau, tau};
  }

  // Where the boundary of a row cuts the trees.
  T cut(const Query<T>& query) {
    T top = -kInfinity;
    loops_.decode.cut(trees_.data(), tree_count(), query, cuts_.data(), &top);
    return top;
  }
  // What a row gathers of the keys that it sees, with the trees cut for it.
  void gather(const Query<T>& query, int64_t seen, KeptMass<T>* sums, double* context) const {
    loops_.decode.cut_context(trees_.data(), tree_count(), cuts_.data(), query, sums, context);
    loops_.decode.run_context(tail(covered_), start_ + seen - covered_, query, sums, context);
  }

  // A row whose weights sum to one. The trees are cut by a band around a guess, and what is in the
  // band is left for the search.
  void search(Point<T> q, int64_t seen, KeptMass<T>* sums, double* context) {
    const int64_t near = start_ + seen - covered_;
    const Tangents<T> tangents(loops_, tangents_, q, params_.keys.end);
    Spread<T> spread{-kInfinity, 0, 0};
    loops_.decode.run_spread(tail(covered_), near, q, &spread);
    ThresholdSearch<T> search;
    const double lower = mass_bound(spread.top);
    double low = lower, high = spread.top, width = 0;
    if (trees_.empty()) {
      search.start(lower, lower);
    } else {
      double guess = normal_guess(spread, seen, &width);
      low = std::max(guess - width, tangents.bound());
      if (tangents.trusted()) {
        low = guess = tangents.bound();
        width = std::min(2 * width, tangents.reach() + 2 * kBiasUnit<T> * std::abs(guess));
      }
      search.start(lower, std::max(guess, low));
      high = search.tau + width;
    }
    PairBand<T> band{};
    find_band(q, near, low, high, &band);
    for (;;) {
      if (search.tau < band.low || search.tau > band.high) {
        // Beside the band, and in a few steps as far as it may be.
        const bool lower_down = search.tau < band.low;
        const double most = lower_down ? band.low - search.lower() : band.above.top - band.high;
        width = std::max(kWider * width, most / kSteps);
        low = lower_down ? std::max(search.lower(), band.low - width) : band.high;
        high = lower_down ? band.low : band.high + width;
        find_band(q, near, low, high, &band);
      }
      if (!search.update(mass_at(q, search, band))) continue;
      if (search.tau < band.low || search.tau > band.high) continue;
      *sums = {{0, 0, band.above.top}};
      std::fill(context, context + params_.keys.value_dim, 0.0);
      gather(mass_query(q, search.tau, search.rest), seen, sums, context);
      if (search.update(*sums)) break;
    }
    if (!trees_.empty()) tangents.add(*sums, double(search.tau) + search.rest);
    sums->excess = 1;
  }

  // The threshold of so many keys if their q . k were normal, as those of this spread seem to be;
  // and half of the band in which it may be.
  static double normal_guess(const Spread<T>& spread, int64_t count, double* width) {
    // At u deviations above the mean it is count deviation (density(u) - u tail(u)) = 1, where the
    // difference is about density(u) / (u^2 + 1).
    constexpr double kDensity = 0.3989422804014327;
    const double most = static_cast<double>(count) * spread.deviation * kDensity;
    double u = 0;
    for (int n = 0; n < 4 && most > 1; ++n)
      u = std::sqrt(2 * std::log(std::max(most / (u * u + 1), 1.0)));
    const double tau = spread.mean + u * spread.deviation;
    *width = kBand * spread.deviation / (u + 0.5) + kBiasUnit<T> * std::abs(tau) + 1.0 / count;
    return tau;
  }

  void find_band(Point<T> q, int64_t near, double low, double high, PairBand<T>* band) {
    Query<T> query = mass_query(q, T(0), T(0));
    query.low = band->low = below(static_cast<T>(low));
    query.high = band->high = -below(static_cast<T>(-high));
    band->count = 0;
    band->above = {0, 0, cut(query)};
    int64_t room_for = near + kPadding;
    for (const Cut<T>& cut : cuts_) room_for += cut.leaf_count * kLeaf;
    band->products = scratch_.products.get(room_for);
    for (size_t n = 0; n < trees_.size(); ++n) loops_.decode.cut_band(trees_[n], cuts_[n], q, band);
    loops_.decode.run_band(tail(covered_), near, q, band);
  }

  // The mass above a threshold of nodes that are kept whole and of sorted pairs.
  Mass<T> mass_at(Point<T> q, const ThresholdSearch<T>& at, const PairBand<T>& band) const {
    Mass<T> sums = band.above;
    const double tau = double(at.tau) + at.rest;
    sums.excess += sums.count * (double(band.high) - tau);
    for (const Cut<T>& cut : cuts_) {
      sums.excess += weighed(cut.sums, q.x, q.y, tau);
      sums.count += cut.sums[0];
    }
    loops_.decode.band_mass(band, mass_query(q, at.tau, at.rest), &sums);
    return sums;
  }

  void write(int64_t row, int64_t seen, const Mass<T>& sums, const double* context) const {
    const T scale = p_.reduction_scale(seen);
    for (int64_t c = 0; c < params_.keys.value_dim; ++c)
      params_.context.at(b_, row, c) = static_cast<T>(scale * context[c]);
    params_.strength.at(b_, row) = static_cast<T>(scale * sums.excess);
    params_.degree.at(b_, row) = static_cast<int32_t>(sums.count);
  }

  const CachedRows<T>& params_;
  const PairParams<T>& p_;
  const Loops<T>& loops_;
  const int64_t n_;
  const BatchIndex b_;
  const int64_t start_;
  const Visibility visible_;  // of the tokens from start_ on
  const int64_t covered_;     // tokens in front of this one are in trees, or padding
  // Few rows are one thread's, which alone may write.
  T* const tangents_ =
      params_.tangents && p_.rows <= kRows ? params_.tangents + n_ * kTangentNumbers : nullptr;
  Scratch<T>& scratch_ = scratch<T>();
  std::vector<IndexView<T>>& trees_ = scratch_.trees;
  std::vector<Cut<T>>& cuts_ = scratch_.cuts;
};

}  // namespace

template <class T>
void extend_moments(const CachedKeys<T>& keys, int64_t first, const CachedMoments& moments) {
  for_each_block(keys.batch(), 1, false, 8, [&](int64_t n, int64_t) {
    const BatchIndex b = keys.index(n);
    const int64_t start = std::max<int64_t>(keys.start[b], 0);
    if (start >= keys.end) return;
    Moments* const before = moments.before(n);
    if (first <= start) {
      const KeyPlanes<T> key = planes_of(keys, b, start);
      before[-1] = Moments{};
      before[-1].x = key.x[0];
      before[-1].y = key.y[0];
      before[0] = Moments{};
    }
    const int64_t last = (keys.end - start) / kMomentsTile;
    for (int64_t tile = std::max<int64_t>(first - start, 0) / kMomentsTile; tile < last; ++tile) {
      const KeyPlanes<T> planes = planes_of(keys, b, start + tile * kMomentsTile);
      Moments sums =
          loops<T>().statistics.moments(planes.x, planes.y, 0, kMomentsTile, moments.first_key(n));
      sums.add(before[tile]);
      before[tile + 1] = sums;
    }
  });
}

template <class T>
void extend_index(const CachedKeys<T>& keys, const CachedIndex& index, bool exact_points) {
  const std::vector<Range> there = runs_of(index.tokens, index.chunk);
  const std::vector<Range> wanted = runs_of(keys.end, index.chunk);
  const int64_t unit = index_unit<T>(index.chunk, keys.value_dim);
  for (size_t r = 0; r < wanted.size(); ++r) {
    const Range& run = wanted[r];
    if (r < there.size() && there[r].last == run.last) continue;
    const auto build = [&](int64_t n) {
      const BatchIndex b = keys.index(n);
      const int64_t first = std::max(run.first, keys.start[b]);
      if (first >= run.last) return;
      uint8_t* const memory = index.memory + n * index.stride + run.first / index.chunk * unit;
      build_index(loops<T>(), index_view<T>(memory, run.last - first, keys.value_dim),
                  planes_of(keys, b, first), run.last - first, exact_points);
    };
    if (keys.batch() >= thread_count())
      each(keys.batch(), build);
    else
      for (int64_t n = 0; n < keys.batch(); ++n) build(n);
  }
}

template <class T>
CachedAttention<T>::CachedAttention(const CachedRows<T>& params) : params_(params) {
  const CachedIndex& index = params.index;
  if (index.tokens == 0) return;
  runs_ = runs_of(index.tokens, index.chunk);
  const int64_t unit = index_unit<T>(index.chunk, params.keys.value_dim);
  for (const Range& run : runs_)
    trees_.push_back(index_view<T>(index.memory + run.first / index.chunk * unit,
                                   run.last - run.first, params.keys.value_dim));
}

template <class T>
void CachedAttention<T>::fetch(int64_t sequence) const {
  if (params_.tangents) prefetch(params_.tangents + sequence * kTangentNumbers, kTangentNumbers);
  for (const IndexView<T>& tree : trees_)
    prefetch(moved(tree, sequence * params_.index.stride).box(tree.first[tree.height]),
             6 * kIndexFan);
}

template <class T>
bool CachedAttention<T>::run(int64_t sequence, int64_t first, int64_t last) const {
  return SequenceRows<T>(params_, sequence, runs_, trees_).run(first, last);
}

template <class T>
int64_t row_pairs(const CachedRows<T>& params) {
  const int64_t covered = params.index.tokens;
  const double walks = kWalk * std::sqrt(static_cast<double>(covered));
  const int64_t pairs = params.keys.end - covered + static_cast<int64_t>(walks);
  return has_mass(params.pair.score) ? kSearch * pairs : pairs;
}

template <class T>
bool attend(const CachedRows<T>& params) {
  const PairParams<T>& p = params.pair;
  const int64_t rows = std::min(kRows, p.rows);
  const CachedAttention<T> attention(params);
  int32_t refused = 0;
  for_each_block(p.batch(), ceil_div(p.rows, kRows), false, grain_for(rows * row_pairs(params)),
                 [&](int64_t n, int64_t block) {
                   const Range range = tile_range(block, kRows, p.rows);
                   if (!attention.run(n, range.first, range.last))
                     __atomic_store_n(&refused, 1, __ATOMIC_RELAXED);
                 });
  return refused == 0;
}

#define QFLUX_INSTANTIATE(T)                                                         \
  template void extend_moments(const CachedKeys<T>&, int64_t, const CachedMoments&); \
  template void extend_index(const CachedKeys<T>&, const CachedIndex&, bool);        \
  template int64_t row_pairs(const CachedRows<T>&);                                  \
  template class CachedAttention<T>;                                                 \
  template bool attend(const CachedRows<T>&)

QFLUX_INSTANTIATE(float);
QFLUX_INSTANTIATE(double);
#undef QFLUX_INSTANTIATE

}  // namespace qflux::cpu
