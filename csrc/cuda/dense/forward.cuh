// What a row gathers forward: its context, strength and degree, and what it keeps for the backward.
#pragma once

#include <type_traits>

#include "../common/gather.cuh"

namespace qflux::cuda {

// Wide values are summed on tensor cores (products.cuh). With the sums for the backward the totals
// of four rows leave registers for three blocks.
template <class T, int kValues, bool kKept>
using ForwardSizes = std::conditional_t<
    (kValues >= kTensorColumns), ProductSizes<kValues>,
    TileTraits<T, kValues, 2 + kValues, kKept ? 3 : Traits<T, kValues>::kBlocksPerSm>>;

// `kRowSums`: strength and degree are wanted. The second stage of a step wants neither, and they
// are two of a pair's seven instructions. `kKept`: the KeptSums are, for the backward.
template <class T, class Score, int kValues, bool kRowSums, bool kKept = false>
struct Forward : OwnsRows<T, Score, InteractParams<T>> {
  using Base = OwnsRows<T, Score, InteractParams<T>>;
  using Params = InteractParams<T>;
  using Sizes = ForwardSizes<T, kValues, kKept>;
  using Base::Base, Base::b, Base::params, Base::visibility;
  static constexpr bool kOwnValues = kValues > 0;
  // The weights of a mass are one in sum: in place of the strength it gathers its kept keys.
  static constexpr bool kKeepsMoments = Score::kMass && kOwnValues;
  static constexpr int kColumnSums = Sizes::kColumns;
  // Behind the sums of columns.
  static constexpr int kStrength = 0, kDegree = kKeepsMoments ? 0 : 1, kKey = kDegree + 1;
  static constexpr int kKeptAt = kKeepsMoments ? 3 : kRowSums ? 2 : 0;
  static constexpr int kOfRow = kKeptAt + (kKept ? kKeptSums : 0);
  static constexpr int kSums = kColumnSums + kOfRow;
  static_assert(!kKept || (kHasKeptSums<Score> && !kOwnValues), "there are such sums");
  static constexpr bool kLoopsColumns = false;
  static constexpr bool kShowsDropped = kOwnValues && Score::kThresholded;

  struct Owner {
    Point<T> query;
    T limit, rest;
  };

  QFLUX_INLINE static int64_t columns(const Params& p) { return kOwnValues ? p.pair.value_dim : 2; }

