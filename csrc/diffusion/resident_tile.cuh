// A block's tile of a resident diffusion (resident.cuh): its pixels and weights, how masks come in from the buffers between blocks,
// the sum over the taps, and how results go back.
#pragma once

#include <type_traits>

#include "common/async_copy.cuh"
#include "diffusion/plan.h"

namespace afa {

struct ResidentArgs {
  View<4> masks, out;
  const uint8_t* class_mask;
  float* buffers;        // [2][images][present channels][H][row]
  int64_t buffer_size;   // floats from one to the other
  int row;               // floats: the width, rounded up to 16 bytes
  int num_iter, taps;
  bool zero_border;
  ResidentPlan plan;
  int offset[kResidentTaps];              // bytes in a tile: 4 * (dy * pitch + dx)
  int plane_offset[kResidentChannels];    // bytes from the first channel's plane to another's
};

// Where a block's tile lies: image b, its first pixel, and its size without the part that leaves the image.
struct ImageTile {
  int b, y, x, height, width;
};

// The element so many bytes on: taps are kept in bytes, which an instruction adds for nothing.
template <class T>
__device__ __forceinline__ const T& element_at(const SharedArray<T>& from, int bytes) {
#ifdef AFA_CUDA_EMULATOR
  return from[bytes / int(sizeof(T))];
#else
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + bytes);
#endif
}

// ---- pixels and weights --------------------------------------------------------------------------------------------------

// A word holds the weight of one tap (float) or of two consecutive ones (half).
__device__ inline float tap_weight(float word, int) { return word; }
__device__ inline float tap_weight(__half2 word, int tap) { return tap & 1 ? __high2float(word) : __low2float(word); }
template <class Word>
constexpr int kTapsPerWord = std::is_same<Word, __half2>::value ? 2 : 1;

// The weights that a thread holds in registers: of its pixels threadIdx.x and threadIdx.x + blockDim.x.
template <int kHeld>
struct HeldWeights {
  float of[kHeldPixels][kHeld];
};
template <>
struct HeldWeights<0> {};

// Calls visit(p, own) for every pixel p of the tile that is this thread's. `own` takes the weights that are held in registers: they have
// no run-time index, so a pixel's are moved to their place behind, by code that is there once and not for each pixel.
template <int kHeld, class Visit>
__device__ inline void for_own_pixels(int count, HeldWeights<kHeld>& held, Visit visit) {
  if constexpr (kHeld > 0) {
#pragma unroll 1
    for (int j = 0; j < kHeldPixels; ++j) {
      const int p = int(threadIdx.x + j * blockDim.x);
      if (p >= count) break;
      HeldWeights<kHeld> own = {};
      visit(p, own);
#pragma unroll
      for (int to = 0; to < kHeldPixels; ++to)
        if (j == to) {
#pragma unroll
          for (int t = 0; t < kHeld; ++t) held.of[to][t] = own.of[0][t];
        }
    }
  } else {
    for (int p = threadIdx.x; p < count; p += blockDim.x) visit(p, held);
  }
}

// Where pixel p of a tile is in it: the width is a power of two.
struct TilePixel {
  int y, x;
  __device__ TilePixel(const ResidentPlan& plan, int p) : y(p >> plan.tile_shift), x(p & (plan.tile_w - 1)) {}
  __device__ bool inside(const ImageTile& tile) const { return y < tile.height && x < tile.width; }
  __device__ int centre(const ResidentPlan& plan) const { return (y + plan.reach_y) * plan.pitch + x + plan.reach_x; }
};

// Takes and gives one pixel's weights where they stay: below kHeld, where `tap` must be a constant, in registers.
template <class Word, int kHeld>
class WeightKeeper {
 public:
  __device__ WeightKeeper(SharedArray<Word> weights, HeldWeights<kHeld>* held, int count, int p)
      : weights_(weights + p), held_(held), count_(count) {}
  __device__ void hold(int tap, float weight) { held_->of[0][tap] = weight; }
  __device__ float held(int tap) const { return held_->of[0][tap]; }
  // Taps ascending where a word has two.
  __device__ void keep(int tap, float weight) {
    if constexpr (kTapsPerWord<Word> == 1) {
      weights_[(tap - kHeld) * count_] = weight;
    } else {
      if (tap % 2 == 1) weights_[tap / 2 * count_] = __floats2half2_rn(even_, weight);
      even_ = weight;
    }
  }
  __device__ float kept(int tap) const { return tap_weight(weights_[(tap - kHeld) / kTapsPerWord<Word> * count_], tap); }

