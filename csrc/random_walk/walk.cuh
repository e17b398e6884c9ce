// What the CUDA files of the random walk share: the taps of a window that can stay inside the image, and the sums of its columns.
//
// A block has 32 neighbouring pixels, and 8 threads for each of them.
#pragma once

#include "common/cuda_common.cuh"
#include "random_walk/random_walk.h"

namespace afa {

constexpr int kWalkPixels = 32, kWalkGroups = 8, kWalkThreads = kWalkPixels * kWalkGroups;

// The taps of the window that reach from some pixel of the image to another, row-major.
struct WalkTaps {
  View<4> affinity;
  int radius = 0, reach_y = 0, reach_x = 0, height = 0, width = 0;
  float power = 0, eps = 0;

  explicit WalkTaps(const WalkArgs& args) : affinity(args.affinity), power(args.power), eps(args.eps) {
    height = int(affinity.size[2]), width = int(affinity.size[3]), radius = int(args.radius);
    reach_y = radius < height ? radius : height - 1, reach_x = radius < width ? radius : width - 1;
  }
  __host__ __device__ int side() const { return 2 * reach_x + 1; }
  __host__ __device__ int count() const { return (2 * reach_y + 1) * side(); }
  __host__ __device__ int dy(int tap) const { return tap / side() - reach_y; }
  __host__ __device__ int dx(int tap) const { return tap % side() - reach_x; }
  __host__ __device__ int64_t pixels() const { return int64_t(height) * width; }
  __device__ bool inside(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  // A of pixel (y, x) towards (y + dy, x + dx).
  __device__ float at(int64_t b, int dy, int dx, int y, int x) const {
    const int64_t channel = int64_t(dy + radius) * (2 * radius + 1) + dx + radius;
    return load_element(affinity.data, affinity.dtype, offset_of(affinity, b, channel, y) + x * affinity.stride[3]);
  }
  __device__ float powered(float value) const { return power == 2 ? value * value : power == 1 ? value : powf(value, power); }
  __device__ float slope(float value) const { return power == 2 ? 2 * value : power == 1 ? 1.0f : power * powf(value, power - 1); }
};

// The sum of what the threads of one pixel bring, in order; the whole block calls this.
__device__ inline float sum_groups(float value, SharedArray<float> sums) {
  __syncthreads();
  sums[threadIdx.y * kWalkPixels + threadIdx.x] = value;
  __syncthreads();
  float total = 0;
  for (int group = 0; group < kWalkGroups; ++group) total += sums[group * kWalkPixels + threadIdx.x];
  return total;
}

// D of this thread's pixel.
__device__ inline float column_sum(const WalkTaps& taps, int64_t b, bool present, int y, int x, SharedArray<float> sums) {
  float sum = 0;
  if (present)
    for (int tap = threadIdx.y; tap < taps.count(); tap += kWalkGroups) {
      const int dy = taps.dy(tap), dx = taps.dx(tap);
      if (taps.inside(y - dy, x - dx)) sum += taps.powered(taps.at(b, dy, dx, y - dy, x - dx));
    }
  return sum_groups(sum, sums) + taps.eps;
}

// ---- the walk in one launch (fused.cu) ---------------------------------------------------------------------------------------

struct FusedPlan {
  bool one_launch = false;
  int64_t bytes = 0;  // of the workspace
};
FusedPlan plan_fused(const WalkArgs& args, const WalkMasks& masks);
Status launch_fused(const WalkArgs& args, const WalkMasks& masks, void* workspace, void* stream);

}  // namespace afa
