// What a row needs of its pairs where the weight is p = q . k + b, the limit has no gradient and
// the values are the keys: over the keys that it keeps, with u = g . k + s the upstream gradient of
// a weight,
//   context = sum p k,  strength = sum p,  and the gradient of q = sum u k = M g + s m
// with m = sum k and M = sum k k'. So a forward that sums up m and M spares its backward the pairs
// of a row. Context and strength are not made from these sums: b m + M q loses to cancellation
// what small weights of large points have.
#pragma once

#include "score.h"

namespace qflux {

// m and M.
constexpr int kKeptSums = 5;

template <class Score>
constexpr bool kHasKeptSums = Score::kAffine && !Score::kLimitVjp;
QFLUX_HOST_INLINE bool has_kept_sums(ScoreKind kind) {
  return visit_score(
      kind, [](auto tag) { return kHasKeptSums<typename decltype(tag)::template of<float>>; });
}

template <class T>
struct KeptSums {
  T x, y, xx, xy, yy;
};

template <class T>
QFLUX_INLINE Point<T> kept_query_vjp(const KeptSums<T>& kept, Point<T> grad, T grad_strength) {
  return {multiply_add(kept.xx, grad.x, multiply_add(kept.xy, grad.y, kept.x * grad_strength)),
          multiply_add(kept.xy, grad.x, multiply_add(kept.yy, grad.y, kept.y * grad_strength))};
}

}  // namespace qflux
