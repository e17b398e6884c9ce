// Diffusion with the weights resident on chip: every iteration in one cooperative launch.
//
// Data flow: each block owns a tile of one image. Once, it writes its masks to a buffer, and a WeightSource computes the tile's weights,
// which stay: in shared memory as [taps][pixels], the first 16 taps in registers where that helps (kHeld). Then, for each iteration and
// each group of up to 4 channels, the block copies the masks of its tile with a halo as wide as the farthest tap from the buffer (in L2)
// to shared memory, 16 bytes at a time and without waiting (cp.async): the part that the held taps reach first, so that they are summed
// while the rest of the halo arrives, and the next group of channels while this one is summed. Each pixel sums weight * neighbour over
// its taps and writes the result to the other buffer; a grid-wide barrier ends the iteration. The border is resolved in the tile, so the
// inner loops have no bounds to check. A batch larger than the chip is walked through a few images at a time.
//
// Bound: an image is resident if it can be cut into at most as many tiles as there are multiprocessors, with
//     4 (half: 2) bytes * taps in shared memory * tile pixels + 4 bytes * (1, for PAR 3) * (tile_h + 2 reach) * (tile_w + 2 reach)
// of shared memory a block (227 KB on an H100). On an H100 with PAR's 48 taps reaching 24 pixels that is 352 x 352 pixels in
// float and 416 x 416 in half, any batch, any number of channels. Floor: (taps in shared memory + taps * channels) shared
// loads of 4 bytes per pixel and iteration, 32 a cycle and multiprocessor; beside it two trips of a channel through L2 and one
// barrier.
// Occupancy: diffuse_resident 512 x 1 (threads x blocks a multiprocessor; shared memory decides; 1024 threads without kHeld).
#pragma once

#include <algorithm>

#include "diffusion/resident_tile.cuh"

namespace afa {

// Whether AFA_PLAN can have what it asks for. The adjoint, and fewer than `least` iterations, have but one plan.
inline bool as_wished(const DiffusionArgs& args, const PlanChoice& choice, int64_t least) {
  const PlanWish wish = plan_wish();
  if (wish == PlanWish::unknown) return false;
  return choice.resident || args.transpose || args.num_iter < least || wish != PlanWish::resident;
}

// Two buffers that the masks alternate between.
inline int64_t resident_row(const DiffusionArgs& args) { return round_up(args.masks.size[3], 4); }
inline int64_t resident_workspace(const DiffusionArgs& args, const ResidentPlan& plan) {
  const int64_t pixels = args.masks.size[1] * args.masks.size[2] * resident_row(args);
  return 2 * 4 * round_up(plan.images * pixels, 64);
}

// Zeros in the tile of the channels that are not present.
__device__ inline void clear_absent(const ResidentArgs& args, const ImageTile& tile, int channels) {
  if (args.class_mask == nullptr) return;
  for (int c = 0; c < channels; ++c) {
    if (args.class_mask[tile.b * channels + c] != 0) continue;
    for (int p = threadIdx.x; p < args.plan.pixels(); p += blockDim.x) {
      const TilePixel at(args.plan, p);
      if (!at.inside(tile)) continue;
      store_element(args.out.data, args.out.dtype, offset_of(args.out, tile.b, c, tile.y + at.y) + (tile.x + at.x) * args.out.stride[3], 0.0f);
    }
  }
}

// The masks of the tile's own pixels to the buffer.
__device__ inline void begin_masks(const ResidentArgs& args, const ImageTile& tile, SharedArray<int> present, int found, float* to,
                                   int plane) {
  for (int p = threadIdx.x; p < args.plan.pixels(); p += blockDim.x) {
    const TilePixel at(args.plan, p);
    if (!at.inside(tile)) continue;
    const int64_t from = offset_of(args.masks, tile.b, 0, tile.y + at.y) + (tile.x + at.x) * args.masks.stride[3];
#pragma unroll 4
    for (int c = 0; c < found; ++c) {
      const float value = load_element(args.masks.data, args.masks.dtype, from + present[c] * args.masks.stride[1]);
      __stcg(to + int64_t(c) * plane + (tile.y + at.y) * args.row + tile.x + at.x, value);
    }
  }
}

// One iteration of kChannels channels, whose tile is on its way. `write(c, y, x, value)` takes the result. kPixels: of a thread at once.
template <int kChannels, class Word, int kHeld, class Write>
__device__ __forceinline__ void gather_tile(const ResidentArgs& args, const ImageTile& tile, SharedArray<Word> weights,
                                            const HeldWeights<kHeld>& held, const TileReader& reader, SharedArray<float> pixels,
                                            Write write) {
  constexpr int kPixels = kHeld > 0 ? kHeldPixels : 1;
  const ResidentPlan& plan = args.plan;
  const int count = plan.pixels();
  wait_copies<kHeld == 0 ? 2 : 3>();
  reader.finish<kHeld == 0 ? -1 : 1>(kChannels, pixels);
  auto warps_first = [](int p) { return p & ~31; };
  for (int begin = threadIdx.x; kHeld > 0 ? begin == int(threadIdx.x) : warps_first(begin) < count; begin += kPixels * int(blockDim.x)) {
    bool present[kPixels];
    SharedArray<Word> own[kPixels];
    TapSums<kChannels, kPixels> sums;
    sums.pixels = 0;
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const int p = begin + j * int(blockDim.x);
      sums.pixels += warps_first(p) < count;
      present[j] = p < count && TilePixel(plan, p).inside(tile);
      const int taken = present[j] ? p : 0;  // pixel 0 for one that is not there: its sum is not written
      sums.from[j] = pixels + TilePixel(plan, taken).centre(plan), own[j] = weights + taken;
    }
    if constexpr (kHeld > 0) {
      sums.template add_held<kHeld>(args, held);
      wait_copies<2>();
      reader.finish<0>(kChannels, pixels);
    }
    sums.template add_shared<kHeld, Word>(args, own, count);
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const TilePixel at(plan, begin + j * int(blockDim.x));
      if (!present[j]) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) write(c, tile.y + at.y, tile.x + at.x, sums.of[j][c]);
    }
  }
}

