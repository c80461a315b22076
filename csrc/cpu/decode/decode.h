// What the ops of a cache do: the last rows of causal sequences against an index of their keys.
#pragma once

#include <vector>

#include "../../math/statistics.h"
#include "../../params.h"
#include "../isa/decode.h"
#include "../parallel.h"

namespace qflux::cpu {

// Keys in planes, tokens `base` and on of every sequence; those in front of start[b] are padding,
// which nobody sees. Planes are found by `component`, tokens follow one another.
template <class T>
struct CachedKeys {
  int64_t outer, inner;  // outer x inner sequences
  int64_t base, end;     // tokens of the views: base .. end - 1
  int64_t value_dim;     // 2 without values
  View<const T> points;  // [batch][tokens][2]
  View<const T> values;  // [batch][tokens][value_dim]; null: the keys
  PerSequence<int64_t> start;

  int64_t batch() const { return outer * inner; }
  BatchIndex index(int64_t n) const { return {n / inner, n % inner}; }
};

// Sums over the keys in front of tiles of kMomentsTile, as interact takes them: record 0 of a
// sequence has its first key, record 1 + t the moments of the keys in front of tile t.
struct CachedMoments {
  Moments* records = nullptr;
  int64_t stride = 0;  // records of a sequence

  Moments* before(int64_t n) const { return records + n * stride + 1; }
  Point<double> first_key(int64_t n) const {
    return {records[n * stride].x, records[n * stride].y};
  }
};

// Brings moments of the tokens in front of `first` up to those in front of keys.end.
template <class T>
void extend_moments(const CachedKeys<T>& keys, int64_t first, const CachedMoments& moments);

// Trees over runs of chunks (index.h).
struct CachedIndex {
  uint8_t* memory = nullptr;
  int64_t stride = 0;  // bytes of a sequence
  int64_t chunk = 0, tokens = 0;
};

// Bytes of a chunk of so many keys, a multiple of kIndexFan * kLeaf.
template <class T>
int64_t index_unit(int64_t chunk, int64_t value_dim);

// Builds what an index of keys.end tokens has and one of index.tokens has not.
template <class T>
void extend_index(const CachedKeys<T>& keys, const CachedIndex& index, bool exact_points);

template <class T>
struct CachedRows {
  PairParams<T> pair;  // of the rows and their score; its keys are `keys`
  CachedKeys<T> keys;
  CachedMoments moments;  // of scores with statistics
  CachedIndex index;      // of tokens that all rows see
  // [batch][kTangentNumbers] of a mass (isa/decode.h), from which few rows start and to which they
  // add; zeros at first. Or null.
  T* tangents = nullptr;
  View<T> context, strength;
  View<int32_t> degree;
};

// About as many pairs as a row costs.
template <class T>
int64_t row_pairs(const CachedRows<T>& params);

// What the rows gather. False, and what was written is void, for rows that only loops over every
// pair treat right: not finite or very large. The keys and values must be tame (math/sweep.h).
template <class T>
bool attend(const CachedRows<T>& params);

// The same by sequences: rows first .. last - 1 of one, from any thread. `params` stay where they
// are.
template <class T>
class CachedAttention {
 public:
  explicit CachedAttention(const CachedRows<T>& params);
  // What rows of a sequence will meet first, while something else is done.
  void fetch(int64_t sequence) const;
  bool run(int64_t sequence, int64_t first, int64_t last) const;

 private:
  const CachedRows<T>& params_;
  std::vector<Range> runs_;
  std::vector<IndexView<T>> trees_;  // of the first sequence, as if it had no padding
};

}  // namespace qflux::cpu
