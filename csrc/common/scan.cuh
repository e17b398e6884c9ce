// Sums of all that came before, within a block.
#pragma once

#include "common/cuda_common.cuh"

namespace afa {

// What the threads before this one in the block bring, summed; total is that of all. The whole block calls this, whole warps;
// scratch holds a number for each warp and one more.
__device__ inline int block_exclusive_sum(int value, SharedArray<int> scratch, int* total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  int sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += before;
  }
  __syncthreads();  // the scratch may still be read
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int all = 0;
    for (int w = 0; w < warps; ++w) {
      const int own = scratch[w];
      scratch[w] = all, all += own;
    }
    scratch[warps] = all;
  }
  __syncthreads();
  *total = scratch[warps];
  return scratch[warp] + sum - value;
}

}  // namespace afa
