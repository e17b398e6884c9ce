// Copies of 16 bytes from global to shared memory that arrive while a thread goes on: none of its registers wait for them.
//
// A thread asks for copies, closes a group of them, and later waits until all but the last few of its groups are there. What other
// threads have asked for is there after each has waited and a barrier has been passed. Below 8.0 a copy is a load and a store, there
// at once; written for the one, code holds for the other.
#pragma once

#include <cstring>

#include "common/cuda_common.cuh"

namespace afa {

// The first `valid` bytes, 0 to 16, are read; zeros stand in for the rest. Both addresses are multiples of 16; that of none is not
// looked at and may lie beyond the array.
template <class T>
__device__ __forceinline__ void copy_async_16(SharedArray<T> to, const void* from, int valid) {
#if defined(AFA_CUDA_EMULATOR)
  emulator::copy_later({to.check(0, 16 / sizeof(T)), from, valid});
  memset(static_cast<void*>(&to[0]), 0xff, 16);  // until it is waited for: no number, and written to
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid) : "memory");
#else
  uint4 packed = make_uint4(0, 0, 0, 0);
  if (valid == 16) {
    packed = *static_cast<const uint4*>(from);
  } else if (valid > 0) {
    unsigned words[4] = {};
    for (int i = 0; i < valid; ++i) words[i / 4] |= unsigned(static_cast<const unsigned char*>(from)[i]) << (8 * (i % 4));
    packed = make_uint4(words[0], words[1], words[2], words[3]);
  }
  *reinterpret_cast<uint4*>(to) = packed;
#endif
}

// Closes the group of what was asked for since the last one; it may be empty.
__device__ __forceinline__ void commit_copies() {
#if defined(AFA_CUDA_EMULATOR)
  emulator::commit_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups of this thread but the last kLeft are there.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
#if defined(AFA_CUDA_EMULATOR)
  for (emulator::Copy copy; emulator::take_copy(kLeft, &copy);) {
    memset(copy.to, 0, 16);
    memcpy(copy.to, copy.from, size_t(copy.bytes));
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace afa
