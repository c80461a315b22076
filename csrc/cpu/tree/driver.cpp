#include "driver.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "forest.h"
#include "search.h"

namespace qflux::cpu {
namespace {

// Rows that a thread takes at a time.
constexpr int64_t kRowsAtOnce = 256;
// Keys in front of a row among which its search starts, and among which it goes on.
constexpr int64_t kWindow = 128, kWideWindow = 2048;
constexpr int kWindowSteps = 2;
// Where that is a small part of all keys, a row that has few of them above where its threshold is
// expected goes on among the keys of trees, each at least so many times as many as those before.
constexpr int64_t kSmallPart = 64, kGrowth = 4;
constexpr double kFewAbove = 8;
// One group of rows in so many tells how many pairs a walk leaves to be met one by one; of all that
// rows see, so many may be in one walk, and in all of a search, before the dense loops are as fast.
constexpr int64_t kProbed = 16;
constexpr double kMostInWalk = 0.25, kMostInSearch = 1.0;
// Rows that are fetched ahead of those which walk: neighbours in space stand apart in memory.
constexpr int64_t kAhead = 2 * kGroup;
// Subtrees whose keys gather from rows at the same time.
constexpr int64_t kSubtrees = 16;

template <class T>
class MassTree {
 public:
  MassTree(const Loops<T>& loops, const Sequence<T>& s)
      : loops_(loops.tree), s_(s), visible_(s.visibility), forest_(loops, s) {}

  // False where too many pairs would be met one by one.
  bool forward(const MassRows<T>& out) {
    stride_ = kRowNumbers;
    stage_rows(false);
    const int64_t rows = visible_.row_end, value_dim = s_.value_dim;
    std::vector<ThresholdSearch<T>> search(rows);
    std::vector<Mass<T>> sums(rows);
    std::vector<int32_t> sampled(rows, 0);
    const auto contexts = room<double>(rows * value_dim);
    state_.assign(rows, State::kDone);
    each_run(rows, [&](int64_t row) {
      if (seen_by(row) > 0) state_[row] = start(row, search, sums, sampled);
    });
    const double seen = visible_pairs();
    if (probe() > kMostInWalk * seen) return false;
    int64_t met = 0;
    start_in_trees(search, sums, sampled, &met);
    for (int64_t active = 1; active > 0;) {
      for (const State state : {State::kMass, State::kContext}) {
        each_run(rows, [&](int64_t row) {
          if (state_[row] != state) return;
          sums[row] = Mass<T>{0, 0, -std::numeric_limits<T>::infinity()};
          record(row)[2] = search[row].tau;
          record(row)[3] = search[row].rest;
          double* const context = &contexts[row * value_dim];
          if (state == State::kContext) std::fill_n(context, value_dim, 0.0);
          const auto [begin, end] = base_keys(row);
          if (begin == end) return;
          if (state == State::kMass)
            loops_.run_mass(keys_from(begin), end - begin, record(row), &sums[row]);
          else
            loops_.run_context(keys_from(begin), end - begin, record(row), &sums[row], context);
        });
        const bool few = each_group(
            [&](int64_t row) { return state_[row] == state; },
            [&](int64_t row) {
              prefetch(&sums[row], 1);
              if (state == State::kContext) prefetch(&contexts[row * value_dim], value_dim);
            },
            [&](const TreeView<T>& tree, const TreeRows<T>& group, const int32_t* row) {
              Mass<T> part[kGroup];
              for (int64_t n = 0; n < group.count; ++n) part[n] = sums[row[n]];
              int64_t pairs = 0;
              if (state == State::kMass) {
                loops_.mass(tree, group, part, &pairs);
              } else {
                const auto context = room<double>(kGroup * value_dim);
                for (int64_t n = 0; n < group.count; ++n)
                  std::copy_n(&contexts[row[n] * value_dim], value_dim, &context[n * value_dim]);
                loops_.context(tree, group, part, context.get(), &pairs);
                for (int64_t n = 0; n < group.count; ++n)
                  std::copy_n(&context[n * value_dim], value_dim, &contexts[row[n] * value_dim]);
              }
              for (int64_t n = 0; n < group.count; ++n) sums[row[n]] = part[n];
              __atomic_fetch_add(&met, pairs, __ATOMIC_RELAXED);
            },
            [&] { return met <= kMostInSearch * seen; });
        if (!few) return false;
      }
      active = 0;
      each_run(rows, [&](int64_t row) {
        State& state = state_[row];
        if (state == State::kDone) return;
        const bool found = search[row].update(sums[row]);
        if (found && state == State::kContext) {
          state = State::kDone;
          const int64_t number = forest_.row_at_place(row);
          out.degree[number] = static_cast<int32_t>(sums[row].count);
          std::copy_n(&contexts[row * value_dim], value_dim, out.context + number * value_dim);
          return;
        }
        state = found || search[row].near() ? State::kContext : State::kMass;
        __atomic_fetch_add(&active, 1, __ATOMIC_RELAXED);
      });
    }
    for (int64_t row = 0; row < rows; ++row) out.tau[forest_.row_at_place(row)] = search[row].tau;
    if (out.work) out.work[1] += met;
    return true;
  }

