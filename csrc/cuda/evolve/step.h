// The two ways to run a step, for those who do not leave the choice to evolve and evolve_backward.
#pragma once

#include "../../params.h"

namespace qflux::cuda {

enum class Launches : int {
  kAuto,
  kMany,  // a kernel for each pass, each over all sequences
  kOne,   // a block for each sequence, which must fit it
};

// A sweep, with base blocks of `base` keys, takes many launches.
struct SweepScratch {
  void* memory = nullptr;
  int64_t base = 0;
};

const char* evolve_by(Launches launches, const EvolveParams<float>& params, void* stream,
                      SweepScratch scratch = {});
const char* evolve_by(Launches launches, const EvolveParams<double>& params, void* stream,
                      SweepScratch scratch = {});
const char* evolve_by(Launches launches, const EvolveBackwardParams<float>& params, void* stream,
                      SweepScratch scratch = {});
const char* evolve_by(Launches launches, const EvolveBackwardParams<double>& params, void* stream,
                      SweepScratch scratch = {});

}  // namespace qflux::cuda
