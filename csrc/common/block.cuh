// What the threads of a block find out together: sums and maxima, in a fixed order, and which block comes last.
#pragma once

#include "common/cuda_common.cuh"

namespace afa {

template <class T>
__device__ inline T block_sum(T value, SharedArray<T> scratch) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += scratch[warp];
  return total;
}
__device__ inline float block_max(float value, SharedArray<float> scratch) {
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float largest = scratch[0];
  for (int warp = 1; warp < int(blockDim.x) / 32; ++warp) largest = fmaxf(largest, scratch[warp]);
  return largest;
}

// True in every thread of the block that comes last, which then sees what all others have written to global memory.
__device__ inline bool comes_last(unsigned* counter, SharedArray<int> scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) scratch[0] = atomicAdd(counter, 1u) == gridDim.x * gridDim.y * gridDim.z - 1;
  __syncthreads();
  __threadfence();
  return scratch[0] != 0;
}

}  // namespace afa
