// Rows of a tensor, of any element type and stride, as contiguous float and back; and which of its channels count.
#pragma once

#include <cstdint>

#include "common/common.h"
#include "common/cpu.h"

namespace afa {
namespace AFA_ISA {

// --- one element ---

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

// --- one row ---

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

// The same tensor from column x on; its size is left to who asks.
static inline View<4> from_column(View<4> view, int64_t x) {
  view.data = static_cast<char*>(view.data) + x * view.stride[3] * element_bytes(view.dtype);
  return view;
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

// The channels of image b that class_mask [B][C] keeps (all for null), ascending, in `list`; returns how many. Of the others every
// row of `out` is written as `zeros`.
static inline int64_t present_channels(const uint8_t* class_mask, int64_t b, const View<4>& out, const float* zeros, int32_t* list) {
  const int64_t channels = out.size[1];
  int64_t count = 0;
  for (int64_t c = 0; c < channels; ++c) {
    if (!class_mask || class_mask[b * channels + c])
      list[count++] = int32_t(c);
    else
      for (int64_t y = 0; y < out.size[2]; ++y) store_row(out, b, c, y, zeros);
  }
  return count;
}

}  // namespace AFA_ISA
}  // namespace afa
