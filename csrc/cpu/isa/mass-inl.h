// The thresholds of rows whose weights sum to one, by Newton's steps (math/mass.h): a row in each
// lane, as everything in dense-inl.h.
//
// Long rows take their first steps on a sample of their keys, so that few are left for all of them.
// The second of these finds which keys no row of the group can keep, and they are met no more.
// Neither changes what a lane adds up, which depends on its own row alone.
#pragma once

#include "../../math/mass.h"
#include "owners-inl.h"

namespace qflux::cpu {
namespace {
namespace mass {

using namespace dense;

// Of so many keys one is in the sample, if every row of the group sees so many.
constexpr int64_t kSampled = 8, kSampledFrom = 128;
constexpr int kSampleSteps = 6;

// Room for the list of a group's keys.
struct Room {
  explicit Room(int64_t keys) : list(keys + 1), tiles(keys / kTile + 2) {}
  const Array<int64_t> list, tiles;
};

// What the pairs of each lane have above tau, and how many do.
template <class T>
struct Excess {
  Vector<T> mass[kVectors], count[kVectors];

  QFLUX_INLINE Excess() {
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA { mass[r] = count[r] = Vector<T>(T(0)); });
  }
  template <class Index>
  QFLUX_INLINE void add(Index r, Mask<T> above, Vector<T> difference) {
    mass[r] = add_where(above, difference, mass[r]);
    count[r] = add_where(above, Vector<T>(T(1)), count[r]);
  }
  // Sums of the sums of tiles.
  QFLUX_INLINE void add(const Excess& tile) {
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      mass[r] = mass[r] + tile.mass[r];
      count[r] = count[r] + tile.count[r];
    });
  }
};

// A group of rows on the way to its thresholds.
template <class T>
class Solver {
  using V = Vector<T>;

 public:
  Solver(const Sequence<T>& s, Group<T>& group, const Room& room)
      : s_(s), group_(group), room_(room), sampled_(group.common_end >= kSampledFrom) {
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      x_[r] = load(s.query_x + group.start(r));
      y_[r] = load(s.query_y + group.start(r));
      rest_[r] = V(T(0));
    });
  }

  void solve(const ForwardBlock<T>& out) {
    begin();
    if (sampled_) sample();
    finish();
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      store(out.limit + group_.start(r), tau_[r]);
      store(out.limit_rest + group_.start(r), rest_[r]);
    });
  }

 private:
  // The group's queries against a key, and its pairs above tau. As a value, since what a pass
  // writes could be a member for all that a compiler knows.
  struct Pairs {
    const T *key_x, *key_y;
    V x[kVectors], y[kVectors], tau[kVectors];

    template <class Index>
    QFLUX_INLINE V operator()(Index r, int64_t j) const {
      return inner_product(x[r], y[r], V(key_x[j]), V(key_y[j]), V(T(0)));
    }
  };
  QFLUX_INLINE Pairs pairs() const {
    return {s_.key_x, s_.key_y, {x_[0], x_[1]}, {y_[0], y_[1]}, {tau_[0], tau_[1]}};
  }
  template <class Body>
  QFLUX_INLINE void each_sampled(const Body& body) const {
    for (int64_t j = 0; j < group_.common_end; j += kSampled)
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { body(r, j, nullptr); });
  }

  // tau: the largest pair of some less one, which is a lower bound; zero if there is none. Less
  // more than one where rounding would leave nothing of it.
  void begin() {
    const V none(static_cast<T>(-__builtin_inf())), zero(T(0)), one(T(1));
    V most[kVectors] = {none, none};
    const Pairs pair = pairs();
    const auto meet = [&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
      V p = pair(r, j);
      if (visible) p = select(*visible, p, none);
      most[r] = select(less(most[r], p), p, most[r]);
    };
    if (sampled_)
      each_sampled(meet);
    else
      each_key(group_, 0, group_.highest(), meet);
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      const V coarse = absolute(most[r]) * V(static_cast<T>(sizeof(T) == 4 ? 0x1p-21 : 0x1p-50));
      const V least = most[r] - select(less(one, coarse), coarse, one);
      tau_[r] = least_[r] = select(less(none, most[r]), least, zero);
    });
  }

  // tau: where a share of the keys has that share of the mass, below or above the solution.
  void sample() {
    const int64_t keys = group_.common_end;
    const V share(static_cast<T>((keys + kSampled - 1) / kSampled) / static_cast<T>(keys));
    for (int step = 0; step < kSampleSteps; ++step) {
      Excess<T> e;
      const Pairs pair = pairs();
      each_sampled([&](auto r, int64_t j, const Mask<T>*) QFLUX_INLINE_LAMBDA {
        const V p = pair(r, j);
        e.add(r, not_less_equal(p, pair.tau[r]), p - pair.tau[r]);
      });
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        const V next = tau_[r] + (e.mass[r] - share) / e.count[r];
        tau_[r] = select(both(less(V(T(0)), e.count[r]), less(tau_[r], next)), next, tau_[r]);
      });
    }
  }

  enum Pass { kFindsPoison, kMakesList, kUsesList };

  template <Pass kPass>
  Excess<T> pass() {
    const V zero(T(0));
    V poison[kVectors] = {zero, zero};
    Excess<T> all;
    const Pairs pair = pairs();
    for (int64_t tile = 0; tile < group_.highest(); tile += kTile) {
      Excess<T> part;
      const auto meet = [&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V p = pair(r, j);
        const Mask<T> above = kept_and_visible(not_less_equal(p, pair.tau[r]), visible);
        part.add(r, above, p - pair.tau[r]);
        if constexpr (kPass == kFindsPoison) poison[r] = add_visible(visible, p, zero, poison[r]);
        return lane_bits(above);
      };
      if constexpr (kPass == kMakesList) {
        const int64_t end = lesser(tile + kTile, group_.common_end);
        room_.tiles[tile / kTile] = listed_;
        for (int64_t j = tile; j < end; ++j) {
          uint32_t any = 0;
          each_vector([&](auto r) QFLUX_INLINE_LAMBDA { any |= meet(r, j, nullptr); });
          room_.list[listed_] = j;
          listed_ += any != 0;
        }
        room_.tiles[tile / kTile + 1] = listed_;
        each_key(group_, greater(tile, group_.common_end), tile + kTile, meet);
      } else {
        each_key<false, kPass == kUsesList>(group_, tile, tile + kTile, meet);
      }
      all.add(part);
    }
    // What is not finite makes the row undefined.
    if constexpr (kPass == kFindsPoison)
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { all.mass[r] = all.mass[r] + poison[r]; });
    return all;
  }

  void finish() {
    Steps steps(least_);
    // From the second step on tau only rises, so that a list stays complete.
    Excess<T> e = pass<kFindsPoison>();
    while (step(e, steps))
      if (group_.list) {
        e = pass<kUsesList>();
      } else {
        e = pass<kMakesList>();
        group_.list = room_.list.get();
        group_.tiles = room_.tiles.get();
      }
  }

  // What the steps taken have left: the lanes that are not done, and of the last one the count,
  // where it was taken from and how far it went.
  struct Steps {
    int taken = 0;
    Mask<T> active[kVectors];
    V count[kVectors], from[kVectors], size[kVectors];

    explicit Steps(const V* least) {
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        active[r] = lanes_between<T>(0, V::kWidth);
        count[r] = V(T(-1));
        from[r] = least[r];
        size[r] = V(T(0));
      });
    }
  };

  // A step of the lanes that are active; returns whether one still is. A lane that is done stays
  // as it is: how long others take must not show.
  bool step(const Excess<T>& e, Steps& steps) {
    const V zero(T(0)), near(static_cast<T>(sizeof(T) == 4 ? 0x1p-21 : 0x1p-50));
    uint32_t left = 0;
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      const Mask<T> some = less(zero, e.count[r]), active = steps.active[r];
      const V excess = e.mass[r] - V(T(1)), size = excess / e.count[r];
      V next = tau_[r] + size;
      next = select(less(next, least_[r]), least_[r], next);
      V rest = size - (next - tau_[r]);
      // A start above the solution may keep nothing, and a step to it may where rounding is
      // coarser than a weight: then all of the step is the rest. The mass is zero, or NaN.
      next = select(some, next, steps.from[r] + e.mass[r]);
      rest = select(some, rest, steps.size[r]);
      Mask<T> going = both(less(near, absolute(excess)), unequal(e.count[r], steps.count[r]));
      if (steps.taken > 0) going = both(going, some);
      if (steps.taken > 1) going = both(going, less(e.count[r], steps.count[r]));
      steps.from[r] = select(both(active, some), tau_[r], steps.from[r]);
      steps.size[r] = select(both(active, some), size, steps.size[r]);
      steps.count[r] = e.count[r];
      tau_[r] = select(active, next, tau_[r]);
      rest_[r] = select(active, rest, rest_[r]);
      steps.active[r] = both(active, going);
      left |= lane_bits(steps.active[r]);
    });
    ++steps.taken;
    return left != 0;
  }

  const Sequence<T>& s_;
  Group<T>& group_;
  const Room& room_;
  int64_t listed_ = 0;
  const bool sampled_;
  V x_[kVectors], y_[kVectors], tau_[kVectors], rest_[kVectors], least_[kVectors];
};

