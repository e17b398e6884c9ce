// Grid-wide synchronisation for the emulator: `cooperative_groups::this_grid().sync()`.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync(AFA_PLACE) const { emulator::grid_barrier({file, line}); }
  bool is_valid() const { return emulator::current->block->launch->cooperative; }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
