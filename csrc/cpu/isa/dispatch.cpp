#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace qflux::cpu {
namespace {

// The sets that this machine runs, the best one last.
std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> sets{&kBaseline};
#if defined(QFLUX_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("fma")) return sets;
  if (__builtin_cpu_supports("avx2")) sets.push_back(&kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&kAvx512);
#endif
  return sets;
}

const InstructionSet& choose() {
  const std::vector<const InstructionSet*> sets = available();
  const char* wanted = std::getenv("QFLUX_INSTRUCTION_SET");
  if (wanted == nullptr || *wanted == 0) return *sets.back();
  std::string allowed;
  for (const InstructionSet* set : sets) {
    if (wanted == std::string(set->name)) return *set;
    allowed += allowed.empty() ? set->name : std::string(", ") + set->name;
  }
  throw std::runtime_error(
      "qflux_kernels: QFLUX_INSTRUCTION_SET must be one that this machine runs (" + allowed +
      "), got '" + wanted + "'");
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace qflux::cpu
