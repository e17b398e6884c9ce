// What the CUDA files of the random walk share: the taps of a window that can stay inside the image, and the sums of its columns.
//
// A block has 32 neighbouring pixels and 8 threads for each of them; of small grids in one launch it has 8 pixels and 32 threads for each,
// so that every multiprocessor has work.
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
  // Of a pixel; in 32 bits where they hold it, for 64-bit divisions are long.
  __device__ int row_of(int64_t pixel) const {
    return pixel <= 0x7fffffff ? int(unsigned(pixel) / unsigned(width)) : int(pixel / width);
  }
  // Without branches.
  __device__ bool inside(int y, int x) const { return (unsigned(y) < unsigned(height)) & (unsigned(x) < unsigned(width)); }
  // Where A of pixel (y, x) towards (y + dy, x + dx) is.
  __device__ int64_t offset(int64_t b, int dy, int dx, int y, int x) const {
    const int64_t channel = int64_t(dy + radius) * (2 * radius + 1) + dx + radius;
    return offset_of(affinity, b, channel, y) + x * affinity.stride[3];
  }
  __device__ float at(int64_t b, int dy, int dx, int y, int x) const {
    return load_element(affinity.data, affinity.dtype, offset(b, dy, dx, y, x));
  }
  __device__ float powered(float value) const { return power == 2 ? value * value : power == 1 ? value : powf(value, power); }
  __device__ float slope(float value) const { return power == 2 ? 2 * value : power == 1 ? 1.0f : power * powf(value, power - 1); }
};

// The taps `first`, `first` + `between` and so on: their rows and columns are counted, divisions would cost more than the taps do.
struct TapWalk {
  int tap, dy, dx, between, down, right;
  __device__ TapWalk(const WalkTaps& taps, int first, int between) : tap(first), between(between) {
    const int side = taps.side();
    dy = first / side - taps.reach_y, dx = first % side - taps.reach_x;
    down = between / side, right = between % side;
  }
  __device__ bool here(const WalkTaps& taps) const { return dy <= taps.reach_y; }
  // Whether the next one is `down` + 1 rows on, and so many columns less a row.
  __device__ bool next(const WalkTaps& taps) {
    tap += between, dy += down, dx += right;
    const bool wraps = dx > taps.reach_x;
    dx -= wraps ? taps.side() : 0, dy += wraps;
    return wraps;
  }
};

// The sum of what the threads of one pixel bring, in order: a warp's, then the warps'. The whole block calls this, of kWalkGroups warps
// with kPixels pixels each.
template <int kPixels>
__device__ inline float sum_groups(float value, SharedArray<float> sums) {
#pragma unroll
  for (int distance = kPixels; distance < 32; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  const int pixel = int(threadIdx.x) % kPixels;
  __syncthreads();
  if (int(threadIdx.x) < kPixels) sums[threadIdx.y * kPixels + pixel] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int group = 0; group < kWalkGroups; ++group) total += sums[group * kPixels + pixel];
  return total;
}

// What every `between`th tap, from `first` on, brings to D of pixel (y, x). kOwn: P of the pixel towards each of them as well, handed to
// take(tap, value), 0 outside the image. kBatch taps are loaded before the first is used: here it is latency that costs.
template <class T, int kBatch, bool kGeneral, bool kOwn, class Take>
__device__ inline float add_column(const WalkTaps& taps, int64_t b, int y, int x, int first, int between, const Take& take) {
  const View<4>& view = taps.affinity;
  const T* data = static_cast<const T*>(view.data);
  TapWalk walk(taps, first, between);
  const int whole = 2 * taps.radius + 1;
  const int64_t step = (int64_t(walk.down) * whole + walk.right) * view.stride[1];
  const int64_t wrap = step + int64_t(whole - taps.side()) * view.stride[1];
  const int64_t step_back = step - walk.down * view.stride[2] - walk.right * view.stride[3];
  const int64_t wrap_back = wrap - (walk.down + 1) * view.stride[2] - (walk.right - taps.side()) * view.stride[3];
  const T *to = data + taps.offset(b, walk.dy, walk.dx, y, x), *back = data + taps.offset(b, walk.dy, walk.dx, y - walk.dy, x - walk.dx);
  float sum = 0;
  while (walk.here(taps)) {
    T own[kBatch] = {}, other[kBatch] = {};
    bool own_inside[kBatch], other_inside[kBatch];
    const int tap = walk.tap;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      own_inside[k] = kOwn & walk.here(taps) & taps.inside(y + walk.dy, x + walk.dx);
      other_inside[k] = walk.here(taps) & taps.inside(y - walk.dy, x - walk.dx);
      if (own_inside[k]) own[k] = *to;
      if (other_inside[k]) other[k] = *back;
      const bool wraps = walk.next(taps);
      to += wraps ? wrap : step, back += wraps ? wrap_back : step_back;
    }
    const bool square = taps.power == 2;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const float from = to_float(own[k]), value = to_float(other[k]);
      if (kGeneral) {
        if (kOwn && tap + k * between < taps.count()) take(tap + k * between, own_inside[k] ? powf(from, taps.power) : 0.0f);
        if (other_inside[k]) sum += powf(value, taps.power);
      } else {
        if (kOwn && tap + k * between < taps.count()) take(tap + k * between, square ? from * from : from);
        sum += square ? value * value : value;
      }
    }
  }
  return sum;
}
template <class T, int kBatch, bool kOwn, class Take>
__device__ inline float add_column_as(const WalkTaps& taps, int64_t b, int y, int x, int first, int between, const Take& take) {
  if (taps.power == 1 || taps.power == 2) return add_column<T, kBatch, false, kOwn>(taps, b, y, x, first, between, take);
  return add_column<T, 1, true, kOwn>(taps, b, y, x, first, between, take);
}

// D of this thread's pixel, which has `between` threads; this is `first` of them.
template <int kPixels, int kBatch, bool kOwn, class Take>
__device__ inline float column_sum(const WalkTaps& taps, int64_t b, bool present, int y, int x, int first, int between,
                                   SharedArray<float> sums, const Take& take) {
  float sum = 0;
  if (present) {
    switch (taps.affinity.dtype) {
      case DType::f16: sum = add_column_as<__half, kBatch, kOwn>(taps, b, y, x, first, between, take); break;
      case DType::bf16: sum = add_column_as<__nv_bfloat16, kBatch, kOwn>(taps, b, y, x, first, between, take); break;
      default: sum = add_column_as<float, kBatch, kOwn>(taps, b, y, x, first, between, take);
    }
  }
  return sum_groups<kPixels>(sum, sums) + taps.eps;
}

// ---- the walk in one launch (fused.cu) ---------------------------------------------------------------------------------------

struct FusedPlan {
  bool one_launch = false;
  int64_t bytes = 0;  // of the workspace
};
FusedPlan plan_fused(const WalkArgs& args, const WalkMasks& masks);
Status launch_fused(const WalkArgs& args, const WalkMasks& masks, void* workspace, void* stream);

}  // namespace afa
