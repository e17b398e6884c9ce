// Which plan a diffusion takes on a GPU: weights resident on chip (resident.cuh) or streamed in every iteration (stream.cu).
//
// Both are costed, in microseconds an iteration of the whole batch, from the card's row in plan_table.h:
//   resident   rounds of images * (shared-memory words of a block: weights, neighbours; its halo of pixels from L2; a round trip for
//              each group of channels; one grid barrier)
//   streaming  a launch, and the greater of: weights read once for each group of up to 7 channels (from L2 if they and the masks stay
//              there, else from memory); taps * channels neighbours a pixel, through L1. PAR's weights are written once as well.
// The halo grows with the reach of the taps and not with the tile, so resident tiles of 25 x 32 read 7.3 values a pixel and channel;
// streaming reads 48 / min(C, 7) weights instead. Resident is taken unless streaming is said to save kClearly or more.
// AFA_PLAN=resident|streaming forces one, auto or nothing leaves the choice; see ops/diffusion/plans.py for how to ask.
// Compiled by the host's compiler, with or without CUDA.
#pragma once

#include "common/device.h"
#include "diffusion/diffusion.h"

#ifdef __CUDACC__
#define AFA_HOST_DEVICE __host__ __device__
#else
#define AFA_HOST_DEVICE
#endif

namespace afa {

constexpr int kResidentTaps = 64;
constexpr int kResidentChannels = 4;  // at once
constexpr int kHeldTaps = 16, kHeldPixels = 2;  // weights in registers: taps of each pixel, pixels of each thread
constexpr int resident_threads(int held) { return held > 0 ? 512 : 1024; }

struct ResidentPlan {
  int tile_h = 0, tile_w = 0, tiles_y = 0, tiles_x = 0;
  int tile_shift = 0;            // tile_w is 2 to the power of it
  int reach_y = 0, reach_x = 0;  // of the taps; in x a multiple of 4, for copies of 16 bytes
  int near_row = 0, near_vector = 0;  // rows and 16 bytes of a row, from either end, that taps in registers do not reach
  int rows = 0, pitch = 0;       // of the tile with its halo
  int vectors = 0;               // of 16 bytes in one of these rows; so many threads copy so many rows at once:
  int copy_lanes = 0, copy_rows = 0;
  int channels = 0;              // summed at once
  int stages = 0;                // 2: the next channels are loaded meanwhile
  int planes = 0;                // of shared memory for all of them
  int images = 0;                // of the batch at once
  int threads = 0, shared_bytes = 0;
  bool half = false;             // weights in half precision
  int held = 0;                  // taps whose weights are in registers: 0 or kHeldTaps
  AFA_HOST_DEVICE int pixels() const { return tile_h * tile_w; }
  AFA_HOST_DEVICE int blocks() const { return tiles_y * tiles_x * images; }
};

enum class PlanWish : int { automatic = 0, resident = 1, streaming = 2, unknown = 3 };
PlanWish plan_wish();  // AFA_PLAN, read at every call

struct PlanChoice {
  bool resident = false;       // what is taken
  bool fits = false;           // whether it could be resident at all
  double resident_us = 0;      // an iteration; infinite if it does not fit
  double streaming_us = 0;
  const char* card = "";       // whose constants these are
  bool measured = false;       // or counted
  ResidentPlan plan;
};
// `planes`: what the weight source needs of the tile memory. `makes`: the streaming plan writes the weights to memory first.
PlanChoice choose_plan(const DiffusionArgs& args, int planes, bool half, bool makes, const DeviceLimits& device, PlanWish wish);

}  // namespace afa
