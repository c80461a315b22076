// The thresholds of rows whose weights sum to one, by Newton's steps (math/mass.h): a row in each
// lane, as everything in dense-inl.h.
//
// Long rows take their first steps on a sample of their keys, so that few are left for all of them.
// Of these one finds, where few keys are kept, those that no row of the group can keep, and they
// are met no more. The last is the forward itself, which adds up what a pass would. None of it
// changes what a lane adds up, which depends on its own row alone.
#pragma once

#include "../../math/mass.h"
#include "owners-inl.h"

namespace qflux::cpu {
namespace {
namespace mass {

using namespace dense;

// Of so many keys one is in the sample, if every row of the group sees so many.
constexpr int64_t kSampled = 8, kSampledFrom = 128;
constexpr int kSampleSteps = 3, kBoldSteps = 2;
// Of the mass of the sample: what more steps would gain, the sample does not know.
constexpr double kSampleTolerance = 0x1p-3;
// Rows that keep fewer than one of so many keys make a list worth its making, if about one of so
// many keys is missing from it; so many keys say whether.
constexpr int64_t kWorthListing = 4, kMostListed = 4, kAsked = 32;
// Pairs that a step may be expected to drop and yet be taken for the last.
constexpr double kUnlikely = 0x1p-6;
// Bold steps are for more excess than that, and for so many pairs up to half of all. They may lead
// above the threshold, from where two more lead below, and then all steps drop pairs.
constexpr double kBoldBeyond = 0.1, kBoldFrom = 4;
constexpr int kBoldPasses = 3, kFreePasses = kBoldPasses + 3;

// Room for the list of a group's keys.
struct Room {
  explicit Room(int64_t keys) : list(keys + 1), tiles(keys / kTile + 2) {}
  const Array<int64_t> list, tiles;
};

// What the pairs of each lane have above tau, and how many do.
template <class T>
struct Excess {
  Vector<T> mass[kVectors], count[kVectors];
};

// Numbers of lanes, as a sum has them or a counter.
template <class T>
Vector<T> values(const Total<T>& total) {
  T lane[Vector<T>::kWidth];
  for (int l = 0; l < Vector<T>::kWidth; ++l) lane[l] = total.get(l);
  return load(lane);
}
template <class T>
Vector<T> values(const typename Vector<T>::Bits& counter) {
  return __builtin_convertvector(counter, typename Vector<T>::Raw);
}

// A group of rows on the way to its thresholds.
template <class T>
class Solver {
  using V = Vector<T>;

 public:
  // `largest`: the components of no key are greater.
  Solver(const Sequence<T>& s, Group<T>& group, const Room& room, Point<T> largest,
         const ForwardBlock<T>& out)
      : s_(s), group_(group), room_(room), out_(out), sampled_(group.common_end >= kSampledFrom) {
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      x_[r] = load(s.query_x + group.start(r));
      y_[r] = load(s.query_y + group.start(r));
      rest_[r] = V(T(0));
      active_[r] = lanes_between<T>(0, V::kWidth);
      count_[r] = V(T(-1));
      free_[r] = V(T(2));
    });
    begin();
    if (sampled_) sample();
    step(products_are_finite(largest) ? pass<kMeetsAll>() : pass<kFindsPoison>());
    worth_listing_ = worth_listing_ && left_ && list_is_short();
  }

