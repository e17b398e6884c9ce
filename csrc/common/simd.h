// Vectors of float for whichever instruction set the including source is compiled for, by the compiler's vector
// extension (GCC and Clang): 16 lanes with AVX-512, 8 with AVX2, 4 otherwise. Plus conversion of rows from and to
// half precision, and the exponential of the softmax.
#pragma once

#include <cstdint>
#include <utility>

#include "common/common.h"
#include "common/cpu.h"

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

static inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

static inline float to_float(float value) { return value; }
static inline float to_float(Bf16 value) { return from_bits(uint32_t(value.bits) << 16); }
// Moving exponent and mantissa up by 13 bits and multiplying by 2^112 also gets subnormals right; infinity and NaN are mended.
static inline float to_float(F16 value) {
  uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  float scaled = from_bits(magnitude) * from_bits(0x77800000u);
  uint32_t bits = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : to_bits(scaled);
  return from_bits(bits | uint32_t(value.bits & 0x8000) << 16);
}

static inline void from_float(float value, float* to) { *to = value; }
static inline void from_float(float value, Bf16* to) {
  uint32_t bits = to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
// Round to nearest even: below the smallest normal half, adding 0.5 lets the float unit round at the right bit.
static inline void from_float(float value, F16* to) {
  uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    result = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = uint16_t(result | sign);
}

template <class T>
static inline void load_row_of(const T* from, int64_t stride, int64_t count, float* to) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * stride]);
}
template <class T>
static inline void store_row_of(const float* from, int64_t count, int64_t stride, T* to) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) from_float(from[i], to + i);
  else
    for (int64_t i = 0; i < count; ++i) from_float(from[i], to + i * stride);
}

// Row y of channel c of image b, any stride and element type, as contiguous float.
static inline void load_row(const View<4>& view, int64_t b, int64_t c, int64_t y, float* to) {
  int64_t offset = b * view.stride[0] + c * view.stride[1] + y * view.stride[2];
  int64_t stride = view.stride[3], count = view.size[3];
  switch (view.dtype) {
    case DType::f32: return load_row_of(static_cast<const float*>(view.data) + offset, stride, count, to);
    case DType::f16: return load_row_of(static_cast<const F16*>(view.data) + offset, stride, count, to);
    case DType::bf16: return load_row_of(static_cast<const Bf16*>(view.data) + offset, stride, count, to);
  }
}
static inline void store_row(const View<4>& view, int64_t b, int64_t c, int64_t y, const float* from) {
  int64_t offset = b * view.stride[0] + c * view.stride[1] + y * view.stride[2];
  int64_t stride = view.stride[3], count = view.size[3];
  switch (view.dtype) {
    case DType::f32: return store_row_of(from, count, stride, static_cast<float*>(view.data) + offset);
    case DType::f16: return store_row_of(from, count, stride, static_cast<F16*>(view.data) + offset);
    case DType::bf16: return store_row_of(from, count, stride, static_cast<Bf16*>(view.data) + offset);
  }
}

}  // namespace AFA_ISA
}  // namespace afa
