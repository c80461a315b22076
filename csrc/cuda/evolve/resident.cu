// Whole stacks of steps in one launch. A block keeps the points (in the backward: the records) that
// all its threads read in shared memory, from one stage to the next; what a token needs only of
// itself is written to and read back from the tape, which the backward wants anyway.
#include "../../evolve.h"
#include "../common/thresholds.cuh"
#include "../dense/backward.cuh"
#include "../dense/forward.cuh"
#include "resident.h"

namespace qflux::cuda {
namespace {

// The sums of all owners of a pass over a tile that holds all sources. Groups of owners go to the
// warps in alternating order, so that a warp's groups of two rounds meet as many under a causal
// mask as any other's.
template <class Pass>
__device__ __forceinline__ void gather_sequence(const Pass& pass,
                                                const typename Pass::Scalar* tile) {
  using T = typename Pass::Scalar;
  constexpr int kOwners = kResidentOwners, kSums = Pass::kSums;
  constexpr int kAtOnce = Pass::Sizes::kAtOnce, kChunk = Pass::Sizes::kChunk;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int owners = static_cast<int>(Pass::owners(pass.params)), valid = pass.valid();
#pragma unroll 1
  for (int round = 0; round * warps * kResidentGroup < owners; ++round) {
    const int turn = round % 2 == 0 ? warp : warps - 1 - warp;
    const int first = (round * warps + turn) * kResidentGroup;
    const int last = lesser(first + kResidentGroup, valid);
    const Range any = met_by_any(pass, first, last), common = met_by_all(pass, first, last);
    typename Pass::Owner owner[kOwners] = {};
    Range met[kOwners] = {};
    load_owners(pass, first, 0, owner);
    find_ranges(pass, first, met);
    CompensatedSum<T> total[kOwners][kSums] = {};
#pragma unroll 1
    for (int chunk = any.begin - any.begin % kAtOnce; chunk < any.end; chunk += kChunk) {
      const int end = lesser(chunk + kChunk, any.end);
      const int common_begin = (common.begin + kAtOnce - 1) / kAtOnce * kAtOnce;
      const int from = lesser(greater(chunk, common_begin), end);
      const int to = greater(lesser(common.end - common.end % kAtOnce, end), from);
      T sums[kOwners][kSums] = {};
      add_sources<false>(pass, owner, met, tile, 0, from, to, sums);
#pragma unroll 1
      for (int side = 0; side < 2; ++side)
        add_sources<true>(pass, owner, met, tile, 0, side == 0 ? chunk : to, side == 0 ? from : end,
                          sums);
      add_to_totals(sums, total);
    }
    store_owners(pass, first, owners, 0, true, true, total);
  }
}

// Runs rule(i) for all tokens of a sequence, then takes points.at(b, i) into the tile.
template <class T, class Rule>
__device__ __forceinline__ void settle(BatchIndex b, int64_t rows, const View<T>& points, T* tile,
                                       const Rule& rule) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < rows + rows % 2; i += blockDim.x) {
    Point<T> at{T(0), T(0)};  // behind an odd number, which is read in twos
    if (i < rows) {
      rule(b, i);
      at = load_point(as_const(points), b, i);
    }
    tile[2 * i] = at.x;
    tile[2 * i + 1] = at.y;
  }
}

template <class Rule>
__device__ __forceinline__ void for_each_token(BatchIndex b, int64_t rows, const Rule& rule) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) rule(b, i);
}

// With what rows keep for the backward, half as many threads have the registers for its doubles.
template <class T, bool kKept>
constexpr int kForwardThreads = kKept && sizeof(T) == 8 ? kResidentThreads / 2 : kResidentThreads;

template <class T, class Score, bool kKept>
__global__ void __launch_bounds__(kForwardThreads<T, kKept>, 1)
    evolve_sequences(EvolveParams<T> p) {
  QFLUX_DYNAMIC_SHARED(memory);
  WarpSums& shared = *reinterpret_cast<WarpSums*>(memory);
  T* tile = reinterpret_cast<T*>(memory + sizeof(WarpSums));
  const int64_t rows = p.pair.rows;
  for (int64_t sequence = blockIdx.x; sequence < p.pair.batch(); sequence += gridDim.x) {
    const BatchIndex b = p.pair.index(sequence);
    settle(b, rows, p.plane(0, kTapeState), tile, CopyToTape<T>{p});
#pragma unroll 1
    for (int64_t stages = 0; stages < 2 * p.steps; ++stages) {
      const int64_t step = stages / 2;
      const bool middle = stages % 2 == 1, last = step + 1 == p.steps;
      InteractParams<T> params = stage_params(p, step, middle);
      params.pair.states = View<const T>{tile, 0, 0, 2, 1};  // the copy, not the tape
      params.pair.key_points = params.pair.states;
      __syncthreads();
      if constexpr (Score::kThresholded) {
        for (int64_t segment = 0; segment < rows; segment += blockDim.x * kRowsPerThread)
          threshold_segment(params.pair, params.threshold, b, segment, shared);
        __syncthreads();
      }
      // A gate's division outweighs the row sums, which then are not worth a loop without them.
      constexpr bool kAlwaysRowSums = !Score::kThresholded;
      if (kAlwaysRowSums || !middle)
        gather_sequence(Forward<T, Score, 0, true, kKept>(params, b), tile);
      else
        gather_sequence(Forward<T, Score, 0, kAlwaysRowSums, kKept>(params, b), tile);
      __syncthreads();
      if (!middle)
        settle(b, rows, p.plane(step, kTapeMiddle), tile, EndOfFirstStage<T>{p, step});
      else
        settle(b, rows, last ? p.out : p.plane(step + 1, kTapeState), tile, EndOfStep<T>{p, step});
    }
  }
}

