// One instruction set's table, compiled with that set's flags.
//
// Nothing else of this object may be visible to the linker: of two functions with the same name it
// keeps one, and that may be the one for a newer processor than this machine's. So all loops are in
// anonymous namespaces, and what they call is there too, or always inlined
// (tests/project/test_instruction_sets.py).
#include "attention-inl.h"
#include "decode-inl.h"
#include "dense-inl.h"
#include "dispatch.h"
#include "matvec-inl.h"
#include "projection-inl.h"
#include "statistics-inl.h"
#include "sweep-inl.h"
#include "tree-inl.h"

namespace qflux::cpu {
namespace {

template <class T>
constexpr Loops<T> kLoops = {dense::kLoops<T>,  statistics::kLoops<T>, sweep::kLoops<T>,
                             tree::kLoops<T>,   decode::kLoops<T>,     projection::kLoops<T>,
                             matvec::kLoops<T>, attention::kLoops<T>};

}  // namespace

#if defined(__AVX512F__)
const InstructionSet kAvx512 = {"AVX-512", kLoops<float>, kLoops<double>};
#elif defined(__AVX2__)
const InstructionSet kAvx2 = {"AVX2", kLoops<float>, kLoops<double>};
#else
const InstructionSet kBaseline = {"baseline", kLoops<float>, kLoops<double>};
#endif

}  // namespace qflux::cpu
