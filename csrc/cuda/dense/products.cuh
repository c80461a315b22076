// The forward of wide values: each weight is computed once for many columns, as the other loops
// compute it, and multiplied by tensor cores. Weights and values are split into parts of bfloat16
// (fragments.cuh), so that the sums are those of float32; strengths, degrees and moments are summed
// as elsewhere.
//
// A warp owns rows, of which each lane computes the weights at its own places of the left matrix;
// the right one are the values, split where they are staged.
#pragma once

#include "../common/fragments.cuh"
#include "../common/gather.cuh"
#include "forward.cuh"

namespace qflux::cuda {

// Calls visit(pass) with a null pointer to the pass of the pairs, by their score and their columns.
template <template <class Score, int kColumns> class Pass, class Visit>
auto visit_products(const PairParams<float>& pair, const Visit& visit) {
  return visit_score(pair.score, [&](auto tag) {
    using Score = typename decltype(tag)::template of<float>;
    return pair.value_dim <= kTensorColumns
               ? visit(static_cast<Pass<Score, kTensorColumns>*>(nullptr))
               : visit(static_cast<Pass<Score, kTensorWide>*>(nullptr));
  });
}

// Keys in shared memory, values as each lane reads them: two column fragments at once.
template <class Sizes>
struct alignas(16) ProductTile {
  static constexpr int kPairs = Sizes::kColumnFragments / 2;

  uint4 values[Sizes::kSteps][kParts][kPairs][kWarp];
  Point<float> keys[Sizes::kTile];
};

// Sums of a thread over columns, at its places of the product. The tile's sums of first parts lie
// apart from those of all other products, which are 2^-7 of them and are added to what the total
// has rounded off so far: there a tensor core cuts off next to nothing.
template <class Sizes>
struct ColumnSums {
  static constexpr int kFragments = Sizes::kFragments, kColumns = Sizes::kColumnFragments;

  float tile[kFragments][kColumns][4] = {};
  float rest[kFragments][kColumns][4] = {};
  float value[kFragments][kColumns][4] = {};

  __device__ __forceinline__ void end_tile() {
#pragma unroll
    for (int n = 0; n < kFragments * kColumns * 4; ++n) {
      const int m = n / (kColumns * 4), c = n / 4 % kColumns, i = n % 4;
      rest[m][c][i] = add_exactly(value[m][c][i], tile[m][c][i] + rest[m][c][i]);
      tile[m][c][i] = 0;
    }
  }
  __device__ __forceinline__ CompensatedSum<float> total(int row, int column, int which) const {
    const int i = row % 2 * 2 + which;
    return {value[row / 2][column][i], rest[row / 2][column][i]};
  }
};

// Where a thread is in a fragment. Its rows are eight apart.
struct FragmentLane {
  int row = static_cast<int>(threadIdx.x) % kWarp / 4, pair = static_cast<int>(threadIdx.x) % 4;
};

// Calls visit(r, n) for the rows of a thread. Those past the end repeat the last one, and are not
// stored.
template <int kRows, class Pass, class Visit>
__device__ __forceinline__ void for_each_row(const Pass& pass, int first, const Visit& visit) {
  const int valid = pass.valid();
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (valid > 0) visit(r, lesser(opaque(first) + FragmentLane().row + r * 8, valid - 1));
}

// What a thread has met of values: none that is not the sum of its parts, and none of more than
// one.
struct Staged {
  bool all_in_parts = true, one_part = true;
};

// Numbers of a matrix of any layout: `offset` of the first, and strides from one to the next along
// the sum of a product (`inner`) and across (`outer`), with how many there are.
struct Places {
  int64_t offset, inner, outer;
  int inner_left, outer_left;
};

// Splits two fragments of a right matrix, 16 x 16 numbers, for one lane: what is at its places, and
// zero beyond the ends. The parts of a number that is not their sum are zero.
template <class Scale>
__device__ __forceinline__ void split_right(const View<const float>& numbers, const Places& places,
                                            const Scale& scale, Staged& staged,
                                            uint32_t (&parts)[4][kParts]) {
  const FragmentLane lane;
  const int inner_first = lane.pair * 2;
  const int64_t first = places.offset + inner_first * places.inner + lane.row * places.outer;
  float value[4][2];
  // How they are stored is found out once for all.
  const auto read_all = [&](const auto& read) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int inner = i % 4 / 2 * 8 + i % 2, outer = i / 4 * kFragmentColumns;
      const bool inside =
          (inner_first + inner < places.inner_left) & (lane.row + outer < places.outer_left);
      value[i / 2][i % 2] =
          inside ? scale(read(first + inner * places.inner + outer * places.outer)) : 0.0f;
    }
  };
  if (numbers.storage == Storage::kSame)
    read_all([&](int64_t offset) { return numbers.data[offset]; });
  else
    read_all([&](int64_t offset) {
      return widen(reinterpret_cast<const uint16_t*>(numbers.data)[offset], numbers.storage);
    });
  bool all_in_parts = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) all_in_parts &= round_in_parts(value[i][0], value[i][1], parts[i]);
  if (!all_in_parts) {
    staged.all_in_parts = false;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      round_in_parts(has_parts(value[i][0]) ? value[i][0] : 0,
                     has_parts(value[i][1]) ? value[i][1] : 0, parts[i]);
  }
  staged.one_part &= (parts[0][1] | parts[1][1] | parts[2][1] | parts[3][1]) == 0;
}