  bool backward(const MassGradients& out) {
    stride_ = kRowNumbers + s_.value_dim;
    stage_rows(true);
    if (probe() > kMostInWalk * visible_pairs()) return false;
    const int64_t rows = visible_.row_end;
    std::vector<KeptSums> sums(rows);
    each_run(rows, [&](int64_t row) {
      const auto [begin, end] = base_keys(row);
      if (begin < end)
        loops_.run_row_gradient(keys_from(begin), end - begin, record(row), &sums[row]);
    });
    each_group([](int64_t) { return true; }, [&](int64_t row) { prefetch(&sums[row], 1); },
               [&](const TreeView<T>& tree, const TreeRows<T>& group, const int32_t* row) {
                 KeptSums part[kGroup];
                 for (int64_t n = 0; n < group.count; ++n) part[n] = sums[row[n]];
                 loops_.row_gradient(tree, group, part);
                 for (int64_t n = 0; n < group.count; ++n) sums[row[n]] = part[n];
               },
               [] { return true; });
    each_run(rows, [&](int64_t row) {
      const KeptSums& sum = sums[row];
      const double mean = sum.count > 0 ? sum.u / sum.count : 0.0;
      record(row)[3] = static_cast<T>(-mean);
      if (!out.query) return;
      double* const query = out.query + 2 * forest_.row_at_place(row);
      query[0] = sum.ux - mean * sum.x;
      query[1] = sum.uy - mean * sum.y;
    });
    if (out.key) key_gradients(out);
    return true;
  }

 private:
  enum class State : int8_t { kDone, kStart, kMass, kContext };

  // Rows are numbered by where they are stored from here on, and so is all that is kept of them.
  T* record(int64_t row) const { return &records_[row * stride_]; }
  int64_t seen_by(int64_t row) const { return visible_.visible_keys(forest_.row_at_place(row)); }
  Range base_keys(int64_t row) const { return forest_.base_keys(forest_.row_at_place(row)); }

  KeyPlanes<T> keys_from(int64_t key) const {
    KeyPlanes<T> keys = forest_.keys();
    keys.x += key;
    keys.y += key;
    keys.values += key;
    return keys;
  }

  template <class Body>
  void each_run(int64_t rows, const Body& body) const {
    each(ceil_div(rows, kRowsAtOnce), [&](int64_t tile) {
      const Range range = tile_range(tile, kRowsAtOnce, rows);
      for (int64_t row = range.first; row < range.last; ++row) body(row);
    });
  }

  void stage_rows(bool backward) {
    records_ = room<T>(visible_.row_end * stride_);
    each_run(visible_.row_end, [&](int64_t row) {
      T* const to = record(row);
      const int64_t number = forest_.row_at_place(row);
      to[0] = s_.query_x[number];
      to[1] = s_.query_y[number];
      to[2] = s_.limit[number];
      to[3] = T(0);
      if (backward)
        for (int64_t c = 0; c < s_.value_dim; ++c)
          to[kRowNumbers + c] = s_.grad[c * s_.row_stride + number];
    });
  }