template <class Word, int kHeld, class Source>
__global__ void __launch_bounds__(resident_threads(kHeld), 1)
    diffuse_resident(const __grid_constant__ ResidentArgs args, const __grid_constant__ Source source) {
  const ResidentPlan& plan = args.plan;
  const int channels = int(args.masks.size[1]), height = int(args.masks.size[2]), width = int(args.masks.size[3]);
  const int plane = height * args.row;  // at most 2^24 pixels are resident
  SharedArena arena;
  SharedArray<Word> weights = arena.take<Word>(int64_t((args.taps - kHeld) / kTapsPerWord<Word>) * plan.pixels());
  SharedArray<float> pixels = arena.take<float>(int64_t(plan.planes) * plan.rows * plan.pitch);
  SharedArray<int> present = arena.take<int>(channels + 1);
  SharedArray<int> loop = arena.take<int>(2);  // channels that are present, the group that is summed: registers are short

  const int slot = int(blockIdx.z);
  ImageTile tile;
  tile.y = int(blockIdx.y) * plan.tile_h, tile.x = int(blockIdx.x) * plan.tile_w;
  tile.height = min(plan.tile_h, height - tile.y), tile.width = min(plan.tile_w, width - tile.x);
  auto buffer = [&](int which) { return args.buffers + which * args.buffer_size + int64_t(slot) * channels * plane; };
  const TileReader reader(args, tile);
  int turn = 0;  // twice the iterations that are left, and the buffer that is read: in one register

  const int batch = int(args.masks.size[0]);
  for (tile.b = slot; tile.b - slot < batch; tile.b += plan.images) {
    HeldWeights<kHeld> held = {};  // anew for each image: nothing of the last one's is to be kept meanwhile
    int found = 0;
    if (tile.b < batch) {
      found = present_channels(args.class_mask, tile.b, channels, present);
      clear_absent(args, tile, channels);
      // The other buffer may still be read, by blocks that are at the last images' last iteration.
      begin_masks(args, tile, present, found, buffer(turn), plane);
      if (found > 0) source.template fill<Word, kHeld>(args, tile, reader, weights, held, pixels);
    }
    if (threadIdx.x == 0) loop[0] = found;
    for (turn += 2 * args.num_iter; turn >= 2; turn = (turn - 2) ^ 1) {
      const bool last = turn < 4;
      if (threadIdx.x == 0) loop[1] = 0;
      cooperative_groups::this_grid().sync();  // what the neighbours wrote is there
      const float* from = buffer(turn & 1);
      float* to = buffer(~turn & 1);
      // Two groups of copies for each group of channels, empty ones behind the last.
      auto copy = [&](int group) {
        const int begin = group * plan.channels, count = min(plan.channels, loop[0] - begin);
        const SharedArray<float> into = pixels + group % plan.stages * plan.channels * plan.rows * plan.pitch;
        if (kHeld > 0 && count > 0) reader.template copy<1>(from + int64_t(begin) * plane, args.row, plane, count, into);
        commit_copies();
        if (count > 0) reader.template copy<(kHeld > 0 ? 0 : -1)>(from + int64_t(begin) * plane, args.row, plane, count, into);
        commit_copies();
      };
      copy(0);
      if (plan.stages == 2) copy(1);
      while (loop[1] * plan.channels < loop[0]) {
        if (plan.stages == 1) commit_copies(), commit_copies();
        const SharedArray<float> masks = pixels + loop[1] % plan.stages * plan.channels * plan.rows * plan.pitch;
        auto write = [&](int c, int y, int x, float value) {
          const int channel = loop[1] * plan.channels + c;
          if (last)
            store_element(args.out.data, args.out.dtype,
                          offset_of(args.out, tile.b, present[channel], y) + x * args.out.stride[3], value);
          else
            __stcg(to + int64_t(channel) * plane + y * args.row + x, value);
        };
        switch (min(plan.channels, loop[0] - loop[1] * plan.channels)) {
          case 1: gather_tile<1>(args, tile, weights, held, reader, masks, write); break;
          case 2: gather_tile<2>(args, tile, weights, held, reader, masks, write); break;
          case 3: gather_tile<3>(args, tile, weights, held, reader, masks, write); break;
          default: gather_tile<4>(args, tile, weights, held, reader, masks, write);
        }
        __syncthreads();  // the tile's last readers are done
        if (threadIdx.x == 0) ++loop[1];
        __syncthreads();
        copy(loop[1] + plan.stages - 1);
      }
      wait_copies<0>();
      __syncthreads();
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
  ResidentArgs resident = {};
  resident.masks = args.masks, resident.out = args.out, resident.class_mask = args.class_mask;
  resident.buffers = static_cast<float*>(workspace), resident.buffer_size = resident_workspace(args, plan) / 8;
  resident.row = int(resident_row(args)), resident.num_iter = int(std::min<int64_t>(args.num_iter, 1 << 29)), resident.taps = int(args.taps);
  resident.zero_border = args.border == Border::zero, resident.plan = plan;
  for (int64_t t = 0; t < args.taps; ++t)
    resident.offset[t] = 4 * (clamp_to(args.offsets[2 * t], -plan.reach_y, plan.reach_y) * plan.pitch +
                              clamp_to(args.offsets[2 * t + 1], -plan.reach_x, plan.reach_x));
  for (int c = 0; c < kResidentChannels; ++c) resident.plane_offset[c] = 4 * c * plan.rows * plan.pitch;
  LaunchShape shape;
  shape.grid = dim3(unsigned(plan.tiles_x), unsigned(plan.tiles_y), unsigned(plan.images)), shape.block = dim3(unsigned(plan.threads));
  shape.shared_bytes = plan.shared_bytes, shape.cooperative = true;
  if (plan.half) return launch(diffuse_resident<__half2, 0, Source>, shape, stream, resident, source);
  if (plan.held > 0) return launch(diffuse_resident<float, kHeldTaps, Source>, shape, stream, resident, source);
  return launch(diffuse_resident<float, 0, Source>, shape, stream, resident, source);
}

}  // namespace afa