// The points of keys start .. start + count - 1, and zeros up to the end of the tile.
template <int kTile, class Pass>
__device__ __forceinline__ void stage_keys(const Pass& pass, int start, int count,
                                           Point<float> (&keys)[kTile]) {
  for (int n = threadIdx.x; n < kTile; n += kThreads)
    keys[n] =
        n < count ? load_point(pass.params.pair.key_points, pass.b, start + n) : Point<float>{0, 0};
}

// Stages keys start .. start + count - 1. A value that is not the sum of its parts is left to
// add_whole_values().
template <class Pass, class Tile>
__device__ __forceinline__ Staged stage_products(const Pass& pass, int start, int count, int column,
                                                 Tile& tile) {
  using Sizes = typename Pass::Sizes;
  const View<const float>& values = pass.params.pair.values;
  stage_keys(pass, start, count, tile.keys);
  const int columns = static_cast<int>(Pass::columns(pass.params));
  Staged staged;
  // Unrolled, the addresses in flight would cost the registers of the loop over pairs.
#pragma unroll 1
  for (int n = threadIdx.x / kWarp; n < Sizes::kSteps * Tile::kPairs; n += kWarps) {
    const int step = n / Tile::kPairs, pair = n % Tile::kPairs;
    const int key = step * kFragment, at = column + pair * 2 * kFragmentColumns;
    uint32_t parts[4][kParts];
    split_right(
        values,
        {values.offset(pass.b, start + key, at), values.token, values.component, count - key,
         columns - at},
        [](float value) { return value; }, staged, parts);
#pragma unroll
    for (int p = 0; p < kParts; ++p)
      tile.values[step][p][pair][threadIdx.x % kWarp] = {parts[0][p], parts[1][p], parts[2][p],
                                                         parts[3][p]};
  }
  return staged;
}

// Adds the keys of one step, of which a row sees those before its end. `kCareful` unless all rows
// see them all.
template <bool kCareful, class Pass, class Tile, int kRows>
__device__ __forceinline__ void add_step(const Pass& pass,
                                         const typename Pass::Owner (&owner)[kRows],
                                         const Tile& tile, int start, int step,
                                         const int (&end)[kRows], bool one_part,
                                         ColumnSums<typename Pass::Sizes>& columns,
                                         float (&sums)[kRows][Pass::kOfRow]) {
  using Sizes = typename Pass::Sizes;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = step * kFragment + lane % 4 * 2;
  uint32_t left[Sizes::kFragments][kParts][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Point<float> key[2];
    const float4 both = reinterpret_cast<const float4&>(tile.keys[first + half * 8]);
    key[0] = {both.x, both.y};
    key[1] = {both.z, both.w};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float weight[2];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        weight[k] = pass.template weigh<kCareful>(
            owner[r], key[k], !kCareful || start + first + half * 8 + k < end[r], sums[r]);
      uint32_t parts[kParts];
      cut_in_parts(weight[0], weight[1], parts);
#pragma unroll
      for (int p = 0; p < kParts; ++p) left[r / 2][p][r % 2 + half * 2] = parts[p];
    }
  }
  // Adds the products with a part of the values: of weights' parts `from` to `to` - 1.
  const auto multiply = [&](int part, int from, int to, auto& sums_of) {
#pragma unroll
    for (int pair = 0; pair < Tile::kPairs; ++pair) {
      const uint4 right = tile.values[step][part][pair][lane];
#pragma unroll
      for (int p = from; p < to; ++p)
#pragma unroll
        for (int m = 0; m < Sizes::kFragments; ++m) {
          add_product(left[m][p], right.x, right.y, sums_of[m][pair * 2]);
          add_product(left[m][p], right.z, right.w, sums_of[m][pair * 2 + 1]);
        }
    }
  };
  multiply(0, 0, 1, columns.tile);
  multiply(0, 1, kParts, columns.rest);
  if (one_part) return;
