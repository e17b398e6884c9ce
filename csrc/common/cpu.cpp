// Which of the three copies of the CPU kernels runs.
#include "common/cpu.h"

namespace afa {

static Isa detect() {
  Isa best = Isa::baseline;
#if AFA_WITH_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
  if (const char* wish = std::getenv("AFA_CPU_ISA")) {
    if (std::strcmp(wish, "baseline") == 0) best = Isa::baseline;
    if (std::strcmp(wish, "avx2") == 0 && best > Isa::avx2) best = Isa::avx2;
  }
  return best;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace afa
