// Diffusion with the weights resident on chip: every iteration in one cooperative launch.
//
// Data flow: each block owns a tile of one image. Once, a WeightSource computes the tile's weights, which stay: in shared memory
// as [taps][pixels], the first 24 taps in registers where that helps (kHeld). Then, for each iteration and each group of up to 4
// channels, the block loads the masks of its tile with a halo as wide as the farthest tap (the border is resolved in that load,
// so the inner loop has no bounds to check), and each pixel sums weight * neighbour over its taps. Masks travel between the
// blocks through the workspace (in L2), with a grid-wide barrier between iterations. A batch larger than the chip is walked
// through a few images at a time.
//
// Bound: an image is resident if it can be cut into at most as many tiles as there are multiprocessors, with
//     4 (half: 2) bytes * taps in shared memory * tile pixels + 4 bytes * (1, for PAR 3) * (tile_h + 2 reach) * (tile_w + 2 reach)
// of shared memory a block (227 KB on an H100). On an H100 with PAR's 48 taps reaching 24 pixels that is 352 x 352 pixels in
// float and 416 x 416 in half, any batch, any number of channels. Floor: (taps in shared memory + taps * channels) shared
// loads of 4 bytes per pixel and iteration, 32 a cycle and multiprocessor; beside it two trips of a channel through L2 and one
// barrier.
// Occupancy: diffuse_resident 512 x 1 (threads x blocks a multiprocessor; shared memory decides; 1024 threads without kHeld).
#pragma once

#include <type_traits>

#include "common/cuda_common.cuh"
#include "diffusion/plan.h"

namespace afa {

// Whether AFA_PLAN can have what it asks for. The adjoint, and fewer than `least` iterations, have but one plan.
inline bool as_wished(const DiffusionArgs& args, const PlanChoice& choice, int64_t least) {
  const PlanWish wish = plan_wish();
  if (wish == PlanWish::unknown) return false;
  return choice.resident || args.transpose || args.num_iter < least || wish != PlanWish::resident;
}

// Two buffers that the masks alternate between.
inline int64_t resident_workspace(const DiffusionArgs& args, const ResidentPlan& plan) {
  const int64_t pixels = args.masks.size[1] * args.masks.size[2] * args.masks.size[3];
  return args.num_iter > 1 ? 2 * 4 * round_up(plan.images * pixels, 64) : 0;
}

struct ResidentArgs {
  View<4> masks, out;
  const uint8_t* class_mask;
  float* buffers;        // [2][images][present channels][H][W]
  int64_t buffer_size;   // floats from one to the other
  int64_t num_iter;
  int taps;
  bool zero_border;
  ResidentPlan plan;
  int offset[kResidentTaps];  // dy * pitch + dx
};

// Where a block's tile lies: image b, its first pixel, and its size without the part that leaves the image.
struct ImageTile {
  int64_t b;
  int y, x, height, width;
};

// A word holds the weight of one tap (float) or of two consecutive ones (half).
__device__ inline float tap_weight(float word, int) { return word; }
__device__ inline float tap_weight(__half2 word, int tap) { return tap & 1 ? __high2float(word) : __low2float(word); }
template <class Word>
constexpr int kTapsPerWord = std::is_same<Word, __half2>::value ? 2 : 1;

// Loads `count` planes of a tile with its halo. `read(c, y, x)` gives the pixel of plane c at a place inside the image.
// Several loads are in flight before the first is stored.
template <class Read>
__device__ inline void load_tile(const ResidentPlan& plan, const ImageTile& tile, int64_t height, int64_t width, bool zero_border,
                                 int count, SharedArray<float> pixels, Read read) {
  constexpr int kRows = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int columns = plan.tile_w + 2 * plan.reach_x;
  for (int column = lane; column < columns; column += 32) {
    const int wanted_x = tile.x - plan.reach_x + column, x = clamp_to(wanted_x, 0, int(width) - 1);
    for (int first = warp; first < count * plan.rows; first += kRows * warps) {
      float value[kRows] = {};
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int line = first + k * warps, c = line / plan.rows;
        if (c >= count) continue;
        const int wanted_y = tile.y - plan.reach_y + line - c * plan.rows, y = clamp_to(wanted_y, 0, int(height) - 1);
        if (!zero_border || (x == wanted_x && y == wanted_y)) value[k] = read(c, y, x);
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k)
        if (first + k * warps < count * plan.rows) pixels[(first + k * warps) * plan.pitch + column] = value[k];
    }
  }
}

