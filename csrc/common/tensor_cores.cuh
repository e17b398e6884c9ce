// Fragments of tensor cores, for operands in half precision and sums in float32.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cuda_common.cuh"

namespace afa {

// Whether the code that the current device runs has them.
inline bool have_tensor_cores() { return compiled_architecture() >= 80; }

#if defined(AFA_CUDA_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define AFA_TENSOR_CORES 1
#else
#define AFA_TENSOR_CORES 0  // such code is not asked to, see have_tensor_cores()
#endif

// Four 8 x 8 matrices of 16-bit elements from shared memory. row(m, r) gives the address of row r of matrix m. Register m of a lane
// holds elements (lane / 4, 2 * (lane % 4) + {0, 1}) of matrix m, or of its transpose.
template <bool kTranspose, class Row>
__device__ inline void load_matrices(unsigned (&to)[4], Row row) {
  const int lane = threadIdx.x % 32;
#if defined(AFA_CUDA_EMULATOR)
  for (int m = 0; m < 4; ++m) {
    uint16_t values[2];
    for (int e = 0; e < 2; ++e) {
      const int across = lane / 4, along = 2 * (lane % 4) + e;
      memcpy(&values[e], row(m, kTranspose ? along : across) + (kTranspose ? across : along), 2);
    }
    memcpy(&to[m], values, 4);
  }
#else
  const unsigned address = unsigned(__cvta_generic_to_shared(row(lane / 8, lane % 8)));
  if (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#endif
}

// The same where each lane has the address of its own row at hand: of row lane % 8 of matrix lane / 8.
template <bool kTranspose, class T>
__device__ __forceinline__ void load_matrices_of(unsigned (&to)[4], const T* own_row) {
#if defined(AFA_CUDA_EMULATOR)
  const uint64_t* rows = emulator::warp_exchange(0xffffffffu, reinterpret_cast<uint64_t>(own_row), {__FILE__, __LINE__});
  load_matrices<kTranspose>(to, [&](int m, int r) { return reinterpret_cast<const T*>(rows[8 * m + r]); });
  emulator::warp_exchange(0xffffffffu, 0, {__FILE__, __LINE__});
#else
  load_matrices<kTranspose>(to, [&](int, int) { return own_row; });
#endif
}

#if defined(AFA_CUDA_EMULATOR)
// sum += a b by the definition of the fragments: every lane shows its registers to the others, which is no race.
template <class T>
__attribute__((no_sanitize("thread"))) inline void multiply_fragments(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
  if (emulator::settings().compiled < 80) emulator::fail("trap: tensor cores in code of an architecture without", {__FILE__, __LINE__});
  struct Fragments {
    const unsigned *a, *b;
  } own = {a, b};
  const int lane = threadIdx.x % 32;
  const uint64_t* all = emulator::warp_exchange(0xffffffffu, reinterpret_cast<uint64_t>(&own), {__FILE__, __LINE__});
  auto element = [](unsigned packed, int half) {
    T value;
    const uint16_t bits = uint16_t(packed >> (16 * half));
    memcpy(&value, &bits, 2);
    return to_float(value);
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = 2 * (lane % 4) + e % 2;
    unsigned any = 0;  // nothing but zeros behind the last channel, where most time would go
    for (int p = 0; p < 4; ++p) {
      const auto* left = reinterpret_cast<const Fragments*>(all[row % 8 * 4 + p]);
      const auto* right = reinterpret_cast<const Fragments*>(all[column * 4 + p]);
      any |= left->a[row / 8] | left->a[row / 8 + 2] | right->b[0] | right->b[1];
    }
    for (int k = 0; k < 16 && any != 0; ++k) {
      const auto* left = reinterpret_cast<const Fragments*>(all[row % 8 * 4 + k % 8 / 2]);
      const auto* right = reinterpret_cast<const Fragments*>(all[column * 4 + k % 8 / 2]);
      sum[e] += element(left->a[row / 8 + 2 * (k / 8)], k % 2) * element(right->b[k / 8], k % 2);
    }
  }
  emulator::warp_exchange(0xffffffffu, 0, {__FILE__, __LINE__});
}
template <class T>
inline void first_fragments(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
  for (float& element : sum) element = 0;
  multiply_fragments<T>(sum, a, b);
}
#else
// sum [16 x 8] = a [16 x 16] b [16 x 8], in float32: no zeros have to be written to registers first.
template <class T>
__device__ inline void first_fragments(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
#if AFA_TENSOR_CORES
  if constexpr (std::is_same<T, __half>::value)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
#else
  __trap();
#endif
}
// sum [16 x 8] += a [16 x 16] b [16 x 8], in float32.
template <class T>
__device__ inline void multiply_fragments(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
#if AFA_TENSOR_CORES
  if constexpr (std::is_same<T, __half>::value)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // rather than sums of nothing
#endif
}
#endif

}  // namespace afa