 private:
  SharedArray<Word> weights_;
  HeldWeights<kHeld>* held_;
  int count_;
  float even_ = 0.0f;
};

// ---- an image of any type and strides into a tile --------------------------------------------------------------------------

template <class Load>
__device__ inline void load_planes(const ResidentPlan& plan, const ImageTile& tile, const View<4>& image, int count,
                                   SharedArray<float> pixels, Load load) {
  constexpr int kRows = 8;  // loads in flight
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, lines = count * plan.rows;
  const int last_y = int(image.size[2]) - 1, last_x = int(image.size[3]) - 1, top = tile.y - plan.reach_y;
  const int64_t begin = tile.b * image.stride[0];
  for (int column = lane; column < plan.tile_w + 2 * plan.reach_x; column += 32) {
    const int64_t at = begin + clamp_to(tile.x - plan.reach_x + column, 0, last_x) * image.stride[3];
    int c = 0, row = warp;
    for (int first = warp; first < lines; first += kRows * warps) {
      float value[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        while (row >= plan.rows) row -= plan.rows, ++c;
        if (c < count) value[k] = load(at + c * image.stride[1] + clamp_to(top + row, 0, last_y) * image.stride[2]);
        row += warps;
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k)
        if (first + k * warps < lines) pixels[(first + k * warps) * plan.pitch + column] = value[k];
    }
  }
}
// Whether its rows can be copied 16 bytes at a time to their ends, by TileReader.
inline bool copies_whole(const View<4>& image) {
  const bool small = image.stride[2] >= 0 && image.size[2] * image.stride[2] < INT32_MAX;
  return image.dtype == DType::f32 && wide_rows(image) && image.size[3] % 4 == 0 && small;
}
// Planes 0 to `count` of image tile.b, with a halo whose border is that of the image, replicated.
__device__ inline void load_tile(const ResidentPlan& plan, const ImageTile& tile, const View<4>& image, int count,
                                 SharedArray<float> pixels) {
  if (image.dtype == DType::f32)
    load_planes(plan, tile, image, count, pixels, [&](int64_t at) { return __ldg(static_cast<const float*>(image.data) + at); });
  else
    load_planes(plan, tile, image, count, pixels, [&](int64_t at) { return load_element(image.data, image.dtype, at); });
}

// ---- masks between blocks ------------------------------------------------------------------------------------------------

// The masks of a tile with its halo, from the buffers to shared memory, 16 bytes a thread at a time. Columns outside the image are in no
// buffer: they are written in shared memory when the others are there. Where weights are in registers all of this is done in two parts,
// first what their taps reach, kNear = 1, then the rest, 0, while those are summed; else in one, -1.
class TileReader {
 public:
  __device__ TileReader(const ResidentArgs& args, const ImageTile& tile) : args_(args), tile_(tile) {
    const int row = int(threadIdx.x) / args.plan.copy_lanes, vector = int(threadIdx.x) - row * args.plan.copy_lanes;
    // All rows, where no whole row of threads is left. Both in one register: they are kept for the whole launch.
    first_ = (row >= args.plan.copy_rows ? args.plan.rows : row) << 16 | vector;
  }
  // Asks for copies of `count` planes from `from` on, so many floats to the next row and plane.
  template <int kNear>
  __device__ __forceinline__ void copy(const float* from, int row_stride, int64_t plane, int count, SharedArray<float> pixels) const {
    const ResidentPlan& plan = args_.plan;
    const int top = tile_.y - plan.reach_y, left = tile_.x - plan.reach_x;
    visit<kNear>([&](int vector, int row) {
      const int x = left + 4 * vector, y = clamp_to(top + row, 0, height() - 1);
      if (x < 0 || x >= width()) return;
      const int valid = args_.zero_border && y != top + row ? 0 : 16;
      const float* line = from + (y * row_stride + x);
      SharedArray<float> to = pixels + (row * plan.pitch + 4 * vector);
#pragma unroll
      for (int c = 0; c < kResidentChannels; ++c) {
        if (c >= count) break;
        copy_async_16<float>(to, line, valid);
        line += plane, to = to + plan.rows * plan.pitch;
      }
    });
  }
  // Once they are there: the columns outside the image. The whole block calls this.
  template <int kNear>
  __device__ __forceinline__ void finish(int count, SharedArray<float> pixels) const {
    const ResidentPlan& plan = args_.plan;
    const int left = tile_.x - plan.reach_x;
    __syncthreads();
    if (left >= 0 && left + 4 * plan.vectors <= width()) return;
    visit<kNear>([&](int vector, int row) {
      const int x = left + 4 * vector;
      if (x >= 0 && x + 4 <= width()) return;
      for (int c = 0; c < count; ++c) {
        const SharedArray<float> line = pixels + (c * plan.rows + row) * plan.pitch;
        const float edge = args_.zero_border ? 0.0f : line[(x < 0 ? 0 : width() - 1) - left];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (x + k < 0 || x + k >= width()) line[4 * vector + k] = edge;
      }
    });
    __syncthreads();
  }