  // The thresholds, or what is likely to be them if `accept` is asked later.
  void solve(bool accepted_later) {
    while (left_ && !(accepted_later && !far_ && (group_.list || !worth_listing_))) {
      if (group_.list) {
        step(pass<kUsesList>());
      } else if (worth_listing_) {
        step(pass<kMakesList>());
        group_.list = room_.list.get();
        group_.tiles = room_.tiles.get();
      } else {
        step(pass<kMeetsAll>());
      }
    }
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      store(out_.limit + group_.start(r), tau_[r]);
      store(out_.limit_rest + group_.start(r), rest_[r]);
    });
  }

  // Whether the thresholds were right, by what the forward has found with them. If not, there are
  // others now.
  bool accept(const Excess<T>& e) {
    if (!left_) return true;
    if (!step(e)) return true;
    solve(true);
    return false;
  }

 private:
  // The group's queries against a key, and its pairs above tau. As a value, since what a pass
  // writes could be a member for all that a compiler knows.
  struct Pairs {
    const T *key_x, *key_y;
    V x[kVectors], y[kVectors], bias[kVectors];

    template <class Index>
    QFLUX_INLINE V operator()(Index r, int64_t j) const {
      return inner_product(x[r], y[r], V(key_x[j]), V(key_y[j]), bias[r]);
    }
  };
  QFLUX_INLINE Pairs pairs(V bias0, V bias1) const {
    return {s_.key_x, s_.key_y, {x_[0], x_[1]}, {y_[0], y_[1]}, {bias0, bias1}};
  }
  QFLUX_INLINE Pairs pairs_above() const { return pairs(V(T(0)) - tau_[0], V(T(0)) - tau_[1]); }
  template <class Body>
  QFLUX_INLINE void each_sampled(const Body& body) const {
    for (int64_t j = 0; j < group_.common_end; j += kSampled)
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { body(r, j, nullptr); });
  }

  bool products_are_finite(Point<T> largest) const {
    uint32_t finite = ~0u;
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      const V bound = absolute(x_[r]) * V(largest.x) + absolute(y_[r]) * V(largest.y);
      finite &= lane_bits(less(bound, V(static_cast<T>(__builtin_inf()))));
    });
    return finite == lane_bits(lanes_between<T>(0, V::kWidth));
  }

  // tau: the largest pair of some less one, which is a lower bound; zero if there is none. Less
  // more than one where rounding would leave nothing of it.
  void begin() {
    const V none(static_cast<T>(-__builtin_inf())), zero(T(0)), one(T(1));
    V most[kVectors] = {none, none};
    const Pairs pair = pairs(zero, zero);
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
      const V coarse = absolute(most[r]) * V(mass_tolerance<T>());
      const V least = most[r] - select(less(one, coarse), coarse, one);
      tau_[r] = lower_[r] = select(less(none, most[r]), least, zero);
    });
  }

  // tau: where a share of the keys has that share of the mass, about.
  void sample() {
    const T keys = static_cast<T>(group_.common_end);
    const T sampled = static_cast<T>((group_.common_end + kSampled - 1) / kSampled);
    const V share(sampled / keys);
    V lower[kVectors] = {lower_[0], lower_[1]};
    uint32_t left = 1;
    for (int step = 0; left && step < kSampleSteps; ++step) {
      V mass[kVectors] = {V(T(0)), V(T(0))};
      typename V::Bits counts[kVectors] = {};
      const Pairs pair = pairs_above();
      each_sampled([&](auto r, int64_t j, const Mask<T>*) QFLUX_INLINE_LAMBDA {
        const V p = pair(r, j);
        const Mask<T> above = not_less_equal(p, V(T(0)));
        mass[r] = add_where(above, p, mass[r]);
        count(above, counts[r]);
      });
      left = 0;
      for (int r = 0; r < kVectors; ++r)
        left |= sample_step(mass[r], values<T>(counts[r]), share,
                            V(step < kBoldSteps ? sampled / 2 : T(0)), tau_[r], lower[r]);
    }
  }
  // A step of one vector, bold if no more than so many pairs are kept: of most, the mass is linear.
  static QFLUX_NO_INLINE uint32_t sample_step(V mass, V count, V share, V bold_up_to, V& tau,
                                              V& lower) {
    const Mask<T> some = less(V(T(0)), count);
    const V each = V(T(1)) / count;
    const V newton = multiply_add(mass - share, each, tau);
    const V further = multiply_add(mass_stride(mass, share), each, tau);
    lower = select(both(some, less(lower, newton)), newton, lower);
    const Mask<T> bold = both(both(some, less(lower, further)), not_less(bold_up_to, count));
    const V next = select(bold, further, lower);
    const Mask<T> going = less(share * V(static_cast<T>(kSampleTolerance)), absolute(mass - share));
    tau = select(going, next, tau);
    return lane_bits(going);
  }

  // By keys at even distances: a single row that keeps nearly all would make a long list.
  bool list_is_short() const {
    const Pairs pair = pairs(V(T(0)) - lower_[0], V(T(0)) - lower_[1]);
    const int64_t stride = group_.common_end / kAsked + 1;
    int64_t asked = 0, listed = 0;
    for (int64_t j = 0; j < group_.common_end; j += stride, ++asked) {
      uint32_t any = 0;
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
        any |= lane_bits(not_less_equal(pair(r, j), V(T(0))));
      });
      listed += any != 0;
    }
    return listed * kMostListed < asked * (kMostListed - 1);
  }

  enum Pass { kFindsPoison, kMeetsAll, kMakesList, kUsesList };

  template <Pass kPass>
  Excess<T> pass() {
    const V zero(T(0));
    V poison[kVectors] = {zero, zero};
    // As the forward adds them up.
    Total<T> totals[1][kVectors];
    typename V::Bits counts[kVectors] = {};
    const V lower[kVectors] = {lower_[0] - tau_[0], lower_[1] - tau_[1]};
    const Pairs pair = pairs_above();
    for (int64_t tile = 0; tile < group_.highest(); tile += kTile) {
      V mass[1][kVectors] = {{zero, zero}};
      const auto meet = [&](auto r, int64_t j, const Mask<T>* visible) QFLUX_INLINE_LAMBDA {
        const V p = pair(r, j);
        const Mask<T> above = kept_and_visible(not_less_equal(p, zero), visible);
        mass[0][r] = add_where(above, p, mass[0][r]);
        count(above, counts[r]);
        if constexpr (kPass == kFindsPoison) poison[r] = add_visible(visible, p, zero, poison[r]);
        return kPass == kMakesList ? lane_bits(not_less_equal(p, lower[r])) : 0;
      };
      if constexpr (kPass == kMakesList) {
        if (tile == 0) listed_ = 0;
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
      add_parts(totals, mass);
    }
    Excess<T> sum;
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      sum.mass[r] = values(totals[0][r]);
      sum.count[r] = values<T>(counts[r]);
    });
    // What is not finite makes the row undefined.
    if constexpr (kPass == kFindsPoison)
      each_vector([&](auto r) QFLUX_INLINE_LAMBDA { sum.mass[r] = sum.mass[r] + poison[r]; });
    return sum;
  }

  // A step of the lanes that are not done, from the excess at tau; returns whether one has moved. A
  // lane that is done stays as it is: how long others take must not show.
  QFLUX_NO_INLINE bool step(const Excess<T>& e) {
    const V zero(T(0)), one(T(1)), two(T(2)), infinite(static_cast<T>(__builtin_inf()));
    const V near(mass_tolerance<T>()), again = near * V(T(4));
    const V bold_beyond(static_cast<T>(kBoldBeyond)), bold_from(static_cast<T>(kBoldFrom));
    const V bold_up_to(taken_ < kBoldPasses ? static_cast<T>(group_.common_end) / 2 : T(0));
    uint32_t moved = 0, retreats = 0;
    V counts(T(0));
    left_ = far_ = 0;
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      const V count = e.count[r];
      const Mask<T> some = less(zero, count);
      // At tau + rest, where the weights are taken from.
      const V excess = e.mass[r] - count * rest_[r] - one, off = absolute(excess);
      const V enough = select(unequal(count, count_[r]), near, again);
      const Mask<T> active = both(active_[r], not_less_equal(off, enough));
      const Mask<T> taken = both(active, some);
      moved |= lane_bits(active);
      const V newton = rest_[r] + excess / count;
      // Rounding must not lift a bound to the largest pair.
      const V bound = tau_[r] + newton - near / two * absolute(tau_[r]);
      lower_[r] = select(both(taken, less(lower_[r], bound)), bound, lower_[r]);
      const V stride = mass_stride(e.mass[r], one) / count;
      const Mask<T> bold = both(both(not_less(count, bold_from), not_less(bold_up_to, count)),
                                both(less(bold_beyond, off), less(lower_[r], tau_[r] + stride)));
      const V size = select(bold, stride, newton);
      V next = tau_[r] + size;
      next = select(less(next, lower_[r]), lower_[r], next);
      V rest = size - (next - tau_[r]);
      // Newton's steps from below drop keys, or rounding is all that is left; others may do
      // anything, but not for ever. One that keeps nothing, which rounding coarser than a weight
      // does, goes back to the bound once.
      const V was = taken_ < kFreePasses ? free_[r] : zero;
      const Mask<T> none = not_less(zero, count);
      const V reasons = where(both(some, less(count, count_[r])), one) +
                        where(both(some, less(zero, was)), one) + where(none, one);
      const V free = select(less(two, free_[r]), zero, reasons);
      const Mask<T> going = both(less(near, off), less(zero, free));
      // The last step is one of rounding, which must not lead to the largest pair: all of it is the
      // rest. Where nothing is kept the mass is zero, or NaN.
      const Mask<T> last = both(both(some, not_less(zero, free)), less(off, infinite));
      next = select(last, tau_[r], select(some, next, lower_[r] + e.mass[r]));
      rest = select(last, size, where(some, rest));
      retreats |= lane_bits(both(active, less(next, lower_[r])));
      free_[r] = select(none, select(not_less(was, two), one, two + one),
                        select(bold, two, where(less(excess, zero), one)));
      count_[r] = count;
      tau_[r] = select(active, next, tau_[r]);
      rest_[r] = select(active, rest, rest_[r]);
      active_[r] = both(active, going);
      left_ |= lane_bits(active_[r]);
      // A step from so near leaves less than is near, or drops no pair.
      const Mask<T> far = both(less(near, off * off), less(V(T(kUnlikely)), off * count));
      far_ |= lane_bits(both(active_[r], far));
      counts = counts + count;
    });
    if (taken_ == 0) {
      T lane[V::kWidth], sum = 0;
      store(lane, counts);
      for (T count : lane) sum += count;
      worth_listing_ = sum * kWorthListing < static_cast<T>(Group<T>::kOwners * group_.highest());
    }
    // The list is of the keys above the bounds.
    if (retreats) {
      group_.list = nullptr;
      worth_listing_ = false;
    }
    ++taken_;
    return moved != 0;
  }

  const Sequence<T>& s_;
  Group<T>& group_;
  const Room& room_;
  const ForwardBlock<T>& out_;
  int64_t listed_ = 0;
  const bool sampled_;
  bool worth_listing_ = false;
  // Lanes that are not done, and those of them that the next step is not likely to end.
  uint32_t left_ = 0, far_ = 0;
  int taken_ = 0;
  Mask<T> active_[kVectors];
  V x_[kVectors], y_[kVectors], tau_[kVectors], rest_[kVectors];
  V lower_[kVectors];  // bounds of the thresholds
  // Of the last step: the pairs that were kept, and whether it may have led above the threshold
  // (one: then the next leads below; two: it was bold) or was back to the bound (three).
  V count_[kVectors], free_[kVectors];
};