  __device__ __forceinline__ Owner load(int row, int /*column*/) const {
    return {query<Score>(params.pair, b, row), this->limit(row),
            Score::kMass ? params.pair.row_plane().at(b, row) : T(0)};
  }
  __device__ __forceinline__ void fetch(int key, int column, T (&record)[Sizes::kWidth]) const {
    this->template fetch_key<Sizes::kWidth - 2>(key, column, record);
  }
  template <bool kCareful = true>
  __device__ __forceinline__ void accumulate(const Owner& row, const T (&record)[Sizes::kWidth],
                                             bool visible, T (&sums)[kSums]) const {
    constexpr int kValue = kOwnValues ? 2 : 0;
    const Score score = this->score(row.limit, row.rest);
    const T p = inner_product(row.query.x, row.query.y, record[0], record[1], score.bias());
    const bool kept = score.kept(p);
    if constexpr (kKept || (kShowsDropped && !kCareful)) {
      const bool adds = visible & kept;
      const T w = score.weight(p);
#pragma unroll
      for (int c = 0; c < kColumnSums; ++c) multiply_add_if(adds, w, record[kValue + c], sums[c]);
      add_row_sums(adds, w, record, sums + kColumnSums);
      if constexpr (kKept) add_kept_sums(adds, record, sums + kColumnSums + kKeptAt);
      return;
    }
    // What is dropped is left out of the sum only if it is finite for certain: a key below a
    // threshold is, a value of its own need not be and must show.
    if (!(visible & (kept | !Score::kThresholded | kOwnValues))) return;
    const T w = score.weight(p, kept);
#pragma unroll
    for (int c = 0; c < kColumnSums; ++c) sums[c] = multiply_add(w, record[kValue + c], sums[c]);
    if constexpr (kKeepsMoments) {
      add_row_sums(kept, w, record, sums + kColumnSums);
    } else if constexpr (kRowSums) {
      sums[kColumnSums + kStrength] += w;
      if (kept) sums[kColumnSums + kDegree] += 1;
    }
  }
  // The weight of a pair, zero unless it is kept, of which only the sums of the row are taken.
  template <bool kCareful>
  __device__ __forceinline__ T weigh(const Owner& row, Point<T> key, bool visible,
                                     T (&sums)[kOfRow]) const {
    const Score score = this->score(row.limit, row.rest);
    const T p = inner_product(row.query.x, row.query.y, key.x, key.y, score.bias());
    const bool kept = score.kept(p) & (!kCareful | visible);
    T w = score.weight(p, kept);
    // A score without a threshold shows an infinity that it drops.
    if (kCareful && !Score::kThresholded) w = where(visible, w);
    const T record[2] = {key.x, key.y};
    if constexpr (Score::kThresholded) {
      add_row_sums(kept, w, record, sums);
    } else {
      sums[kStrength] += w;
      add_if(kept, T(1), sums[kDegree]);
    }
    return w;
  }
  __device__ __forceinline__ void add_row_sums(bool kept, T w, const T* record, T* sums) const {
    if constexpr (kRowSums) add_if(kept, T(1), sums[kDegree]);
    if constexpr (kKeepsMoments) {
      add_if(kept, record[0], sums[kKey]);
      add_if(kept, record[1], sums[kKey + 1]);
    } else if constexpr (kRowSums) {
      add_if(kept, w, sums[kStrength]);
    }
  }
  __device__ __forceinline__ void add_kept_sums(bool kept, const T* record, T* sums) const {
    const T x = record[0], y = record[1];
    add_if(kept, x, sums[0]);
    add_if(kept, y, sums[1]);
    multiply_add_if(kept, x, x, sums[2]);
    multiply_add_if(kept, x, y, sums[3]);
    multiply_add_if(kept, y, y, sums[4]);
  }
  __device__ __forceinline__ void store(int row, int column, bool /*last*/,
                                        const T (&sums)[kSums]) const {
    const RowEnd end = row_end(row);
#pragma unroll
    for (int c = 0; c < kColumnSums; ++c) store_column(row, end, column + c, sums[c]);
    if (column > 0) return;
    store_row(row, end, sums + kColumnSums);
  }

  // What becomes of the sums of a row.
  struct RowEnd {
    int64_t visible;
    T scale;
  };
  __device__ __forceinline__ RowEnd row_end(int row) const {
    const int64_t visible = visibility().visible_keys(row);
    T scale = params.pair.reduction_scale(visible);
    if constexpr (Score::kThresholded) {
      // No comparison with an undefined threshold means anything.
      const T tau = params.threshold.at(b, row);
      if (tau != tau) scale = tau;
    }
    return {visible, scale};
  }
  __device__ __forceinline__ void store_column(int row, const RowEnd& end, int column,
                                               T sum) const {
    if (column < columns(params))
      params.context.store(b, row, column, end.visible > 0 ? end.scale * sum : T(0));
  }
  __device__ __forceinline__ void store_row(int row, const RowEnd& end, const T* sums) const {
    const auto [visible, scale] = end;
    if constexpr (kRowSums) {
      if (params.strength)
        params.strength.store(
            b, row, 0, visible > 0 ? scale * (kKeepsMoments ? T(1) : sums[kStrength]) : T(0));
      if (params.degree)
        params.degree.at(b, row) = visible > 0 ? static_cast<int32_t>(sums[kDegree]) : 0;
    }
    if constexpr (kKeepsMoments || kKept) {
      constexpr int kFirst = kKept ? kKeptAt : kDegree, kCount = kKept ? kKeptSums : kKeptMoments;
      if (params.moments) {
#pragma unroll
        for (int n = 0; n < kCount; ++n)
          params.moments.at(b, row, n) = visible > 0 ? sums[kFirst + n] : T(0);
      }
    }
    if (!Score::kThresholded && params.threshold) params.threshold.at(b, row) = T(0);
  }
};

}  // namespace qflux::cuda
