// What every CUDA source shares: the launch, shared memory, element access, the list of present channels.
//
// Kernels are launched by launch() alone and take shared memory from SharedArena alone, never by <<<>>> or __shared__, so that
// the same sources also compile as C++ and run thread by thread on a CPU (tests/support/cuda_emulator).
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>
#include <utility>

#include "common/common.h"
#include "common/device.h"

namespace afa {

// ---- launching -----------------------------------------------------------------------------------------------------------

struct LaunchShape {
  dim3 grid, block;
  int64_t shared_bytes = 0;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream, Arguments&&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    const Status allowed = allow_shared_memory(reinterpret_cast<const void*>(kernel));
    if (allowed != Status::ok) return allowed;
  }
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid, config.blockDim = shape.block;
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative, config.numAttrs = shape.cooperative ? 1 : 0;
  const Status status = cuda_failed(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  return status != Status::ok && shape.cooperative && cuda_found_no_room() ? cooperative_refused() : status;
}

// Returns at the first launch that fails.
#define AFA_TRY(expression)                                            \
  do {                                                                 \
    const ::afa::Status afa_status = (expression);                     \
    if (afa_status != ::afa::Status::ok) return afa_status;            \
  } while (0)

// Grid dimensions y and z end at 65535; kernels walk over the rest with a stride of gridDim.
inline unsigned grid_limit(int64_t blocks) { return unsigned(blocks < 65535 ? blocks : 65535); }
inline int64_t blocks_for(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

// ---- shared memory -------------------------------------------------------------------------------------------------------

#ifdef AFA_CUDA_EMULATOR
template <class T>
using SharedArray = emulator::Shared<T>;
__device__ inline unsigned char* shared_memory() { return emulator::shared_begin(); }
#else
template <class T>
using SharedArray = T*;
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char afa_shared_memory[];
  return afa_shared_memory;
}
#endif

// Hands out the block's dynamic shared memory front to back, each array on a 16-byte boundary.
class SharedArena {
 public:
  template <class T>
  __device__ SharedArray<T> take(int64_t count) {
    T* array = reinterpret_cast<T*>(shared_memory() + used_);
    used_ += bytes<T>(count);
#ifdef AFA_CUDA_EMULATOR
    if (used_ > emulator::shared_size()) emulator::fail("the shared arrays are larger than the launch said", {});
    return SharedArray<T>(array, count);
#else
    return array;
#endif
  }
  template <class T>
  __host__ __device__ static int64_t bytes(int64_t count) {
    return (count * int64_t(sizeof(T)) + 15) / 16 * 16;
  }

 private:
  int64_t used_ = 0;
};

// ---- elements ------------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ inline T from_float(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else if constexpr (std::is_same<T, __half>::value)
    return __float2half_rn(value);
  else
    return __float2bfloat16_rn(value);
}

__device__ inline float load_element(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f16: return __half2float(static_cast<const __half*>(data)[at]);
    case DType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}
__device__ inline void store_element(void* data, DType dtype, int64_t at, float value) {
  switch (dtype) {
    case DType::f16: static_cast<__half*>(data)[at] = __float2half_rn(value); break;
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value); break;
    default: static_cast<float*>(data)[at] = value;
  }
}

// Offset of an element, in 64 bits: a view may have more than 2^31 elements.
template <int N>
__host__ __device__ inline int64_t offset_of(const View<N>& view, int64_t b, int64_t c, int64_t y) {
  return b * view.stride[0] + c * view.stride[1] + y * view.stride[2];
}

// The elements of 16 bytes, and whether every row lies in one piece and begins on a boundary of so many.
inline int64_t vector_elements(const View<4>& view) { return 16 / element_bytes(view.dtype); }
inline bool wide_rows(const View<4>& view) {
  bool wide = view.stride[3] == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) wide = wide && view.stride[i] % vector_elements(view) == 0;
  return wide;
}

__host__ __device__ inline int clamp_to(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

// ---- classes -------------------------------------------------------------------------------------------------------------

// The channels of image b that class_mask [B][C] keeps (all for null), ascending, in `list`; returns how many. The whole block
// calls this, with at least one full warp; list holds `channels` numbers and one more.
__device__ inline int present_channels(const uint8_t* class_mask, int64_t b, int channels, SharedArray<int> list) {
  const int thread = int((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  __syncthreads();  // the list may still be read
  if (thread < 32) {
    int found = 0;
    for (int first = 0; first < channels; first += 32) {
      const int c = first + thread;
      const bool here = c < channels && (class_mask == nullptr || class_mask[b * channels + c] != 0);
      const unsigned votes = __ballot_sync(0xffffffffu, here);
      if (here) list[found + __popc(votes & ((1u << thread) - 1u))] = c;
      found += __popc(votes);
    }
    if (thread == 0) list[channels] = found;
  }
  __syncthreads();
  return list[channels];
}

}  // namespace afa
