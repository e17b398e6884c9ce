// Which of the three copies of the CPU kernels runs.
#include "common/cpu.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if AFA_WITH_X86_ISAS && (defined(_WIN32) || defined(AFA_ASK_CPUID))
#define AFA_ASK_CPUID 1
#include <cpuid.h>
#endif

namespace afa {

#if !AFA_WITH_X86_ISAS
static Isa of_machine() { return Isa::baseline; }
#elif AFA_ASK_CPUID
// What the builtins below do, where the library that they read from is not linked (Clang beside Microsoft's linker).
static Isa of_machine() {
  unsigned eax, ebx, ecx, edx, kept, high;
  constexpr unsigned kFma = 1u << 12, kXsave = 1u << 27, kAvx2 = 1u << 5;
  constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (~ecx & (kFma | kXsave))) return Isa::baseline;
  asm volatile("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));  // which registers the system keeps
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (~kept & 0x06) || !(ebx & kAvx2)) return Isa::baseline;
  return (~kept & 0xe6) || (~ebx & kAvx512) ? Isa::avx2 : Isa::avx512;
}
#else
static Isa of_machine() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  const bool all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return all ? Isa::avx512 : Isa::avx2;
}
#endif

static Isa detect() {
  Isa best = of_machine();
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

static int64_t cache_of_machine() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) return bytes;
#elif defined(__APPLE__)
  int64_t bytes = 0;
  size_t size = sizeof bytes;
  if (sysctlbyname("hw.l2cachesize", &bytes, &size, nullptr, 0) == 0 && bytes > 0) return bytes;
#endif
  return 1 << 20;
}

int64_t core_cache_bytes() {
  if (const char* wish = std::getenv("AFA_CPU_CACHE"))
    if (const long long bytes = std::strtoll(wish, nullptr, 10); bytes > 0) return bytes;
  static const int64_t bytes = cache_of_machine();
  return bytes;
}

void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (uintptr_t(memory) + kPage - 1) / kPage * kPage, end = (uintptr_t(memory) + bytes) / kPage * kPage;
  if (end >= begin + 2 * kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace afa
