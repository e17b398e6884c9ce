// Diffusion on a GPU: whether the weights stay on chip (resident.cuh) and how, or are streamed (stream.cu).
#include "diffusion/resident.cuh"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace afa {

// ---- the plan of the resident kernel -------------------------------------------------------------------------------------

// Completes a plan whose tile is chosen; its cost in shared-memory words that a block moves, or infinity if it does not fit.
static double resident_cost(const DiffusionArgs& args, int planes, const DeviceLimits& device, ResidentPlan* plan) {
  const int64_t batch = args.masks.size[0], channels = args.masks.size[1], shared_taps = args.taps - plan->held;
  const int threads = resident_threads(plan->held), tiles = plan->tiles_x * plan->tiles_y;
  if (plan->held > 0 && (plan->half || shared_taps < 0 || plan->pixels() > kHeldPixels * threads)) return INFINITY;
  plan->rows = plan->tile_h + 2 * plan->reach_y;
  plan->images = int(std::min<int64_t>(batch, device.multiprocessors / tiles));
  const int64_t words = plan->pixels() * shared_taps / (plan->half ? 2 : 1);
  const int64_t fixed = SharedArena::bytes<float>(words) + SharedArena::bytes<int>(channels + 1);
  const int64_t plane = int64_t(plan->rows) * plan->pitch, room = (device.shared_bytes - fixed - 16) / (4 * plane);
  if (room < std::max(planes, 1)) return INFINITY;
  plan->channels = int(std::min<int64_t>(std::min<int64_t>(room, kResidentChannels), channels));
  plan->shared_bytes = int(fixed + SharedArena::bytes<float>(std::max(plan->channels, planes) * plane));
  plan->threads = int(std::min<int64_t>(threads, std::max<int64_t>(128, round_up(plan->pixels(), 32))));
  // For each channel the halo comes from L2, at about four times the price; a grid barrier costs about a microsecond.
  const double groups = double(blocks_for(channels, plan->channels));
  const double pixels = double(blocks_for(plan->pixels(), plan->threads)) * plan->threads;
  return double(blocks_for(batch, plan->images)) *
         (pixels * (args.taps * channels + shared_taps * groups) + 4.0 * plane * channels + 50000.0);
}

bool plan_resident(const DiffusionArgs& args, int planes, bool half, ResidentPlan* best) {
  const DeviceLimits device = device_limits();
  const int64_t channels = args.masks.size[1], height = args.masks.size[2], width = args.masks.size[3];
  if (!device.cooperative || args.transpose || args.num_iter < 1) return false;
  if (args.taps > kResidentTaps || channels > 4096) return false;
  if (height * width > (int64_t(1) << 24) || (half && args.taps % 2 != 0)) return false;
  ResidentPlan plan;
  plan.half = half;
  for (int64_t t = 0; t < args.taps; ++t) {
    plan.reach_y = int(std::min<int64_t>(std::max(plan.reach_y, std::abs(args.offsets[2 * t])), height));
    plan.reach_x = int(std::min<int64_t>(std::max(plan.reach_x, std::abs(args.offsets[2 * t + 1])), width));
  }
  double lowest = 1e300;
  for (plan.tile_w = 16; plan.tile_w <= 128 && plan.tile_w < 2 * width + 32; plan.tile_w *= 2) {
    plan.tiles_x = int(blocks_for(width, plan.tile_w));
    plan.pitch = plan.tile_w + 2 * plan.reach_x;
    // Two rows of 16 pixels make a warp: their banks must not meet.
    if (plan.tile_w == 16) plan.pitch += (48 - plan.pitch % 32) % 32;
    for (int64_t cuts = 1; cuts * plan.tiles_x <= device.multiprocessors && cuts <= height; ++cuts) {
      plan.tile_h = int(blocks_for(height, cuts)), plan.tiles_y = int(blocks_for(height, plan.tile_h));
      for (plan.held = 0; plan.held <= kHeldTaps; plan.held += kHeldTaps) {
        const double cost = resident_cost(args, planes, device, &plan);
        if (cost < lowest) lowest = cost, *best = plan;
      }
    }
  }
  return lowest < 1e300;
}

// ---- entry points --------------------------------------------------------------------------------------------------------

// Weights that are given as a tensor.
struct TensorWeights {
  static constexpr int kPlanes = 1;
  View<4> weights;
  template <class Word, int kHeld>
  __device__ void fill(const ResidentArgs& args, const ImageTile& tile, SharedArray<Word> to, HeldWeights<kHeld>& held,
                       SharedArray<float>) const {
    for_own_pixels<kHeld>(args.plan.pixels(), [&](int p, int j) {
      const int y = p / args.plan.tile_w, x = p - y * args.plan.tile_w;
      if (y >= tile.height || x >= tile.width) return;
      const int64_t at = offset_of(weights, tile.b, 0, tile.y + y) + (tile.x + x) * weights.stride[3];
      auto read = [&](int t) { return load_element(weights.data, weights.dtype, at + t * weights.stride[1]); };
      WeightKeeper<Word, kHeld> keeper(to, &held, args.plan.pixels(), p, j);
      if constexpr (kHeld > 0) {
#pragma unroll
        for (int t = 0; t < kHeld; ++t) keeper.hold(t, read(t));
      }
      for (int t = kHeld; t < args.taps; ++t) keeper.keep(t, read(t));
    });
  }
};

static Status check_sizes(const DiffusionArgs& args) {
  if (args.taps < 1 || args.num_iter < 0) return Status::bad_argument;
  if (!same_size(args.masks, args.out) || is_empty(args.masks)) return Status::bad_argument;
  if (args.weights.size[1] != args.taps || !same_images(args.weights, args.masks)) return Status::bad_argument;
  // Rows and columns are counted in 32 bits, and the list of channels must fit in shared memory; offsets are 64 bits.
  const bool fits = args.masks.size[1] <= 8192 && args.masks.size[2] < (1 << 30) && args.masks.size[3] < (1 << 30);
  return fits ? Status::ok : Status::unsupported;
}

static bool plan_for_tensor(const DiffusionArgs& args, ResidentPlan* plan) {
  // A single iteration reads the weights once anyway.
  const bool half = args.weights.dtype == DType::f16 && args.taps % 2 == 0;
  return args.num_iter > 1 && plan_resident(args, TensorWeights::kPlanes, half, plan);
}

int64_t diffuse_cuda_workspace(const DiffusionArgs& args, int device) {
  DeviceGuard guard(device);
  ResidentPlan plan;
  return plan_for_tensor(args, &plan) ? resident_workspace(args, plan) : stream_workspace(args);
}

Status diffuse_cuda(const DiffusionArgs& args, void* workspace, int64_t bytes, int device, void* stream) {
  AFA_TRY(check_sizes(args));
  DeviceGuard guard(device);
  ResidentPlan plan;
  const bool resident = plan_for_tensor(args, &plan);
  if (bytes < (resident ? resident_workspace(args, plan) : stream_workspace(args))) return Status::not_resident;
  if (resident) return launch_resident(args, plan, TensorWeights{args.weights}, workspace, stream);
  return stream_diffusion(args, false, workspace, stream);
}

}  // namespace afa
