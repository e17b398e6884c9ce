// Which thread of its team this is; without OpenMP, the only one of it.
#pragma once

#include "common/cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace afa {
namespace AFA_ISA {

static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
static inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace AFA_ISA
}  // namespace afa
