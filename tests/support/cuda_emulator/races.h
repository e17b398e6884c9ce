// Data races between CUDA threads, found by ThreadSanitizer: each CUDA thread is a fiber of its own to it, switches between
// fibers order nothing, barriers and atomics order what they order on a device. Shuffles and votes do not.
//
// emulator.cpp alone calls these; it is compiled without the sanitizer, so that its own work is not watched, the kernels with
// it. Without AFA_EMULATOR_RACES all of this is empty.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#ifdef AFA_EMULATOR_RACES
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulator::races {

#ifdef AFA_EMULATOR_RACES
constexpr bool kWatched = true;
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void* create_fiber() { return __tsan_create_fiber(0); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: orders nothing
inline void acquire(void* address) { __tsan_acquire(address); }
inline void release(void* address) { __tsan_release(address); }
#else
constexpr bool kWatched = false;
inline void* current_fiber() { return nullptr; }
inline void* create_fiber() { return nullptr; }
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
#endif

// Pages of its own for what a block's threads touch: unmapped with the block, they are forgotten, while memory that
// malloc hands to the next block would look as if both had used it.
template <class T>
struct Pages {
  using value_type = T;
  Pages() = default;
  template <class Other>
  Pages(const Pages<Other>&) {}
  T* allocate(size_t count) {
    if (!kWatched) return static_cast<T*>(std::malloc(count * sizeof(T)));
    void* fresh = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) std::abort();
    return static_cast<T*>(fresh);
  }
  void deallocate(T* at, size_t count) {
    if (kWatched) munmap(at, count * sizeof(T));
    else std::free(at);
  }
  bool operator==(const Pages&) const { return true; }
  bool operator!=(const Pages&) const { return false; }
};

}  // namespace emulator::races