// A record of kColumns numbers, which is shorter than a vector.
template <class T>
struct Columns;
template <>
struct Columns<float> {
  typedef float Raw __attribute__((vector_size(kColumns * sizeof(float))));
};
template <>
struct Columns<double> {
  typedef double Raw __attribute__((vector_size(kColumns * sizeof(double))));
};

// Whether all values of so many keys are finite. Sums of zeros, in as many chains as hide what an
// addition takes.
template <class T>
bool finite_values(const Sequence<T>& s, int64_t keys) {
  if (!s.values) return true;
  using Part = typename Columns<T>::Raw;
  constexpr int64_t kChains = 8;
  Part chain[kChains] = {};
  T rest = 0;
  const auto add = [&](const T* from, Part& to) QFLUX_INLINE_LAMBDA {
    Part part;
    __builtin_memcpy(&part, from, sizeof(part));
    to += part * 0;
  };
  int64_t column = 0;
  for (; column + kColumns <= s.value_dim; column += kColumns) {
    const T* value = s.values + column;
    int64_t j = 0;
    for (; j + kChains <= keys; j += kChains)
      for (Part& sum : chain) {
        add(value, sum);
        value += s.value_stride;
      }
    for (; j < keys; ++j, value += s.value_stride) add(value, chain[0]);
  }
  for (; column < s.value_dim; ++column)
    for (int64_t j = 0; j < keys; ++j) rest += s.values[j * s.value_stride + column] * 0;
  for (const Part& sum : chain)
    for (int c = 0; c < kColumns; ++c) rest += sum[c];
  return rest == 0;
}

