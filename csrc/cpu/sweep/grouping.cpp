#include "grouping.h"

#include <algorithm>
#include <cmath>

namespace qflux::cpu {
namespace {

// Costs in units of one pair of the dense loop, measured: a key's arcs, moments and list entries; a
// row's angle and sorting.
constexpr double kKeyCost = 900, kRowCost = 600;
// Rows of one rectangle are split into at most so many groups.
constexpr int kMostGroups = 16;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

std::vector<RowGroup> group_rows(const double* low, const double* high, int64_t rows,
                                 int64_t keys) {
  const int64_t step = std::max<int64_t>(rows / std::clamp<int64_t>(rows / 16, 128, 2048), 1);
  std::vector<double> sample;
  double slack = 0, least = kInfinity, most = -kInfinity;
  for (int64_t n = 0; n < rows; ++n) {
    const double middle = (low[n] + high[n]) / 2;
    if (!std::isfinite(middle)) continue;
    least = std::min(least, middle);
    most = std::max(most, middle);
    if (n % step == 0) {
      sample.push_back(middle);
      slack += high[n] - low[n];
    }
  }
  if (sample.size() < 2) return {{-kInfinity, true}};
  slack /= sample.size();
  std::sort(sample.begin(), sample.end());
  const int64_t last = sample.size() - 1;
  // Cuts: fine at the ends, where outliers are, coarse between.
  std::vector<int64_t> cuts{0};
  for (int64_t n = 1; n < last / 16; n *= 2) cuts.push_back(n);
  for (int64_t n = 1; n < 16; ++n) cuts.push_back(last * n / 16);
  for (int64_t n = 1; n < last / 16; n *= 2) cuts.push_back(last - n);
  cuts.push_back(last);
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());

  // Edges of h: the extremes of all rows, and the cuts between.
  std::vector<double> edge{least};
  std::vector<double> rank{0};
  for (const int64_t cut : cuts)
    if (sample[cut] > edge.back() && sample[cut] < most) {
      edge.push_back(sample[cut]);
      rank.push_back(double(cut) / last * rows);
    }
  edge.push_back(most);
  rank.push_back(double(rows));
  const int count = static_cast<int>(edge.size());
  std::vector<double> best(count, kInfinity);
  std::vector<int> from(count, 0), groups(count, 0);
  std::vector<bool> dense(count, false);
  best[0] = 0;
  for (int end = 1; end < count; ++end)
    for (int begin = 0; begin < end; ++begin) {
      // The first and last sampled rows stand for the unsampled ones beyond them.
      const double members = std::max(rank[end] - rank[begin], double(step));
      // The density of the keys' whitened offsets is nowhere much above 0.4.
      const double band = std::min(1.0, 0.4 * (edge[end] - edge[begin] + slack));
      const double by_arcs = keys * kKeyCost + members * kRowCost +
                             members * keys * band * (1 + kEntryCost / double(kRankBlock));
      const double by_pairs = members * keys;
      const bool pairs = by_pairs <= by_arcs || groups[begin] >= kMostGroups;
      const double cost = best[begin] + std::min(by_pairs, pairs ? by_pairs : by_arcs);
      if (cost < best[end]) {
        best[end] = cost;
        from[end] = begin;
        dense[end] = pairs;
        groups[end] = groups[begin] + !pairs;
      }
    }
  std::vector<RowGroup> chosen;
  for (int end = count - 1; end > 0; end = from[end])
    chosen.push_back({from[end] == 0 ? -kInfinity : edge[from[end]], dense[end]});
  std::reverse(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace qflux::cpu
