// What the threads of a block find out together: sums and maxima, in a fixed order, and which block comes last. `warps` of the block, for
// kernels that know them when they are compiled.
#pragma once

#include "common/cuda_common.cuh"

namespace afa {

template <class T>
__device__ inline T block_sum(T value, SharedArray<T> scratch, int warps = int(blockDim.x) / 32) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
  return total;
}
__device__ inline float block_max(float value, SharedArray<float> scratch, int warps = int(blockDim.x) / 32) {
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float largest = scratch[0];
  for (int warp = 1; warp < warps; ++warp) largest = fmaxf(largest, scratch[warp]);
  return largest;
}

// True in every thread of the block that comes last, which then sees what all others have written to global memory.
__device__ inline bool comes_last(unsigned* counter, SharedArray<int> scratch) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // One thread's fences stand for the block: what others did before the barrier comes before them. Each thread's own would have all
    // of them wait for their results to arrive.
    __threadfence();
    scratch[0] = atomicAdd(counter, 1u) == gridDim.x * gridDim.y * gridDim.z - 1;
    __threadfence();
  }
  __syncthreads();
  return scratch[0] != 0;
}

}  // namespace afa
