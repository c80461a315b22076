// The row pass of the backward over wide values: the gradients of the weights of 16 rows and 8 keys
// are a product of the gradients of contexts and the values, by tensor cores in the precision of
// float32 (fragments.cuh). Each lane goes on with the pairs at its own places of the product.
#pragma once

#include "backward.cuh"
#include "products.cuh"

namespace qflux::cuda {

// Keys in shared memory, values as each lane reads them: of two fragments of keys at once.
template <class Sizes>
struct alignas(16) RowTile {
  static constexpr int kSteps = Sizes::kColumns / kFragment, kGroups = Sizes::kTile / kFragment;

  uint4 values[kGroups][kParts][kSteps][kWarp];
  Point<float> keys[Sizes::kTile];
};

// The left matrix: gradients of the contexts of a thread's rows.
template <class Sizes>
struct RowGradients {
  static constexpr int kSteps = Sizes::kColumns / kFragment;

  uint32_t parts[Sizes::kFragments][kSteps][kParts][4];

  // Returns whether all of them are the sums of their parts.
  template <class Pass>
  __device__ __forceinline__ bool load(const Pass& pass, int first, int column) {
    bool all_in_parts = true;
    for_each_row<Sizes::kRows>(pass, first, [&](int r, int row) {
#pragma unroll
      for (int n = 0; n < kSteps * 2; ++n) {
        const int at = column + n / 2 * kFragment + FragmentLane().pair * 2 + n % 2 * 8;
        uint32_t of_two[kParts];
        all_in_parts &=
            round_in_parts(pass.grad_context(row, at), pass.grad_context(row, at + 1), of_two);
#pragma unroll
        for (int p = 0; p < kParts; ++p) parts[r / 2][n / 2][p][r % 2 + n % 2 * 2] = of_two[p];
      }
    });
    return all_in_parts;
  }
};

template <class Pass, class Tile>
__device__ __forceinline__ Staged stage_row_products(const Pass& pass, int start, int count,
                                                     int column, Tile& tile) {
  const View<const float>& values = pass.params.pair.values;
  stage_keys(pass, start, count, tile.keys);
  const int columns = static_cast<int>(Pass::columns(pass.params));
  Staged staged;
#pragma unroll 1
  for (int n = threadIdx.x / kWarp; n < Tile::kGroups * Tile::kSteps; n += kWarps) {
    const int group = n / Tile::kSteps, step = n % Tile::kSteps;
    const int key = group * kFragment, at = column + step * kFragment;
    uint32_t parts[4][kParts];
    split_right(
        values,
        {values.offset(pass.b, start + key, at), values.component, values.token, columns - at,
         count - key},
        [](float value) { return value; }, staged, parts);
#pragma unroll
    for (int p = 0; p < kParts; ++p)
      tile.values[group][p][step][threadIdx.x % kWarp] = {parts[0][p], parts[1][p], parts[2][p],
                                                          parts[3][p]};
  }
  return staged;
}

// The products of a thread's rows with its two keys of each of two fragments.
template <class Sizes>
using WeightGradients = float[2][Sizes::kFragments][4];

template <class Sizes>
__device__ __forceinline__ void multiply_rows(const RowGradients<Sizes>& rows,
                                              const RowTile<Sizes>& tile, int group, bool one_part,
                                              WeightGradients<Sizes>& grads) {
  float rest[2][Sizes::kFragments][4] = {};
  // Adds the products with a part of the values: of gradients' parts `from` to `to` - 1.
  const auto multiply = [&](int part, int from, int to, auto& sums) {
#pragma unroll
    for (int step = 0; step < RowTile<Sizes>::kSteps; ++step) {
      const uint4 right = tile.values[group][part][step][threadIdx.x % kWarp];
#pragma unroll
      for (int p = from; p < to; ++p)
#pragma unroll
        for (int m = 0; m < Sizes::kFragments; ++m) {
          add_product(rows.parts[m][step][p], right.x, right.y, sums[0][m]);
          add_product(rows.parts[m][step][p], right.z, right.w, sums[1][m]);
        }
    }
  };
  multiply(0, 0, 1, grads);
  multiply(0, 1, kParts, rest);
  if (!one_part) {
#pragma unroll
    for (int part = 1; part < kParts; ++part) multiply(part, 0, kParts - part, rest);
  }
#pragma unroll
  for (int n = 0; n < 2 * Sizes::kFragments * 4; ++n) {
    const int f = n / (Sizes::kFragments * 4), m = n / 4 % Sizes::kFragments, i = n % 4;
    grads[f][m][i] += rest[f][m][i];
  }
}

// The same where some numbers are not the sums of their parts, of keys before `last`.
template <class Pass>
__device__ __forceinline__ void multiply_whole_rows(const Pass& pass, int first, int key, int last,
                                                    int column,
                                                    WeightGradients<typename Pass::Sizes>& grads) {
  const int at = key + FragmentLane().pair * 2;
#pragma unroll 1
  for (int c = column; c < column + Pass::Sizes::kColumns; ++c) {
    float value[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int j = at + n / 2 * kFragmentColumns + n % 2;
      value[n] = j < last ? pass.value(j, c) : 0.0f;
    }
    for_each_row<Pass::Sizes::kRows>(pass, first, [&](int r, int row) {
      const float grad = pass.grad_context(row, c);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float& sum = grads[n / 2][r / 2][r % 2 * 2 + n % 2];
        sum = multiply_add(grad, value[n], sum);
      }
    });
  }
}