// The largest magnitude of either component of so many keys, whose planes are padded with zeros; or
// NaN.
template <class T>
Point<T> largest(const Sequence<T>& s, int64_t keys) {
  using V = Vector<T>;
  const T* const plane[2] = {s.key_x, s.key_y};
  V most[2] = {V(T(0)), V(T(0))}, poison[2] = {V(T(0)), V(T(0))};
  for (int64_t n = 0; n < keys; n += V::kWidth)
    for (int c = 0; c < 2; ++c) {
      const V size = absolute(load(plane[c] + n));
      most[c] = select(less(most[c], size), size, most[c]);
      poison[c] = multiply_add(size, V(T(0)), poison[c]);
    }
  T all[2] = {0, 0};
  for (int c = 0; c < 2; ++c) {
    T lane[V::kWidth];
    store(lane, most[c] + poison[c]);
    for (T size : lane) all[c] = size > all[c] || size != size ? size : all[c];
  }
  return {all[0], all[1]};
}

// What the rows of a block share on the way to their thresholds.
template <class T>
struct Block {
  const Sequence<T>& s;
  const ForwardBlock<T>& out;
  const int64_t keys;
  const Room room;
  const bool finite;
  const Point<T> largest;

  Block(const Sequence<T>& sequence, int64_t last, const ForwardBlock<T>& to)
      : s(sequence),
        out(to),
        keys(s.visibility.visible_keys(last - 1)),
        room(keys),
        finite(finite_values(s, keys)),
        largest(mass::largest(s, keys)) {}
};