  // Where the search of a row starts: the threshold among the last keys that it sees, as if all
  // were like these; among few, and then once among more. What it does next: kStart where even
  // these tell too little of all, and then `search`, `sums` and `sampled` hold where they were
  // evaluated, what they gave and how many they are.
  State start(int64_t row, std::vector<ThresholdSearch<T>>& searches,
              std::vector<Mass<T>>& all_sums, std::vector<int32_t>& sampled) const {
    ThresholdSearch<T>& search = searches[row];
    const double seen = static_cast<double>(seen_by(row));
    T probe[kRowNumbers] = {record(row)[0], record(row)[1], std::numeric_limits<T>::infinity(), 0};
    Mass<T> sums{0, 0, -std::numeric_limits<T>::infinity()};
    const auto evaluate = [&](int64_t window) {
      const int64_t end = seen_by(row);
      const int64_t begin = std::max<int64_t>(end - window, 0) / kPadding * kPadding;
      sums.excess = sums.count = 0;
      loops_.run_mass(keys_from(begin), end - begin, probe, &sums);
      return end - begin;
    };
    int64_t count = evaluate(kWindow);
    const double least = mass_bound(sums.top);
    search.start(least, least);
    for (int n = 0; n < kWindowSteps; ++n) {
      probe[2] = search.tau;
      probe[3] = search.rest;
      evaluate(kWindow);
      if (search.update(sums)) break;
    }
    double guess = guess_among(sums, probe[2], std::min(seen, double(kWideWindow)) / count);
    if (seen > count) {
      probe[2] = static_cast<T>(guess);
      probe[3] = 0;
      count = evaluate(kWideWindow);
      guess = guess_among(sums, probe[2], seen / count);
    }
    const double lower = search.lower();
    search = ThresholdSearch<T>();
    record(row)[2] = static_cast<T>(guess);
    if (seen >= static_cast<double>(kSmallPart * kWideWindow) &&
        expected_above(sums, probe[2], guess) < kFewAbove) {
      search.start(lower, probe[2]);
      all_sums[row] = sums;
      sampled[row] = static_cast<int32_t>(count);
      return State::kStart;
    }
    search.start(lower, guess);
    return State::kMass;
  }

  // The threshold among `more` times as many keys as those of which these are the sums above t.
  static double guess_among(const Mass<T>& sums, double t, double more) {
    return sums.count > 0 ? power_law_root(t, sums.excess * more, sums.count * more, sums.top) : t;
  }
  // How many of the same keys are above a guess behind t, by the power law of their mass.
  static double expected_above(const Mass<T>& sums, double t, double guess) {
    const double above = sums.top - t;
    if (!(sums.count > 0 && sums.excess > 0 && above > 0 && guess > t)) return sums.count;
    const double power = sums.count * above / sums.excess;
    return sums.count * std::pow(std::max(sums.top - guess, 0.0) / above, power - 1);
  }

  // Rows whose start is kStart go on among the keys of ever larger trees.
  void start_in_trees(std::vector<ThresholdSearch<T>>& search, std::vector<Mass<T>>& sums,
                      std::vector<int32_t>& sampled, int64_t* met) {
    for (size_t n = forest_.levels().size(); n-- > 0;) {
      const int64_t size = forest_.levels()[n].size;
      each_group_of_level(
          forest_.levels()[n],
          [&](int64_t row) {
            if (state_[row] != State::kStart || sampled[row] > size / kGrowth) return false;
            const double more = static_cast<double>(size) / sampled[row];
            record(row)[2] = static_cast<T>(guess_among(sums[row], search[row].tau, more));
            return true;
          },
          [](int64_t) {},
          [&](const TreeView<T>& tree, const TreeRows<T>& group, const int32_t* row) {
            Mass<T> part[kGroup];
            for (int64_t l = 0; l < group.count; ++l)
              part[l] = {0, 0, -std::numeric_limits<T>::infinity()};
            int64_t pairs = 0;
            loops_.mass(tree, group, part, &pairs);
            for (int64_t l = 0; l < group.count; ++l) {
              if (!(part[l].count > 0)) continue;
              part[l].top = std::max(part[l].top, sums[row[l]].top);
              sums[row[l]] = part[l];
              search[row[l]].tau = group.at(l)[2];
              sampled[row[l]] = static_cast<int32_t>(size);
            }
            __atomic_fetch_add(met, pairs, __ATOMIC_RELAXED);
          });
    }
    each_run(visible_.row_end, [&](int64_t row) {
      if (state_[row] != State::kStart) return;
      const double seen = static_cast<double>(seen_by(row));
      const double guess = guess_among(sums[row], search[row].tau, seen / sampled[row]);
      const double lower = search[row].lower();
      search[row] = ThresholdSearch<T>();
      search[row].start(lower, guess);
      state_[row] = State::kMass;
    });
  }

  double visible_pairs() const {
    double sum = 0;
    for (int64_t row = 0; row < visible_.row_end; ++row)
      sum += static_cast<double>(visible_.visible_keys(row));
    return sum;
  }

