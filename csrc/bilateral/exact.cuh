// What the kernels of the exact filter (exact.cu) share: tiles of pixels in memory, their boxes, the weights of pairs.
#pragma once

#include "bilateral/bilateral.h"
#include "common/block.cuh"
#include "common/cuda_common.cuh"
#include "common/tensor_cores.cuh"

namespace afa {

constexpr int kTile = 64;         // pixels of a tile
constexpr int kFeatures = 5;      // x, y, r, g, b
constexpr int kTileFeatures = kTile * kFeatures;
constexpr int kExactThreads = 128;
constexpr int kBins = 128;        // of half the squared distance: what is farther weighs under exp(-128)
constexpr int kSteps = kTile / 16;
constexpr float kLeftOut = 1e-6f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kRaised = 15.0f;  // weights times 2^15: in half precision those down to 2^-29 keep all digits, sums up to 2^30 none lost

// A group of images, their pixels sorted: image b (counted in the group) has the places [b * count, (b + 1) * count).
struct ExactPixels {
  View<4> images, values, out;
  float scale_xy = 0, scale_rgb = 0;  // 1 / (2 sigma^2)
  int64_t first = 0, batch = 0;       // of the group
  int64_t count = 0, tiles = 0, rows = 0;  // pixels, tiles of an image, and tiles rounded up to what blocks take
  int channels = 0, blocks = 0, parts = 1;  // blocks: of 8 channels
  uint32_t *keys = nullptr, *sorted_keys = nullptr;  // [batch * count]
  int32_t* order = nullptr;       // [batch * count] pixel at each place
  int32_t* places = nullptr;      // [batch * count] place of each pixel
  float* features = nullptr;      // [batch][rows][5][64], not scaled
  float* boxes = nullptr;         // [batch][10][rows]: low, then high
  uint4* packed = nullptr;        // [batch][tiles][blocks][4][32]: values as the fragments of tensor cores, high parts and low parts
  float* factors = nullptr;       // [batch][tiles][blocks * 8]: of those values; -1: not finite, and packed as 0
  int32_t* special = nullptr;     // [batch][tiles]: whether there is a channel whose values are not finite
  float* sums = nullptr;          // [parts][batch][rows * 64][blocks * 8]
  unsigned long long* counted = nullptr;

  __host__ __device__ int64_t stride() const { return int64_t(blocks) * 8; }
  __device__ float scale(int k) const { return k < 2 ? scale_xy : scale_rgb; }
  // What image b's part of sums begins with, in floats.
  __device__ int64_t sums_at(int part, int64_t b) const { return (part * batch + b) * rows * kTile * stride(); }
};

__device__ inline bool is_finite(float value) { return value * 0.0f == 0.0f; }

// 2^x, 0 below 2^-126.
__device__ inline float exp2_of(float x) {
#if defined(AFA_CUDA_EMULATOR)
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#endif
}

// ---- boxes ---------------------------------------------------------------------------------------------------------------

// Half the squared distance of the nearest points of two boxes, and of the farthest; own: [10] low, high.
struct Reach {
  float nearest, farthest;
};
__device__ inline Reach reach_of(const ExactPixels& pixels, int64_t b, int64_t tile, SharedArray<float> own) {
  const float* other = pixels.boxes + b * 2 * kFeatures * pixels.rows + tile;
  Reach reach = {0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < kFeatures; ++k) {
    const float low = other[k * pixels.rows], high = other[(kFeatures + k) * pixels.rows];
    const float gap = fmaxf(0.0f, fmaxf(low - own[kFeatures + k], own[k] - high));
    const float across = fmaxf(high - own[k], own[kFeatures + k] - low);
    reach.nearest += gap * gap * pixels.scale(k), reach.farthest += across * across * pixels.scale(k);
  }
  return reach;
}
__device__ inline int pixels_of(const ExactPixels& pixels, int64_t tile) {
  const int64_t left = pixels.count - tile * kTile;
  return int(left < kTile ? left : kTile);
}

// ---- values --------------------------------------------------------------------------------------------------------------

// Two numbers as half precision, and what that leaves of them.
struct Halves {
  unsigned high, low;
  __device__ Halves(float a, float b) {
    const __half2 rounded = __floats2half2_rn(a, b);
    const __half2 rest = __floats2half2_rn(a - __low2float(rounded), b - __high2float(rounded));
    memcpy(&high, &rounded, 4), memcpy(&low, &rest, 4);
  }
};

__device__ inline int64_t packed_at(const ExactPixels& pixels, int64_t b, int64_t tile, int block, int step) {
  return (((b * pixels.tiles + tile) * pixels.blocks + block) * kSteps + step) * 32;
}

// Value of one pixel of a tile: from the fragments, or where they are not finite from the tensor.
__device__ inline float value_of(const ExactPixels& pixels, int64_t b, int64_t tile, int j, int channel) {
  const float factor = pixels.factors[(b * pixels.tiles + tile) * pixels.stride() + channel];
  if (factor < 0.0f) {
    const int64_t place = tile * kTile + j;
    if (place >= pixels.count) return 0.0f;
    const int64_t pixel = pixels.order[b * pixels.count + place] - b * pixels.count, width = pixels.values.size[3];
    const View<4>& values = pixels.values;
    return load_element(values.data, values.dtype,
                        offset_of(values, pixels.first + b, channel, pixel / width) + pixel % width * values.stride[3]);
  }
  const int lane = channel % 8 * 4 + j % 8 / 2;
  const uint4& both = pixels.packed[packed_at(pixels, b, tile, channel / 8, j / 16) + lane];
  __half2 high, low;
  memcpy(&high, j % 16 < 8 ? &both.x : &both.y, 4), memcpy(&low, j % 16 < 8 ? &both.z : &both.w, 4);
  const float value = j % 2 ? __high2float(high) + __high2float(low) : __low2float(high) + __low2float(low);
  return value * factor * exp2_of(kRaised);
}

// ---- what exact.cu asks for ----------------------------------------------------------------------------------------------

Status sort_pixels(const ExactPixels& pixels, void* scratch, void* stream);
Status pack_tiles(const ExactPixels& pixels, void* stream);
Status add_special(const ExactPixels& pixels, void* stream);
Status unpack_sums(const ExactPixels& pixels, void* stream);

}  // namespace afa
