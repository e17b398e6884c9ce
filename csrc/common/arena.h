// Scratch memory handed out piece by piece. The same code measures what it needs and then places it, so the two cannot differ.
#pragma once

#include "common/common.h"
#include "common/cpu.h"

namespace afa {
namespace AFA_ISA {

// Each piece is on a 64-byte boundary if the base is; with a null base nothing is handed out, only measured.
struct Arena {
  char* base;
  int64_t used = 0;  // bytes

  explicit Arena(void* workspace) : base(static_cast<char*>(workspace)) {}
  template <class T>
  T* take(int64_t count) {
    T* here = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return here;
  }
};

}  // namespace AFA_ISA
}  // namespace afa