  // About how many pairs a walk of all rows leaves to be met one by one.
  double probe() const {
    int64_t met = 0;
    for (const TreeLevel<T>& level : forest_.levels())
      for (size_t n = 0; n < level.where.size(); ++n) {
        if (!level.trees[n]) continue;
        const Rectangle<>& where = level.where[n];
        const int64_t groups = ceil_div(where.rows(), kGroup * kProbed);
        each(groups, [&](int64_t group) {
          const int64_t row = where.row_begin + group * kGroup * kProbed;
          each_group_of(
              level.rows.data(), {row, std::min(row + kGroup, where.row_end)},
              [](int64_t) { return true; }, [](int64_t) {},
              [&](const TreeRows<T>& rows, const int32_t*) {
                Mass<T> sums[kGroup] = {};
                int64_t pairs = 0;
                loops_.mass(level.trees[n]->view(), rows, sums, &pairs);
                __atomic_fetch_add(&met, pairs, __ATOMIC_RELAXED);
              });
        });
      }
    return static_cast<double>(met * kProbed);
  }

  // Calls body(tree, rows, numbers) for the groups of chosen rows of every rectangle, level after
  // level, as long as more() holds behind a level; returns whether that was all along. fetch(row)
  // asks for what body will need of a row.
  template <class Chosen, class Fetch, class Body, class More>
  bool each_group(const Chosen& chosen, const Fetch& fetch, const Body& body,
                  const More& more) const {
    for (const TreeLevel<T>& level : forest_.levels()) {
      each_group_of_level(level, chosen, fetch, body);
      if (!more()) return false;
    }
    return true;
  }

  template <class Chosen, class Fetch, class Body>
  void each_group_of_level(const TreeLevel<T>& level, const Chosen& chosen, const Fetch& fetch,
                           const Body& body) const {
    std::vector<Range> items;
    std::vector<const TreeView<T>*> trees;
    for (size_t n = 0; n < level.where.size(); ++n)
      if (level.trees[n])
        for (int64_t row = level.where[n].row_begin; row < level.where[n].row_end;
             row += kRowsAtOnce) {
          items.push_back({row, std::min(row + kRowsAtOnce, level.where[n].row_end)});
          trees.push_back(&level.trees[n]->view());
        }
    each(items.size(), [&](int64_t item) {
      each_group_of(
          level.rows.data(), items[item], chosen, fetch,
          [&](const TreeRows<T>& group, const int32_t* row) { body(*trees[item], group, row); });
    });
  }

  template <class Chosen, class Fetch, class Body>
  void each_group_of(const int32_t* order, Range range, const Chosen& chosen, const Fetch& fetch,
                     const Body& body) const {
    const auto records = room<T>(kGroup * stride_);
    int32_t row[kGroup];
    int64_t count = 0;
    const auto hand_over = [&] {
      if (count > 0) body(TreeRows<T>{records.get(), stride_, count}, row);
      count = 0;
    };
    for (int64_t n = range.first; n < range.last; ++n) {
      if (n + kAhead < range.last && chosen(order[n + kAhead])) {
        prefetch(record(order[n + kAhead]), stride_);
        fetch(order[n + kAhead]);
      }
      if (!chosen(order[n])) continue;
      row[count] = order[n];
      std::copy_n(record(order[n]), stride_, &records[count * stride_]);
      if (++count == kGroup) hand_over();
    }
    hand_over();
  }

  void key_gradients(const MassGradients& out) const {
    const int64_t value_dim = s_.value_dim, keys = visible_.key_end;
    const auto own = room<double>(s_.values ? 0 : keys * value_dim);
    double* const values = s_.values ? out.values : own.get();
    if (!s_.values) std::fill_n(values, keys * value_dim, 0.0);
    if (visible_.causal)
      each(ceil_div(keys, kTreeBase), [&](int64_t block) {
        const Range range = tile_range(block, kTreeBase, keys);
        const int64_t row = row_at(visible_, range.first);
        const int64_t end = row_at(visible_, (block + 1) * kTreeBase);
        if (row >= end) return;
        const auto records = room<T>((end - row) * stride_);
        for (int64_t n = row; n < end; ++n)
          std::copy_n(record(forest_.place_of_row(n)), stride_, &records[(n - row) * stride_]);
        loops_.run_key_gradient(keys_from(range.first), range.last - range.first,
                                {records.get(), stride_, end - row},
                                row + visible_.shift + 1 - range.first, out.key + 2 * range.first,
                                values + value_dim * range.first);
      });
    for (const TreeLevel<T>& level : forest_.levels()) {
      const int64_t count = level.where.size();
      const auto gather = [&](int64_t index) {
        if (level.trees[index])
          gather_keys(*level.trees[index], level.rows.data(), level.where[index], out.key, values);
      };
      if (count >= thread_count())
        each(count, gather);
      else
        for (int64_t index = 0; index < count; ++index) gather(index);
    }
    if (!s_.values)
      for (int64_t n = 0; n < 2 * keys; ++n) out.key[n] += values[n];
  }