// As gather() (gather.cuh), without warps that share their owners.
template <class Pass, bool kDivided>
__global__ void __launch_bounds__(kThreads, Pass::Sizes::kBlocksPerSm)
    gather_row_products(typename Pass::Params params, Schedule schedule) {
  using Sizes = typename Pass::Sizes;
  using Tile = RowTile<Sizes>;
  constexpr int kRows = Sizes::kRows, kTile = Sizes::kTile, kSums = Pass::kSums;
  static_assert(sizeof(Tile) <= kSharedBytes, "a tile must fit");
  QFLUX_SHARED(Tile, tile);

  const int64_t works = works_of<kDivided>(schedule);
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const ProductWork<Pass, kDivided> of(params, schedule, work);
    if (of.all.begin >= of.all.end && kDivided) continue;
    const auto anew = [&] { return of.pass(params); };
    const Pass pass = of.pass(params);
    const int columns = static_cast<int>(Pass::columns(params));

    CompensatedSum<float> total[kRows][kSums] = {};
    for (int column = 0; column < columns; column += Sizes::kColumns) {
      typename Pass::Row owner[kRows] = {};
      for_each_row<kRows>(anew(), of.first,
                          [&](int r, int row) { owner[r] = pass.load_row(row, column); });
      RowGradients<Sizes> gradients = {};
      const bool rows_in_parts = gradients.load(anew(), of.first, column);
      for (int start = of.all.begin; start < of.all.end; start += kTile) {
        const int count = lesser(kTile, of.all.end - start);
        __syncthreads();
        const Staged staged = stage_row_products(anew(), start, count, column, tile);
        const bool all_in_parts = __syncthreads_and(staged.all_in_parts & rows_in_parts);
        const bool one_part = __syncthreads_and(staged.one_part);
        const int groups = of.steps_to(start, of.any_end + kFragment - 1);
        const int common = all_in_parts ? of.steps_to(start, of.common_end) : 0;
        if (groups == 0) continue;
        float sums[kRows][kSums] = {};
        int end[kRows] = {};
        for_each_row<kRows>(anew(), of.first, [&](int r, int row) {
          end[r] = lesser(pass.range(row).end, of.all.end);
        });
        const auto add_group = [&](int group, auto careful) {
          constexpr bool kCareful = decltype(careful)::value;
          WeightGradients<Sizes> grads = {};
          if (!kCareful || all_in_parts)
            multiply_rows<Sizes>(gradients, tile, group, one_part, grads);
          else
            multiply_whole_rows(anew(), of.first, start + group * kFragment, start + count, column,
                                grads);
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            const int at = group * kFragment + f * kFragmentColumns + FragmentLane().pair * 2;
            const float4 both = reinterpret_cast<const float4&>(tile.keys[at]);
            const Point<float> key[2] = {{both.x, both.y}, {both.z, both.w}};
#pragma unroll
            for (int n = 0; n < kRows * 2; ++n) {
              const int r = n / 2, k = n % 2;
              pass.template add_pair<kCareful>(
                  owner[r], key[k], grads[f][r / 2][r % 2 * 2 + k] + owner[r].grad_strength,
                  start + at + k < end[r], sums[r]);
            }
          }
        };
        int group = 0;
#pragma unroll 1
        for (; group < common; ++group) add_group(group, std::false_type());
#pragma unroll 1
        for (; group < groups; ++group) add_group(group, std::true_type());
        add_to_totals(sums, total);
      }
    }
    const int last_step = (columns - 1) / Sizes::kColumns;
    add_up_lanes(total);
    const auto partials = partials_of<Pass>(params);
    const Pass end_pass = anew();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = opaque(of.first) + FragmentLane().row + r * 8;
      if (FragmentLane().pair > 0 || row >= Pass::owners(params)) continue;
      if constexpr (kDivided) {
        partials.set(partials.at(of.part, of.sequence, last_step, row), total[r]);
      } else {
        float sums[kSums];
#pragma unroll
        for (int n = 0; n < kSums; ++n) sums[n] = total[r][n].get();
        end_pass.store(row, last_step * Sizes::kColumns, true, sums);
      }
    }
  }
}

template <class Pass>
struct RowProductKernels {
  static constexpr int kMergers = 1;
  static auto whole() { return gather_row_products<Pass, false>; }
  static auto part() { return gather_row_products<Pass, true>; }
  static auto merge() { return merge_parts<Pass>; }
};

}  // namespace qflux::cuda