// Whether all values of so many keys are finite.
template <class T>
bool finite_values(const Sequence<T>& s, int64_t keys) {
  if (!s.values) return true;
  T poison[8] = {};
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t c = 0; c < s.value_dim; ++c) poison[c & 7] += s.values[j * s.value_stride + c] * 0;
  T sum = 0;
  for (T part : poison) sum += part;
  return sum == 0;
}

// The thresholds of a block of rows, if they are not there already.
template <bool kMass, class T>
struct Thresholds {
  Thresholds(const Sequence<T>&, int64_t, const ForwardBlock<T>&) {}
  void find(Group<T>&) const {}
};
template <class T>
class Thresholds<true, T> {
 public:
  Thresholds(const Sequence<T>& s, int64_t last, const ForwardBlock<T>& out)
      : s_(s),
        out_(out),
        room_(s.visibility.visible_keys(last - 1)),
        finite_(finite_values(s, s.visibility.visible_keys(last - 1))) {}

  // Those of a group of rows, which gets its list. A value that is not finite has to show even
  // where its key is not kept.
  void find(Group<T>& group) {
    Solver<T>(s_, group, room_).solve(out_);
    if (!finite_) group.list = nullptr;
  }

 private:
  const Sequence<T>& s_;
  const ForwardBlock<T>& out_;
  const Room room_;
  const bool finite_;
};

// The gradients of the n-th row of a block, from its sums.
template <class T>
void take_row(const MassSums<double>& sums, int64_t n, const BackwardBlock<T>& out) {
  const Point<double> grad = mass_query_vjp(sums);
  out.point[2 * n] = static_cast<T>(grad.x);
  out.point[2 * n + 1] = static_cast<T>(grad.y);
  out.limit[n] = static_cast<T>(-mass_mean(sums));
}

}  // namespace mass
}  // namespace
}  // namespace qflux::cpu
