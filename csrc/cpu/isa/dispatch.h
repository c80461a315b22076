// The loops that are compiled once for each instruction set, and the set that this machine runs.
#pragma once

#include "attention.h"
#include "decode.h"
#include "dense.h"
#include "matvec.h"
#include "projection.h"
#include "statistics.h"
#include "sweep.h"
#include "tree.h"

namespace qflux::cpu {

template <class T>
struct Loops {
  DenseLoops<T> dense;
  StatisticsLoops<T> statistics;
  SweepLoops<T> sweep;
  TreeLoops<T> tree;
  DecodeLoops<T> decode;
  ProjectionLoops<T> projection;
  MatvecLoops<T> matvec;
  AttentionLoops<T> attention;
};

struct InstructionSet {
  const char* name;
  Loops<float> f32;
  Loops<double> f64;
};

// Each is the only symbol of its object file (loops.cpp).
extern const InstructionSet kBaseline;
#if defined(QFLUX_X86)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

// The best set of this machine, or the one that the environment variable QFLUX_INSTRUCTION_SET
// names: "baseline", "AVX2" or "AVX-512". Raises for a name that this machine does not run.
const InstructionSet& instruction_set();

template <class T>
const Loops<T>& loops();
template <>
inline const Loops<float>& loops<float>() {
  return instruction_set().f32;
}
template <>
inline const Loops<double>& loops<double>() {
  return instruction_set().f64;
}

}  // namespace qflux::cpu
