// The search for the threshold of one row whose weights sum to one.
//
// F(t) = sum max(z - t, 0) is convex, piecewise linear and falls with slope -N, the number of keys
// above t. Newton's step from any t with N > 0 ends at or below the root; from below it climbs to
// the root's own piece in finitely many steps. Far from it the steps of a power law, to which F is
// close near its end at the largest z, are longer.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../isa/tree.h"

namespace qflux::cpu {

template <class T>
class ThresholdSearch {
 public:
  T tau = 0;  // where to evaluate F next

  // `lower` is a bound on the root with keys above it.
  void start(double lower, double guess) {
    lower_ = lower;
    tau = static_cast<T>(guess > lower ? guess : lower);
    // Rounding must not lose the only key above.
    if (double(tau) > lower && !(guess > lower)) tau = std::nextafter(tau, -kInfinity);
  }

  // Takes F and N at tau. True: tau is the root, up to rounding; false: evaluate again.
  bool update(const Mass<T>& at) {
    ++steps_;
    constexpr double kUnit = std::numeric_limits<T>::epsilon();
    const double here = tau;
    if (!(at.count > 0)) {
      if (tau <= lower_ || steps_ > kMost) return true;
      highest_ = here;
      const T middle = static_cast<T>((lower_ + here) / 2);
      tau = middle < tau && steps_ < kBold ? middle : static_cast<T>(lower_);
      return false;
    }
    const double step = (at.excess - 1) / at.count;
    if (std::abs(step) <= kUnit * (std::abs(here) + 2 / at.count) || steps_ > kMost) return true;
    const double bound = here + step;
    if (bound > lower_) lower_ = bound;
    careful_ = careful_ || std::abs(at.excess - 1) < kNear || steps_ > kBold;
    // Keys that the next step is likely to drop.
    changing_ = at.count * (at.excess - 1) * (at.excess - 1);
    double next = lower_;
    if (!careful_) {
      const double top = std::min<double>(at.top, highest_);
      const double guess = power_law_root(here, at.excess, at.count, top);
      if (guess > next && guess < top) next = guess;
      changing_ = at.count;
    }
    const T rounded = static_cast<T>(next);
    if (rounded == tau) return true;
    // From below Newton only climbs; where rounding turns it back, it has arrived.
    if (rounded < tau && step > 0) return true;
    tau = rounded;
    return false;
  }

  // Whether the next evaluation is likely to be the last.
  bool near() const { return changing_ < 0.5; }
  double lower() const { return lower_; }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr double kNear = 0.5;
  static constexpr int kBold = 8, kMost = 100;

  double lower_ = 0, highest_ = kInfinity, changing_ = kInfinity;
  int steps_ = 0;
  bool careful_ = false;
};

}  // namespace qflux::cpu