// The weights that a thread holds in registers: of its pixels threadIdx.x and threadIdx.x + blockDim.x.
template <int kHeld>
struct HeldWeights {
  float of[kHeldPixels][kHeld];
};
template <>
struct HeldWeights<0> {};

// Calls visit(p, j) for every pixel p of the tile that is this thread's, j counting them. Unrolled where weights are held, so that
// j is a constant there: registers have no run-time index.
template <int kHeld, class Visit>
__device__ inline void for_own_pixels(int count, Visit visit) {
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int j = 0; j < kHeldPixels; ++j) {
      const int p = int(threadIdx.x + j * blockDim.x);
      if (p < count) visit(p, j);
    }
  } else {
    for (int p = threadIdx.x; p < count; p += blockDim.x) visit(p, 0);
  }
}

// One iteration of kChannels channels, whose tile is loaded. `write(c, y, x, value)` takes the result.
template <int kChannels, int kHeld, class Word, class Write>
__device__ inline void gather_tile(const ResidentArgs& args, const ImageTile& tile, SharedArray<Word> weights,
                                   const HeldWeights<kHeld>& held, SharedArray<float> pixels, Write write) {
  const ResidentPlan& plan = args.plan;
  const int count = plan.pixels(), plane = plan.rows * plan.pitch;
  for_own_pixels<kHeld>(count, [&](int p, int j) {
    const int y = p / plan.tile_w, x = p - y * plan.tile_w;
    if (y >= tile.height || x >= tile.width) return;
    const int centre = (y + plan.reach_y) * plan.pitch + x + plan.reach_x;
    float sum[kChannels] = {};
    auto add = [&](float weight, int tap) {
      const int from = centre + args.offset[tap];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(weight, pixels[from + c * plane], sum[c]);
    };
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int t = 0; t < kHeld; ++t) add(held.of[j][t], t);
    }
#pragma unroll 4
    for (int word = 0; word < (args.taps - kHeld) / kTapsPerWord<Word>; ++word) {
      const Word packed = weights[word * count + p];
#pragma unroll
      for (int k = 0; k < kTapsPerWord<Word>; ++k) add(tap_weight(packed, k), kHeld + word * kTapsPerWord<Word> + k);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) write(c, tile.y + y, tile.x + x, sum[c]);
  });
}

// Zeros in the tile of the channels that are not present.
__device__ inline void clear_absent(const ResidentArgs& args, const ImageTile& tile, int channels) {
  if (args.class_mask == nullptr) return;
  for (int c = 0; c < channels; ++c) {
    if (args.class_mask[tile.b * channels + c] != 0) continue;
    for (int p = threadIdx.x; p < tile.height * tile.width; p += blockDim.x) {
      const int y = p / tile.width, x = p - y * tile.width;
      store_element(args.out.data, args.out.dtype, offset_of(args.out, tile.b, c, tile.y + y) + (tile.x + x) * args.out.stride[3], 0.0f);
    }
  }
}

