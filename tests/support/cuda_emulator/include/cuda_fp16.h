// Half precision for the emulator, by the host compiler's own type: conversions round to nearest even, as CUDA's do.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __half { uint16_t bits; };
struct __align__(4) __half2 { __half x, y; };
using half = __half;
using half2 = __half2;

inline float __half2float(__half value) {
  _Float16 narrow;
  std::memcpy(&narrow, &value, 2);
  return float(narrow);
}
inline __half __float2half_rn(float value) {
  const _Float16 narrow = _Float16(value);
  __half result;
  std::memcpy(&result, &narrow, 2);
  return result;
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline float __low2float(__half2 value) { return __half2float(value.x); }
inline float __high2float(__half2 value) { return __half2float(value.y); }
