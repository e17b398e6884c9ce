// Diffusion on a GPU: whether the weights stay on chip (resident.cuh) and how, or are streamed (stream.cu).
#include "diffusion/resident.cuh"

namespace afa {

// ---- entry points --------------------------------------------------------------------------------------------------------

// Weights that are given as a tensor.
struct TensorWeights {
  static constexpr int kPlanes = 1;
  View<4> weights;
  template <class Word, int kHeld>
  __device__ void fill(const ResidentArgs& args, const ImageTile& tile, const TileReader&, SharedArray<Word> to,
                       HeldWeights<kHeld>& held, SharedArray<float>) const {
    for_own_pixels<kHeld>(args.plan.pixels(), held, [&](int p, HeldWeights<kHeld>& own) {
      const TilePixel pixel(args.plan, p);
      if (!pixel.inside(tile)) return;
      int64_t at = offset_of(weights, tile.b, 0, tile.y + pixel.y) + (tile.x + pixel.x) * weights.stride[3];
      auto next = [&] {
        const float weight = load_element(weights.data, weights.dtype, at);
        at += weights.stride[1];
        return weight;
      };
      WeightKeeper<Word, kHeld> keeper(to, &own, args.plan.pixels(), p);
      if constexpr (kHeld > 0) {
#pragma unroll
        for (int t = 0; t < kHeld; ++t) keeper.hold(t, next());
      }
      for (int t = kHeld; t < args.taps; ++t) keeper.keep(t, next());
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

static PlanChoice plan_for_tensor(const DiffusionArgs& args) {
  // A single iteration reads the weights once anyway.
  const bool half = args.weights.dtype == DType::f16 && args.taps % 2 == 0;
  return choose_plan(args, TensorWeights::kPlanes, half, false, device_limits(),
                     args.num_iter > 1 ? plan_wish() : PlanWish::streaming);
}

int64_t diffuse_cuda_workspace(const DiffusionArgs& args, int device) {
  DeviceGuard guard(device);
  const PlanChoice choice = plan_for_tensor(args);
  return choice.resident ? resident_workspace(args, choice.plan) : stream_workspace(args);
}

Status diffuse_cuda(const DiffusionArgs& args, void* workspace, int64_t bytes, int device, void* stream) {
  AFA_TRY(check_sizes(args));
  DeviceGuard guard(device);
  const PlanChoice choice = plan_for_tensor(args);
  if (!as_wished(args, choice, 2)) return Status::unsupported;
  if (bytes < (choice.resident ? resident_workspace(args, choice.plan) : stream_workspace(args))) return Status::not_resident;
  if (choice.resident) return launch_resident(args, choice.plan, TensorWeights{args.weights}, workspace, stream);
  return stream_diffusion(args, false, workspace, stream);
}

}  // namespace afa