template <class Word, int kHeld, class Source>
__global__ void __launch_bounds__(resident_threads(kHeld), 1)
    diffuse_resident(const __grid_constant__ ResidentArgs args, const __grid_constant__ Source source) {
  const ResidentPlan& plan = args.plan;
  const int channels = int(args.masks.size[1]), planes = plan.channels > Source::kPlanes ? plan.channels : Source::kPlanes;
  const int64_t height = args.masks.size[2], width = args.masks.size[3], image = height * width;
  SharedArena arena;
  SharedArray<Word> weights = arena.take<Word>(int64_t((args.taps - kHeld) / kTapsPerWord<Word>) * plan.pixels());
  HeldWeights<kHeld> held;
  SharedArray<float> pixels = arena.take<float>(int64_t(planes) * plan.rows * plan.pitch);
  SharedArray<int> present = arena.take<int>(channels + 1);

  const int tiles = plan.tiles_y * plan.tiles_x, slot = blockIdx.x / tiles, place = blockIdx.x % tiles;
  ImageTile tile;
  tile.y = place / plan.tiles_x * plan.tile_h, tile.x = place % plan.tiles_x * plan.tile_w;
  tile.height = min(plan.tile_h, int(height) - tile.y), tile.width = min(plan.tile_w, int(width) - tile.x);

  for (int64_t first = 0; first < args.masks.size[0]; first += plan.images) {
    tile.b = first + slot;
    const bool idle = tile.b >= args.masks.size[0];
    int found = 0;
    if (!idle) {
      found = present_channels(args.class_mask, tile.b, channels, present);
      clear_absent(args, tile, channels);
      if (found > 0) source.template fill<Word, kHeld>(args, tile, weights, held, pixels);
    }
    for (int64_t iteration = 0; iteration < args.num_iter; ++iteration) {
      const bool last = iteration + 1 == args.num_iter;
      const float* from = args.buffers + (iteration & 1) * args.buffer_size + slot * channels * image;
      float* to = args.buffers + (~iteration & 1) * args.buffer_size + slot * channels * image;
      for (int begin = 0; begin < found; begin += plan.channels) {
        const int count = min(plan.channels, found - begin);
        __syncthreads();  // the tile's last readers are done; its first: the weights
        if (iteration == 0)
          load_tile(plan, tile, height, width, args.zero_border, count, pixels, [&](int c, int y, int x) {
            return load_element(args.masks.data, args.masks.dtype,
                                offset_of(args.masks, tile.b, present[begin + c], y) + x * args.masks.stride[3]);
          });
        else
          load_tile(plan, tile, height, width, args.zero_border, count, pixels,
                    [&](int c, int y, int x) { return __ldcg(from + (begin + c) * image + y * width + x); });
        __syncthreads();
        auto write = [&](int c, int y, int x, float value) {
          if (last)
            store_element(args.out.data, args.out.dtype,
                          offset_of(args.out, tile.b, present[begin + c], y) + x * args.out.stride[3], value);
          else
            __stcg(to + (begin + c) * image + y * width + x, value);
        };
        switch (count) {
          case 1: gather_tile<1>(args, tile, weights, held, pixels, write); break;
          case 2: gather_tile<2>(args, tile, weights, held, pixels, write); break;
          case 3: gather_tile<3>(args, tile, weights, held, pixels, write); break;
          default: gather_tile<4>(args, tile, weights, held, pixels, write);
        }
      }
      // The next iteration reads what the neighbours wrote; the next images reuse the buffers.
      const bool more = first + plan.images < args.masks.size[0] && args.num_iter > 1;
      if (!last || more) cooperative_groups::this_grid().sync();
    }
  }
}

// The diffusion of what is not resident, streaming the weights; `padded`: rows of args.weights may be read up to the next multiple
// of 16 bytes. Defined in stream.cu.
int64_t stream_workspace(const DiffusionArgs& args);
Status stream_diffusion(const DiffusionArgs& args, bool padded, void* workspace, void* stream);

// Launches the plan. The arguments are those it was made for.
template <class Source>
Status launch_resident(const DiffusionArgs& args, const ResidentPlan& plan, const Source& source, void* workspace, void* stream) {
  ResidentArgs resident = {args.masks, args.out, args.class_mask, static_cast<float*>(workspace),
                           resident_workspace(args, plan) / 8, args.num_iter, int(args.taps), args.border == Border::zero, plan, {}};
  for (int64_t t = 0; t < args.taps; ++t)
    resident.offset[t] = clamp_to(args.offsets[2 * t], -plan.reach_y, plan.reach_y) * plan.pitch +
                         clamp_to(args.offsets[2 * t + 1], -plan.reach_x, plan.reach_x);
  LaunchShape shape;
  shape.grid = dim3(unsigned(plan.blocks())), shape.block = dim3(unsigned(plan.threads));
  shape.shared_bytes = plan.shared_bytes, shape.cooperative = true;
  if (plan.half) return launch(diffuse_resident<__half2, 0, Source>, shape, stream, resident, source);
  if (plan.held > 0) return launch(diffuse_resident<float, kHeldTaps, Source>, shape, stream, resident, source);
  return launch(diffuse_resident<float, 0, Source>, shape, stream, resident, source);
}

// Takes one pixel's weights in the order of the taps and puts each where it stays: by hold() below kHeld, where `tap` must be a
// constant, by keep() from there on.
template <class Word, int kHeld>
class WeightKeeper {
 public:
  __device__ WeightKeeper(SharedArray<Word> weights, HeldWeights<kHeld>* held, int count, int p, int j)
      : weights_(weights), held_(held), count_(count), p_(p), j_(j) {}
  __device__ void hold(int tap, float weight) { held_->of[j_][tap] = weight; }
  __device__ void keep(int tap, float weight) {
    if constexpr (kTapsPerWord<Word> == 1) {
      weights_[(tap - kHeld) * count_ + p_] = weight;
    } else {
      if (tap % 2 == 1) weights_[tap / 2 * count_ + p_] = __floats2half2_rn(even_, weight);
      even_ = weight;
    }
  }

 private:
  SharedArray<Word> weights_;
  HeldWeights<kHeld>* held_;
  int count_, p_, j_;
  float even_ = 0.0f;
};

}  // namespace afa