  // What the keys of a tree get from the rows of a rectangle: subtree after subtree, so that each
  // sum has one thread and one order.
  void gather_keys(const KeyTree<T>& tree, const int32_t* order, const Rectangle<>& where,
                   double* point, double* values) const {
    const TreeView<T>& view = tree.view();
    const int64_t numbers = view.leaf(view.first[1]);
    const auto pairs = room<double>(numbers);
    const auto nodes = room<double>(view.nodes() * view.width);
    int height = view.height;
    while (height > 0 && view.first[height] - view.first[height - 1] <= kSubtrees) --height;
    const int32_t first = view.first[height], roots = view.first[height + 1] - first;
    std::fill_n(pairs.get(), numbers, 0.0);
    std::fill_n(nodes.get(), view.nodes() * view.width, 0.0);
    const TreeGradients sums{pairs.get(), nodes.get()};
    // The rows in their order, for every thread.
    const auto records = room<T>(where.rows() * stride_);
    each(ceil_div(where.rows(), kRowsAtOnce), [&](int64_t tile) {
      const Range range = tile_range(tile, kRowsAtOnce, where.rows());
      for (int64_t n = range.first; n < range.last; ++n) {
        const int32_t* const row = order + where.row_begin + n;
        if (n + kAhead < range.last) prefetch(record(row[kAhead]), stride_);
        std::copy_n(record(*row), stride_, &records[n * stride_]);
      }
    });
    const int64_t threads = thread_count();
    const int64_t parts = threads > 1 ? std::min<int64_t>(roots, 2 * threads) : 1;
    each(parts, [&](int64_t part) {
      const int32_t from = first + static_cast<int32_t>(roots * part / parts);
      const int32_t to = first + static_cast<int32_t>(roots * (part + 1) / parts);
      for (int64_t n = 0; n < where.rows(); n += kGroup)
        loops_.key_gradient(
            view, {&records[n * stride_], stride_, std::min<int64_t>(kGroup, where.rows() - n)},
            height, from, to, sums);
      loops_.hand_down(view, sums, height, from, to, tree.order(), tree.count(), point, values);
    });
  }

  const TreeLoops<T>& loops_;
  const Sequence<T>& s_;
  const Visibility visible_;
  const Forest<T> forest_;
  int64_t stride_ = 0;
  std::unique_ptr<T[]> records_;
  std::vector<State> state_;
};

template <class T>
bool applies(const SweepLoops<T>& loops, const Sequence<T>& s, bool backward) {
  const Visibility& visible = s.visibility;
  const int64_t rows = visible.row_end, keys = visible.key_end;
  const int64_t positions = rows + visible.shift;
  if ((visible.causal ? positions - 1 : std::min(rows, keys)) < kTreeBase || rows == 0 || keys == 0)
    return false;
  bool fine = loops.all_tame(s.query_x, rows) && loops.all_tame(s.query_y, rows) &&
              loops.all_tame(s.key_x, keys) && loops.all_tame(s.key_y, keys);
  if (s.values)
    for (int64_t j = 0; j < keys && fine; ++j)
      fine = loops.all_tame(s.values + j * s.value_stride, s.value_dim);
  if (backward) {
    fine = fine && loops.all_tame(s.limit, rows);
    for (int64_t c = 0; c < s.value_dim && fine; ++c)
      fine = loops.all_tame(s.grad + c * s.row_stride, rows);
  }
  return fine;
}

}  // namespace

template <class T>
bool tree_forward(const Loops<T>& loops, const Sequence<T>& s, const MassRows<T>& out) {
  if (!applies(loops.sweep, s, false)) return false;
  return MassTree<T>(loops, s).forward(out);
}

template <class T>
bool tree_backward(const Loops<T>& loops, const Sequence<T>& s, const MassGradients& out) {
  if (!applies(loops.sweep, s, true)) return false;
  return MassTree<T>(loops, s).backward(out);
}

template bool tree_forward(const Loops<float>&, const Sequence<float>&, const MassRows<float>&);
template bool tree_forward(const Loops<double>&, const Sequence<double>&, const MassRows<double>&);
template bool tree_backward(const Loops<float>&, const Sequence<float>&, const MassGradients&);
template bool tree_backward(const Loops<double>&, const Sequence<double>&, const MassGradients&);

}  // namespace qflux::cpu