#pragma unroll
  for (int part = 1; part < kParts; ++part) multiply(part, 0, kParts - part, columns.rest);
}

// Adds the values of keys start .. end - 1 that are not the sums of their parts.
template <class Pass, int kRows>
__device__ __forceinline__ void add_whole_values(const Pass& pass,
                                                 const typename Pass::Owner (&owner)[kRows],
                                                 int start, int last, int column,
                                                 const int (&end)[kRows],
                                                 ColumnSums<typename Pass::Sizes>& columns) {
  constexpr int kColumns = Pass::Sizes::kColumnFragments;
  const int at = column + FragmentLane().pair * 2;
#pragma unroll 1
  for (int j = start; j < last; ++j) {
    float value[kColumns][2];
    bool any = false;
#pragma unroll
    for (int n = 0; n < kColumns * 2; ++n) {
      float& number = value[n / 2][n % 2];
      number = pass.value(j, at + n / 2 * kFragmentColumns + n % 2);
      const bool whole = !has_parts(number);
      any |= whole;
      if (!whole) number = 0;
    }
    if (!any) continue;
    const Point<float> key = load_point(pass.params.pair.key_points, pass.b, j);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (j >= end[r]) continue;
      float of_row[Pass::kOfRow] = {};
      const float weight = pass.template weigh<false>(owner[r], key, true, of_row);
#pragma unroll
      for (int n = 0; n < kColumns * 2; ++n) {
        float& sum = columns.tile[r / 2][n / 2][r % 2 * 2 + n % 2];
        sum = multiply_add(weight, value[n / 2][n % 2], sum);
      }
    }
  }
}

// A work of a schedule without warps that share their owners; see gather() (gather.cuh).
template <class Pass, bool kDivided>
struct ProductWork {
  static constexpr int kWarpRows = Pass::Sizes::kFragments * kFragment;
  static constexpr int kBlockRows = kWarps * kWarpRows;
  static_assert(kBlockRows == kThreads * Pass::Sizes::kOwners, "the schedule counts owners");

  int outer, inner;  // of the sequence
  int64_t sequence;
  int part, column_block;
  int first;                // row of the warp
  Range all;                // keys that any row of the block sees
  int any_end, common_end;  // of those that any row of the warp sees, and that all see