template <class T, class Score>
struct RowFromKept {
  const InteractBackwardParams<T>& params;
  __device__ __forceinline__ void operator()(BatchIndex b, int64_t i) const {
    row_from_kept<T, Score>(params, b, static_cast<int>(i));
  }
};

template <class Pass, class T>
__device__ __forceinline__ void gather_from_tape(const InteractBackwardParams<T>& params,
                                                 BatchIndex b, T* tile) {
  constexpr int kWidth = Pass::Sizes::kWidth;
  const Pass pass(params, b);
  stage<kWidth>(tile, pass.valid(), blockDim.x,
                [&](int n, T(&record)[kWidth]) { pass.fetch(n, 0, record); });
  __syncthreads();
  gather_sequence(pass, tile);
  __syncthreads();
}

template <class T, class Score>
__global__ void __launch_bounds__(kResidentThreads, 1)
    evolve_sequences_backward(EvolveBackwardParams<T> p) {
  QFLUX_DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  const StepGradients<T> g{p};
  const EvolveParams<T>& forward = p.forward;
  const int64_t rows = forward.pair.rows;
  for (int64_t sequence = blockIdx.x; sequence < forward.pair.batch(); sequence += gridDim.x) {
    const BatchIndex b = forward.pair.index(sequence);
#pragma unroll 1
    for (int64_t stages = 2 * forward.steps; stages > 0; --stages) {
      const int64_t step = (stages - 1) / 2;
      const bool middle = stages % 2 == 0;
      if (middle)
        for_each_token(b, rows, EndOfStepVjp<T>{g, step});
      else
        for_each_token(b, rows, EndOfFirstStageVjp<T>{g, step});
      const InteractBackwardParams<T> params = stage_backward_params(g, step, middle);
      __syncthreads();
      if (kHasKeptSums<Score> && params.moments)
        for_each_token(b, rows, RowFromKept<T, Score>{params});
      else
        gather_from_tape<RowPass<T, Score, 0>>(params, b, tile);
      gather_from_tape<KeyPass<T, Score, 0>>(params, b, tile);
    }
    for_each_token(b, rows, CopyGradient<T>{g});
  }
}

template <int kWidth, class T>
int64_t tile_bytes(const PairParams<T>& p) {
  return (p.rows + p.rows % 2) * kWidth * static_cast<int64_t>(sizeof(T));
}
template <class T>
int64_t shared_bytes(const EvolveParams<T>& p) {
  return static_cast<int64_t>(sizeof(WarpSums)) + tile_bytes<2>(p.pair);
}
template <class T>
int64_t shared_bytes(const EvolveBackwardParams<T>& p) {
  return tile_bytes<KeyPass<T, InverseGate<T>, false>::Sizes::kWidth>(p.forward.pair);
}

template <class T>
Grid grid_of(const PairParams<T>& pair, int64_t bytes, int most_threads = kResidentThreads) {
  return {pair.batch(), lesser(resident_warps(pair.rows) * kWarp, most_threads), bytes};
}

constexpr const char* kDoesNotFit = "a sequence does not fit a block";

template <class T>
const char* run(const EvolveParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.pair;
  if (pair.batch() == 0 || pair.rows == 0) return nullptr;
  if (!fits_block(params)) return kDoesNotFit;
  const int64_t bytes = shared_bytes(params);
  const Grid grid = grid_of(pair, bytes);
  return visit_score(pair.score, [&](auto tag) -> const char* {
    using Score = typename decltype(tag)::template of<T>;
    if constexpr (kHasKeptSums<Score>) {
      if (params.keeps_sums())
        return launch(evolve_sequences<T, Score, true>,
                      grid_of(pair, bytes, kForwardThreads<T, true>), stream, params);
    }
    if constexpr (Score::kMass)
      return kDoesNotFit;
    else
      return launch(evolve_sequences<T, Score, false>, grid, stream, params);
  });
}

template <class T>
const char* run(const EvolveBackwardParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.forward.pair;
  if (pair.batch() == 0 || pair.rows == 0) return nullptr;
  if (!fits_block(params)) return kDoesNotFit;
  const Grid grid = grid_of(pair, shared_bytes(params));
  return visit_score(pair.score, [&](auto tag) -> const char* {
    using Score = typename decltype(tag)::template of<T>;
    if constexpr (Score::kLimitVjp || Score::kMass)
      return kDoesNotFit;
    else
      return launch(evolve_sequences_backward<T, Score>, grid, stream, params);
  });
}

}  // namespace

template <class T>
bool fits_block(const EvolveParams<T>& params) {
  return !has_mass(params.pair.score) && params.pair.rows <= kMaxLength &&
         shared_bytes(params) <= max_shared_bytes();
}
template <class T>
bool fits_block(const EvolveBackwardParams<T>& params) {
  const ScoreKind score = params.forward.pair.score;
  return !has_limit_vjp(score) && !has_mass(score) && params.forward.pair.rows <= kMaxLength &&
         shared_bytes(params) <= max_shared_bytes();
}
template bool fits_block(const EvolveParams<float>&);
template bool fits_block(const EvolveParams<double>&);
template bool fits_block(const EvolveBackwardParams<float>&);
template bool fits_block(const EvolveBackwardParams<double>&);

const char* evolve_resident(const EvolveParams<float>& params, void* stream) {
  return run(params, stream);
}
const char* evolve_resident(const EvolveParams<double>& params, void* stream) {
  return run(params, stream);
}
const char* evolve_resident(const EvolveBackwardParams<float>& params, void* stream) {
  return run(params, stream);
}
const char* evolve_resident(const EvolveBackwardParams<double>& params, void* stream) {
  return run(params, stream);
}

}  // namespace qflux::cuda