// The thresholds of a group of rows, if they are not there already.
template <bool kMass, class T>
struct Thresholds {
  struct Shared {
    Shared(const Sequence<T>&, int64_t, const ForwardBlock<T>&) {}
  };
  Thresholds(const Shared&, Group<T>&, bool) {}
  template <class Sums>
  bool accept(const Sums&, const int32_t*) const {
    return true;
  }
};
template <class T>
class Thresholds<true, T> {
 public:
  using Shared = Block<T>;

  // The group gets its list. A value that is not finite has to show even where its key is not kept.
  Thresholds(const Shared& block, Group<T>& group, bool accepted_later)
      : block_(block),
        group_(group),
        solver_(block.s, group, block.room, block.largest, block.out) {
    solver_.solve(accepted_later);
    hide_list();
  }

  // Whether sums over p - tau and counts, which were found with the thresholds, say that these are
  // right. If not, there are others now.
  bool accept(const Total<T> (&sums)[kVectors], const int32_t* counts) {
    Excess<T> e;
    T lane[Group<T>::kOwners];
    for (int l = 0; l < Group<T>::kOwners; ++l) lane[l] = static_cast<T>(counts[l]);
    each_vector([&](auto r) QFLUX_INLINE_LAMBDA {
      e.mass[r] = values(sums[r]);
      e.count[r] = load(lane + r * Vector<T>::kWidth);
    });
    const bool right = solver_.accept(e);
    hide_list();
    return right;
  }

 private:
  void hide_list() {
    if (!block_.finite) group_.list = nullptr;
  }

  const Shared& block_;
  Group<T>& group_;
  Solver<T> solver_;
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