  __device__ __forceinline__ ProductWork(const typename Pass::Params& params,
                                         const Schedule& schedule, int64_t work) {
    const int parts = kDivided ? schedule.parts : 1;
    const int64_t rest = work / schedule.batch;
    const int order = static_cast<int>(rest / schedule.column_blocks / parts);
    const int block = schedule.reversed ? schedule.owner_blocks - 1 - order : order;
    const BatchIndex b = params.pair.index(work % schedule.batch);
    outer = static_cast<int>(b.outer);
    inner = static_cast<int>(b.inner);
    sequence = work % schedule.batch;
    part = static_cast<int>(rest / schedule.column_blocks % parts);
    column_block = static_cast<int>(rest % schedule.column_blocks);
    const Pass pass(params, {outer, inner});
    const int warp = static_cast<int>((threadIdx.x / kWarp + turn_of(work)) % kWarps);
    const int valid = pass.valid(), block_first = block * kBlockRows;
    first = block_first + warp * kWarpRows;
    const int last = lesser(first + kWarpRows, valid);
    all = met_by_any(pass, block_first, lesser(block_first + kBlockRows, valid));
    if constexpr (kDivided) {
      const int begin = part * schedule.part_sources;
      all = {greater(all.begin, begin), lesser(all.end - begin, schedule.part_sources) + begin};
    }
    any_end = lesser(met_by_any(pass, first, last).end, all.end);
    common_end = lesser(met_by_all(pass, first, last).end, all.end);
  }
  // Addresses in a sequence are found anew where they are used, not held through the pair loop.
  __device__ __forceinline__ Pass pass(const typename Pass::Params& params) const {
    return Pass(params, {opaque(outer), opaque(inner)});
  }
  // Whole steps of keys in the tile from `start` on, up to `end`.
  __device__ __forceinline__ int steps_to(int start, int end) const {
    return lesser(greater(end - start, 0), Pass::Sizes::kTile) / kFragment;
  }
};
template <bool kDivided>
__device__ __forceinline__ int64_t works_of(const Schedule& schedule) {
  return schedule.batch * schedule.owner_blocks * (kDivided ? schedule.parts : 1) *
         schedule.column_blocks;
}

// Gives the first of the lanes of a row what all of them have of its sums.
template <int kRows, int kSums>
__device__ __forceinline__ void add_up_lanes(CompensatedSum<float> (&total)[kRows][kSums]) {
#pragma unroll
  for (int n = 0; n < kRows * kSums; ++n) {
    CompensatedSum<float>& sum = total[n / kSums][n % kSums];
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
      const CompensatedSum<float> other{__shfl_xor_sync(kAllLanes, sum.value, bits),
                                        __shfl_xor_sync(kAllLanes, sum.error, bits)};
      sum.add(other);
    }
  }
}

// Stores the sums of a thread, or puts them among the partials.
template <bool kDivided, class Pass, int kRows>
__device__ __forceinline__ void store_products(
    const Pass& pass, int first, int column, int part, int64_t sequence,
    const ColumnSums<typename Pass::Sizes>& columns,
    CompensatedSum<float> (&total)[kRows][Pass::kOfRow]) {
  constexpr int kColumns = Pass::Sizes::kColumnFragments, kSums = Pass::kOfRow;
  const FragmentLane lane;
  add_up_lanes(total);
  const auto partials = partials_of<Pass>(pass.params);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = opaque(first) + lane.row + r * 8;
    if (row >= Pass::owners(pass.params)) continue;
    if constexpr (kDivided) {
      float* const at = partials.at(part, sequence, column / Pass::Sizes::kColumns, row);
#pragma unroll
      for (int n = 0; n < kColumns * 2; ++n)
        partials.set(at, n / 2 * kFragmentColumns + lane.pair * 2 + n % 2,
                     columns.total(r, n / 2, n % 2));
#pragma unroll
      for (int n = 0; n < kSums; ++n)
        if (lane.pair == 0) partials.set(at, Pass::kColumnSums + n, total[r][n]);
    } else {
      const auto end = pass.row_end(row);
#pragma unroll
      for (int n = 0; n < kColumns * 2; ++n)
        pass.store_column(row, end, column + n / 2 * kFragmentColumns + lane.pair * 2 + n % 2,
                          columns.total(r, n / 2, n % 2).get());
      if (column > 0 || lane.pair > 0) continue;
      float sums[kSums];
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums[n] = total[r][n].get();
      pass.store_row(row, end, sums);
    }
  }
}

