// The sequences of a call in the layouts that the loops want, and the rows' thresholds.
#pragma once

#include "isa/dense.h"
#include "isa/statistics.h"
#include "parallel.h"

namespace qflux::cpu {

// Staging a token costs about as much as so many pairs.
constexpr int64_t kTokenCost = 16;

// The planes and records of every sequence of a call.
template <class T>
class Staging {
 public:
  explicit Staging(const PairParams<T>& params);  // for the forward; finds the thresholds
  explicit Staging(const InteractBackwardParams<T>& params);

  Sequence<T> sequence(BatchIndex b) const;
  // [rows]: for what the passes of a score with kMass find.
  T* limits(BatchIndex b) const { return row_plane(b, 2); }
  T* limit_rests(BatchIndex b) const { return row_plane(b, 3); }
  T* grad_strengths(BatchIndex b) const { return row_plane(b, 3 + value_dim); }

  const int64_t value_dim;

 private:
  Staging(const PairParams<T>& params, bool backward);

  T* row_plane(BatchIndex b, int64_t plane) const {
    return rows_.get() + (p_.flat(b) * row_planes_ + plane) * row_stride_;
  }
  T* key_plane(BatchIndex b, int64_t plane) const {
    return keys_.get() + (p_.flat(b) * key_planes_ + plane) * key_stride_;
  }
  T* value_record(BatchIndex b, int64_t key) const {
    return values_.get() + (p_.flat(b) * p_.keys + key) * value_dim;
  }
  T* grad_record(BatchIndex b, int64_t row) const {
    return grads_.get() + (p_.flat(b) * p_.rows + row) * value_dim;
  }

  void stage_keys() const;
  void stage_keys(BatchIndex b, Range range) const;
  void stage_queries(BatchIndex b, Range range) const;
  void stage_gradients(const InteractBackwardParams<T>& backward, BatchIndex b, Range range) const;
  std::unique_ptr<Moments[]> tile_moments() const;
  void find_thresholds(const Moments* before, BatchIndex b, Range range) const;

  const PairParams<T>& p_;
  const int64_t row_stride_, key_stride_, row_planes_, key_planes_;
  const bool backward_, copies_values_, copies_grads_;
  const std::unique_ptr<T[]> rows_, keys_, values_, grads_;
};

}  // namespace qflux::cpu
