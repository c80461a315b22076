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

#include "../../math/mass.h"
#include "../isa/tree.h"

namespace qflux::cpu {

// Below the root by the largest z among some keys: one less, or more where rounding would leave
// nothing of it.
template <class T>
double mass_bound(T top) {
  const double coarse = std::abs(double(top)) * double(mass_tolerance<T>());
  return double(top) - std::max(1.0, coarse);
}

template <class T>
class ThresholdSearch {
 public:
  // Where to evaluate F next: at tau + rest, over the keys above tau.
  T tau = 0, rest = 0;

  // `lower` is a bound on the root with keys above it.
  void start(double lower, double guess) {
    lower_ = lower;
    move(guess > lower ? guess : lower);
    // Rounding must not lose the only key above.
    if (!(guess > lower) && tau > lower) tau = std::nextafter(tau, -kInfinity), rest = 0;
  }

  // Takes F and N. True: that was the root, up to rounding; false: evaluate again.
  bool update(const Mass<T>& at) {
    ++steps_;
    const double here = double(tau) + rest;
    if (!(at.count > 0)) {
      if (steps_ > kMost) return true;
      if (tau <= static_cast<T>(lower_)) {
        // Products coarser than a weight: from just below the largest all of a step is the rest.
        coarse_ = true;
        tau = std::nextafter(tau, -kInfinity);
        rest = 0;
        return false;
      }
      highest_ = here;
      const double middle = (lower_ + here) / 2;
      move(middle < here && steps_ < kBold ? middle : lower_);
      return false;
    }
    const double excess = at.excess - 1, step = excess / at.count;
    if (std::abs(excess) <= double(mass_tolerance<T>()) || steps_ > kMost) return true;
    if (coarse_) {
      if (settled_) return true;
      rest += static_cast<T>(step);
      settled_ = true;
      changing_ = 0;
      return false;
    }
    if (here + step > lower_) lower_ = here + step;
    careful_ = careful_ || std::abs(excess) < kNear || steps_ > kBold;
    // Keys that the next step is likely to drop. What they leave of the excess is its square over
    // four where they are spread evenly, and none count where that is rounding.
    changing_ =
        excess * excess <= 4 * double(mass_tolerance<T>()) ? 0 : at.count * std::abs(excess);
    double next = lower_;
    if (!careful_) {
      const double top = std::min<double>(at.top, highest_);
      const double guess = power_law_root(here, at.excess, at.count, top);
      if (guess > next && guess < top) next = guess;
      changing_ = at.count;
    }
    // The same keys a second time: rounding is all that is left.
    const T before = tau;
    const bool again = settled_;
    move(next);
    settled_ = tau == before;
    return settled_ && again;
  }

  // Whether the next evaluation is likely to be the last.
  bool near() const { return changing_ < 0.5; }
  double lower() const { return lower_; }

 private:
  void move(double to) {
    tau = static_cast<T>(to);
    rest = static_cast<T>(to - tau);
  }

  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr double kNear = 0.05;
  static constexpr int kBold = 8, kMost = 100;

  double lower_ = 0, highest_ = kInfinity, changing_ = kInfinity;
  int steps_ = 0;
  bool careful_ = false, settled_ = false, coarse_ = false;
};

}  // namespace qflux::cpu