 private:
  __device__ int height() const { return int(args_.masks.size[2]); }
  __device__ int width() const { return int(args_.masks.size[3]); }
  // Calls use(vector, row) for this thread's part of the tile.
  template <int kNear, class Use>
  __device__ __forceinline__ void visit(Use use) const {
    const ResidentPlan& plan = args_.plan;
    for (int vector = first_ & 0xffff; vector < plan.vectors; vector += plan.copy_lanes) {
      const bool column_near = kNear >= 0 && vector >= plan.near_vector && vector < plan.vectors - plan.near_vector;
      if (kNear == 1 && !column_near) continue;
      for (int row = first_ >> 16; row < plan.rows; row += plan.copy_rows) {
        const bool near = column_near && row >= plan.near_row && row < plan.rows - plan.near_row;
        if (kNear < 0 || near == (kNear == 1)) use(vector, row);
      }
    }
  }
  const ResidentArgs& args_;
  const ImageTile& tile_;
  int first_;
};

// ---- the sum over the taps -----------------------------------------------------------------------------------------------

// Sums of kChannels channels of the first `pixels` of kPixels pixels of this thread; so many that `pixels` is the same in a warp.
template <int kChannels, int kPixels>
struct TapSums {
  int pixels;
  SharedArray<float> from[kPixels];  // the pixels themselves, of the first channel
  float of[kPixels][kChannels] = {};

  __device__ __forceinline__ void add(const ResidentArgs& args, int j, int tap, float weight) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      of[j][c] = fmaf(weight, element_at(from[j], args.offset[tap] + args.plane_offset[c]), of[j][c]);
  }
  // Calls add(j) of as many pixels as there are, by code that is made for so many.
  template <class Add>
  __device__ __forceinline__ void each(Add add) {
    if (kPixels > 1 && pixels > 1)
      add(std::integral_constant<int, kPixels>());
    else if (pixels > 0)
      add(std::integral_constant<int, 1>());
  }
  template <int kHeld>
  __device__ __forceinline__ void add_held(const ResidentArgs& args, const HeldWeights<kHeld>& held) {
    each([&](auto count) {
#pragma unroll
      for (int t = 0; t < kHeld; ++t)
#pragma unroll
        for (int j = 0; j < decltype(count)::value; ++j) add(args, j, t, held.of[j][t]);
    });
  }
  // Those from kHeld on, whose weights are in shared memory, `stride` words from tap to tap.
  template <int kHeld, class Word>
  __device__ __forceinline__ void add_shared(const ResidentArgs& args, const SharedArray<Word> (&weights)[kPixels], int stride) {
    constexpr int kEach = kTapsPerWord<Word>;
    const int words = (args.taps - kHeld) / kEach;
    each([&](auto count) {
#pragma unroll 4
      for (int word = 0; word < words; ++word)
#pragma unroll
        for (int j = 0; j < decltype(count)::value; ++j) {
          const Word packed = weights[j][word * stride];
#pragma unroll
          for (int k = 0; k < kEach; ++k) add(args, j, kHeld + word * kEach + k, tap_weight(packed, k));
        }
    });
  }
};

}  // namespace afa
