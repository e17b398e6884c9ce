// Vectors of float for whichever instruction set the including source is compiled for, by the compiler's vector
// extension (GCC and Clang): 16 lanes with AVX-512, 8 with AVX2, 4 otherwise. Plus the exponential of the softmax.
#pragma once

#include <cstdint>
#include <utility>

#include "common/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace afa {
namespace AFA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef int32_t vint __attribute__((vector_size(kVectorBytes)));

static inline vfloat load(const float* from) {
  vfloat value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
static inline void store(float* to, vfloat value) { __builtin_memcpy(to, &value, sizeof value); }
static inline vfloat splat(float value) { return value - vfloat{}; }
static inline vfloat max_of(vfloat a, vfloat b) { return a > b ? a : b; }
static inline vfloat abs_of(vfloat a) { return (vfloat)((vint)a & 0x7fffffff); }
// The square root, correctly rounded; NaN below 0.
static inline vfloat root_of(vfloat value) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)value);
#elif defined(__SSE2__)
  return (vfloat)_mm_sqrt_ps((__m128)value);
#else
  for (int i = 0; i < kLanes; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}
static inline float sum_of(vfloat values) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += values[i];
  return sum;
}
// The value as it is rounded here, kept from being fused into the sum that follows.
static inline vfloat rounded(vfloat value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
}

// a_0, b_0, a_1, b_1, ... of the lower halves (kHalf = 0) or the upper ones (kHalf = kLanes / 2).
template <int kHalf, int... kLane>
static inline vfloat interleave(vfloat a, vfloat b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kHalf + kLane / 2 + kLane % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, vint{(kHalf + kLane / 2 + kLane % 2 * kLanes)...});
#endif
}
// Rows to columns of a square: interleaving its halves, log2(kLanes) times.
static inline void transpose(vfloat (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    vfloat next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// What `combine` makes of all lanes, in every lane; it must not matter to it which comes first.
template <class Combine, int... kLane>
static inline vfloat across(vfloat values, const Combine& combine, std::integer_sequence<int, kLane...>) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
#if defined(__clang__)
    const vfloat other = step == 1   ? __builtin_shufflevector(values, values, (kLane ^ 1)...)
                         : step == 2 ? __builtin_shufflevector(values, values, (kLane ^ 2)...)
                         : step == 4 ? __builtin_shufflevector(values, values, (kLane ^ 4) % kLanes...)
                                     : __builtin_shufflevector(values, values, (kLane ^ 8) % kLanes...);
#else
    const vfloat other = __builtin_shuffle(values, vint{(kLane ^ step)...});
#endif
    values = combine(values, other);
  }
  return values;
}
template <class Combine>
static inline vfloat across(vfloat values, const Combine& combine) {
  return across(values, combine, std::make_integer_sequence<int, kLanes>());
}

// exp(x) for x <= 0, relative error below 2.5e-7 down to x = -87.3; 0 below that; NaN stays NaN.
// 2^n comes from adding 1.5 * 2^23, which leaves the rounded n in the low bits; the rest is a polynomial on |r| <= ln(2)/2
// (coefficients of the Cephes library's expf).
static inline vfloat exp_of(vfloat x) {
  const vfloat magic = splat(12582912.0f);
  vfloat shifted = x * 1.44269504088896341f + magic;
  vfloat n = shifted - magic;
  vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vfloat scale = (vfloat)(((vint)shifted << 23) + (127 << 23));
  vfloat value = p * scale;
  return x < -87.3f ? vfloat{} : value;
}

}  // namespace AFA_ISA
}  // namespace afa
