// Thresholds by mass, a block to a group of rows: keys stream through shared memory once for each
// step of the row that takes the most.
#include "mass.cuh"
#include "mass.h"

namespace qflux::cuda {
namespace {

template <class T, class Score>
__global__ void __launch_bounds__(kThreads, TileTraits<T, 0, 2>::kBlocksPerSm)
    find_mass_thresholds(InteractParams<T> params, Schedule schedule) {
  using Pass = MassPass<T, Score>;
  using Sizes = typename Pass::Sizes;
  constexpr int kOwners = Sizes::kOwners, kTile = Sizes::kTile;
  using Tile = Buffer<T, kTile * 2>;
  using Totals = Buffer<CompensatedSum<T>, kThreads * kOwners * 2>;
  QFLUX_SHARED(Tile, tile);
  QFLUX_SHARED(Totals, totals);  // of each thread, where slices share rows
  struct Votes {
    unsigned at[kWarps];
  };
  QFLUX_SHARED(Votes, votes);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = 1 << schedule.split_bits;
  const int slice = warp & (split - 1), group = warp >> schedule.split_bits;
  const int per_block = (kThreads * kOwners) >> schedule.split_bits;
  const int64_t works = schedule.batch * schedule.owner_blocks;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int order = static_cast<int>(work / schedule.batch);
    const int block = schedule.reversed ? schedule.owner_blocks - 1 - order : order;
    const Pass pass(params, params.pair.index(work % schedule.batch));
    const int valid = pass.valid(), block_first = block * per_block;
    const int first = block_first + group * (kWarp * kOwners);
    const int all = met_by_any(pass, block_first, lesser(block_first + per_block, valid)).end;
    MassRows<T, kOwners> rows(pass, first, lesser(first + kWarp * kOwners, valid));

    bool busy = true;  // whether a row of the warp still needs its keys
    const auto walk = [&](const auto& kind, auto& total) {
      using Kind = std::decay_t<decltype(kind)>;
      for (int start = 0; start < all; start += kTile) {
        const int count = lesser(kTile, all - start);
        __syncthreads();
        stage<2>(tile.at, count, kThreads,
                 [&](int n, T(&record)[2]) { kind.fetch(start + n, 0, record); });
        __syncthreads();
        if (busy) rows.meet(kind, tile.at, start, count, slice, split, total);
      }
      if (split == 1) return;
      // Every slice gets the sums of all, in the order of the slices.
      using Total = typename Kind::Total;
      static_assert(sizeof(Total) <= sizeof(CompensatedSum<T>), "the room for totals");
      Total* const shared = reinterpret_cast<Total*>(totals.at);
      const int peers = kThreads >> schedule.split_bits, place = group * kWarp + lane;
#pragma unroll
      for (int n = 0; n < kOwners * Kind::kSums; ++n)
        shared[n * kThreads + slice * peers + place] = total[n / Kind::kSums][n % Kind::kSums];
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kOwners * Kind::kSums; ++n) {
        Total sum;
        for (int other = 0; other < split; ++other)
          sum.add(shared[n * kThreads + other * peers + place]);
        total[n / Kind::kSums][n % Kind::kSums] = sum;
      }
    };
    const auto any_in_block = [&](bool active) {
      const unsigned vote = __ballot_sync(kAllLanes, active);
      busy = vote != 0;
      if (lane == 0) votes.at[warp] = vote;
      __syncthreads();
      unsigned any = 0;
#pragma unroll
      for (int n = 0; n < kWarps; ++n) any |= votes.at[n];
      return any != 0;
    };
    // Between two uses of what is shared lie the barriers of a tile.
    if (all > 0) rows.template solve<Score>(params, pass.b, walk, any_in_block);
    rows.store(pass, first, slice == 0);
  }
}

template <class T>
const char* run(const InteractParams<T>& params, void* stream) {
  const PairParams<T>& pair = params.pair;
  return visit_score(pair.score, [&](auto tag) -> const char* {
    using Score = typename decltype(tag)::template of<T>;
    if constexpr (Score::kMass) {
      if (const char* error = check_lengths(pair, 0)) return error;
      using Sizes = typename MassPass<T, Score>::Sizes;
      const Schedule schedule =
          schedule_of<Sizes>(pair.batch(), static_cast<int>(pair.rows), pair.keys, 1, pair.causal);
      return launch(find_mass_thresholds<T, Score>,
                    {pair.batch() * schedule.owner_blocks, kThreads}, stream, params, schedule);
    } else {
      return "the thresholds of this score are not by mass";
    }
  });
}

}  // namespace

const char* mass_thresholds(const InteractParams<float>& params, void* stream) {
  return run(params, stream);
}
const char* mass_thresholds(const InteractParams<double>& params, void* stream) {
  return run(params, stream);
}

}  // namespace qflux::cuda