// As gather() (gather.cuh), without warps that share their owners.
template <class Pass, bool kDivided>
__global__ void __launch_bounds__(kThreads, Pass::Sizes::kBlocksPerSm)
    gather_products(typename Pass::Params params, Schedule schedule) {
  using Sizes = typename Pass::Sizes;
  constexpr int kRows = Sizes::kRows, kTile = Sizes::kTile, kSums = Pass::kOfRow;
  using Tile = ProductTile<Sizes>;
  static_assert(sizeof(Tile) <= kSharedBytes, "a tile must fit");
  QFLUX_SHARED(Tile, tile);

  const int64_t works = works_of<kDivided>(schedule);
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const ProductWork<Pass, kDivided> of(params, schedule, work);
    if (of.all.begin >= of.all.end && kDivided) continue;
    const auto anew = [&] { return of.pass(params); };
    const Pass pass = of.pass(params);
    const int column = of.column_block * Sizes::kColumns;

    typename Pass::Owner owner[kRows] = {};
    for_each_row<kRows>(anew(), of.first,
                        [&](int r, int row) { owner[r] = pass.load(row, column); });
    ColumnSums<Sizes> columns;
    CompensatedSum<float> total[kRows][kSums] = {};
    for (int start = of.all.begin; start < of.all.end; start += kTile) {
      const int count = lesser(kTile, of.all.end - start);
      __syncthreads();
      const Staged staged = stage_products(anew(), start, count, column, tile);
      const bool all_in_parts = __syncthreads_and(staged.all_in_parts);
      const bool one_part = __syncthreads_and(staged.one_part);
      const int steps = of.steps_to(start, of.any_end + kFragment - 1);
      const int common_steps = of.steps_to(start, of.common_end);
      if (steps == 0) continue;
      float sums[kRows][kSums] = {};
      int end[kRows] = {};
      int step = 0;
#pragma unroll 1
      for (; step < common_steps; ++step)
        add_step<false>(pass, owner, tile, start, step, end, one_part, columns, sums);
      for_each_row<kRows>(anew(), of.first, [&](int r, int row) {
        end[r] = lesser(pass.range(row).end, of.all.end);
      });
#pragma unroll 1
      for (; step < steps; ++step)
        add_step<true>(pass, owner, tile, start, step, end, one_part, columns, sums);
      if (!all_in_parts)
        add_whole_values(anew(), owner, start, lesser(start + count, of.any_end), column, end,
                         columns);
      columns.end_tile();
      add_to_totals(sums, total);
    }
    store_products<kDivided>(anew(), of.first, column, of.part, of.sequence, columns, total);
  }
}

// As merge_parts() (gather.cuh), by a thread for each column of an owner and one for its own sums.
template <class Pass>
__global__ void __launch_bounds__(kMergeThreads)
    merge_products(typename Pass::Params params, Schedule schedule) {
  constexpr int kColumns = Pass::kColumnSums, kSums = Pass::kOfRow;
  constexpr int kBlockRows = kThreads * Pass::Sizes::kOwners;
  const auto partials = partials_of<Pass>(params);
  const int64_t works = schedule.batch * schedule.column_blocks * (kColumns + 1) * partials.owners;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x; work < works;
       work += static_cast<int64_t>(gridDim.x) * kMergeThreads) {
    const int64_t rest = work / partials.owners, block = rest / (kColumns + 1);
    const int row = static_cast<int>(work % partials.owners);
    const int column = static_cast<int>(rest % (kColumns + 1));
    const int64_t sequence = block % schedule.batch, step = block / schedule.batch;
    const Pass pass(params, params.pair.index(sequence));
    const int first = row / kBlockRows * kBlockRows;
    const int last = met_by_any(pass, first, lesser(first + kBlockRows, pass.valid())).end;
    const auto add_up = [&](int n) {
      CompensatedSum<float> sum;
      for (int part = 0; part * schedule.part_sources < last; ++part)
        partials.add_to(sum, partials.at(part, sequence, step, row), n);
      return sum.get();
    };
    const auto end = pass.row_end(row);
    if (column < kColumns) {
      pass.store_column(row, end, static_cast<int>(step) * kColumns + column, add_up(column));
    } else if (step == 0) {
      float sums[kSums];
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums[n] = add_up(kColumns + n);
      pass.store_row(row, end, sums);
    }
  }
}

template <class Pass>
struct ProductKernels {
  static constexpr int kMergers = Pass::kColumnSums + 1;
  static auto whole() { return gather_products<Pass, false>; }
  static auto part() { return gather_products<Pass, true>; }
  static auto merge() { return merge_products<Pass>; }
};

}  // namespace qflux::cuda
