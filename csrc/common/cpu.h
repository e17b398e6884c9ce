// CPU dispatch. Every CPU source is compiled once per instruction set, each time into its own namespace AFA_ISA
// (baseline, avx2, avx512), and the public function picks one at run time. A new operator needs no more than this:
//
//   namespace afa { namespace AFA_ISA { Status op(...) { ... } } }    // three copies
//   AFA_DISPATCH(op, args...)                                        // in the baseline copy only
//
// Sources compiled per instruction set must keep their helpers in namespace AFA_ISA or static: an inline function
// shared between the copies could be linked in its AVX-512 form and run on a machine without it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifndef AFA_ISA
#define AFA_ISA baseline
#define AFA_ISA_IS_BASELINE 1
#endif

namespace afa {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set this machine runs, or a lesser one named by AFA_CPU_ISA. Read once. Defined in cpu.cpp.
Isa cpu_isa();
const char* cpu_isa_name();
// Bytes of the cache that a core has for itself (the second level), as the system says, 1 MB where it says nothing; or AFA_CPU_CACHE,
// read at every call: what a kernel does then is another order of the same operations.
int64_t core_cache_bytes();
// Asks for large pages (2 MB) where memory has not been touched yet: a fault for each 4 KB takes longer than to fill them. Only of
// what is large, and where the system gives them to who asks; elsewhere it changes nothing.
void prefer_large_pages(void* memory, int64_t bytes);

}  // namespace afa

#if AFA_WITH_X86_ISAS
#define AFA_DISPATCH(function, ...)                                          \
  switch (::afa::cpu_isa()) {                                                \
    case ::afa::Isa::avx512: return ::afa::avx512::function(__VA_ARGS__);    \
    case ::afa::Isa::avx2: return ::afa::avx2::function(__VA_ARGS__);        \
    default: return ::afa::baseline::function(__VA_ARGS__);                  \
  }
#define AFA_DECLARE_PER_ISA(...)       \
  namespace baseline { __VA_ARGS__; }  \
  namespace avx2 { __VA_ARGS__; }      \
  namespace avx512 { __VA_ARGS__; }
#else
#define AFA_DISPATCH(function, ...) return ::afa::baseline::function(__VA_ARGS__);
#define AFA_DECLARE_PER_ISA(...) \
  namespace baseline { __VA_ARGS__; }
#endif
