// The random walk on a GPU: which way it goes, in one launch (fused.cu) or by way of T and the shared diffusion with zero border
// (diffusion/stream.cu); and the gradient of the affinity.
//
//   D_i = sum_k P_ki + eps with P = A^p,   T_ij = P_ij / D_i
//   dL/dT_ij = sum_c g_c,i m_c,j,   dL/dD_i = -sum_j T_ij dL/dT_ij / D_i,   dL/dA_ij = p A_ij^(p-1) / D_i dL/dT_ij + p A_ij^(p-1) dL/dD_j
//
// Data flow of the second way: a block has 32 neighbouring pixels, and 8 threads for each of them share its taps. walk_weights_kernel adds up what
// points at its pixels, in a fixed order, and writes their T to the workspace, in float32 and without the taps that leave the image
// whatever pixel they start from. walk_slopes_kernel leaves dL/dT_ij, D_i and D_i dL/dD_i there, walk_gradient_kernel divides p A^(p-1)
// by D, so that a D below the normal numbers does no harm, and adds them up.
// Floor: the window read once and T written once, then what the diffusion needs; backward N * (2r+1)^2 * C multiply-adds and the
// window, read, its gradient, written. Bound: memory (the second reading of the window is from L2), backward the loads of m.
// Occupancy: walk_weights_kernel 256 x 4, walk_slopes_kernel 256 x 4, walk_gradient_kernel 256 x 4 (threads x blocks a
// multiprocessor, by registers).
#include <vector>

#include "diffusion/diffusion.h"
#include "diffusion/plan.h"
#include "random_walk/walk.cuh"

namespace afa {

// T to weights [B][taps][H][W].
__global__ void __launch_bounds__(kWalkThreads, 4) walk_weights_kernel(const __grid_constant__ WalkTaps taps, float* weights) {
  SharedArena arena;
  SharedArray<float> sums = arena.take<float>(kWalkThreads);
  const int64_t pixel = int64_t(blockIdx.x) * kWalkPixels + threadIdx.x;
  const int y = taps.row_of(pixel), x = int(pixel - int64_t(y) * taps.width);
  const bool present = pixel < taps.pixels();
  for (int64_t b = blockIdx.y; b < taps.affinity.size[0]; b += gridDim.y) {
    float* image = weights + b * taps.count() * taps.pixels() + pixel;
    auto keep = [&](int tap, float value) { image[tap * taps.pixels()] = value; };
    const float sum = column_sum<kWalkPixels, 8, true>(taps, b, present, y, x, int(threadIdx.y), kWalkGroups, sums, keep);
    if (!present) continue;
#pragma unroll 4
    for (int tap = threadIdx.y; tap < taps.count(); tap += kWalkGroups) image[tap * taps.pixels()] /= sum;
  }
}

// ---- the gradient of the affinity --------------------------------------------------------------------------------------------

struct WalkGradientArgs {
  WalkTaps taps;
  View<4> states, grads;  // [B, C, H, W]
  View<4> out;            // the gradient
  float* slopes;          // [B][taps][H][W]: dL/dT
  float* sums;            // [B][H][W]: D dL/dD
  float* totals;          // [B][H][W]: D
};

__global__ void __launch_bounds__(kWalkThreads, 4) walk_slopes_kernel(const __grid_constant__ WalkGradientArgs args) {
  SharedArena arena;
  SharedArray<float> sums = arena.take<float>(kWalkThreads);
  const WalkTaps& taps = args.taps;
  const View<4>&states = args.states, &grads = args.grads;
  const int64_t pixel = int64_t(blockIdx.x) * kWalkPixels + threadIdx.x;
  const int y = taps.row_of(pixel), x = int(pixel - int64_t(y) * taps.width);
  const bool present = pixel < taps.pixels();
  for (int64_t b = blockIdx.y; b < taps.affinity.size[0]; b += gridDim.y) {
    const float total = column_sum<kWalkPixels, 12, false>(taps, b, present, y, x, int(threadIdx.y), kWalkGroups, sums, [](int, float) {});
    float slope_of_sum = 0;
    if (present)
      for (int tap = threadIdx.y; tap < taps.count(); tap += kWalkGroups) {
        const int dy = taps.dy(tap), dx = taps.dx(tap);
        if (!taps.inside(y + dy, x + dx)) continue;
        float slope = 0;
        for (int64_t c = 0; c < states.size[1]; ++c)
          slope = fmaf(load_element(grads.data, grads.dtype, offset_of(grads, b, c, y) + x * grads.stride[3]),
                       load_element(states.data, states.dtype, offset_of(states, b, c, y + dy) + (x + dx) * states.stride[3]), slope);
        args.slopes[(b * taps.count() + tap) * taps.pixels() + pixel] = slope;
        slope_of_sum -= taps.powered(taps.at(b, dy, dx, y, x)) / total * slope;
      }
    slope_of_sum = sum_groups<kWalkPixels>(slope_of_sum, sums);
    if (present && threadIdx.y == 0) {
      args.sums[b * taps.pixels() + pixel] = slope_of_sum;
      args.totals[b * taps.pixels() + pixel] = total;
    }
  }
}

// Every plane of the window, those of taps that leave the image as zeros.
__global__ void __launch_bounds__(kWalkThreads, 4) walk_gradient_kernel(const __grid_constant__ WalkGradientArgs args) {
  const WalkTaps& taps = args.taps;
  const int64_t pixel = int64_t(blockIdx.x) * kWalkThreads + threadIdx.x;
  if (pixel >= taps.pixels()) return;
  const int y = taps.row_of(pixel), x = int(pixel - int64_t(y) * taps.width), side = 2 * taps.radius + 1;
  const int64_t planes = args.out.size[0] * args.out.size[1];
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int64_t b = plane / args.out.size[1];
    const int channel = int(plane % args.out.size[1]), dy = channel / side - taps.radius, dx = channel % side - taps.radius;
    float value = 0;
    if (taps.inside(y + dy, x + dx)) {
      const int64_t tap = int64_t(dy + taps.reach_y) * taps.side() + dx + taps.reach_x;
      const float slope = args.slopes[(b * taps.count() + tap) * taps.pixels() + pixel];
      const int64_t other = b * taps.pixels() + int64_t(y + dy) * taps.width + x + dx;
      const float power = taps.slope(taps.at(b, dy, dx, y, x));
      value = power / args.totals[b * taps.pixels() + pixel] * slope + power / args.totals[other] * args.sums[other];
    }
    store_element(args.out.data, args.out.dtype, offset_of(args.out, b, channel, y) + x * args.out.stride[3], value);
  }
}

// ---- launching -------------------------------------------------------------------------------------------------------------------

static Status check_window(const WalkArgs& args, const View<4>& masks) {
  const int64_t side = 2 * args.radius + 1;
  if (args.radius < 0 || args.affinity.size[1] != side * side) return Status::bad_argument;
  if (!same_images(args.affinity, masks)) return Status::bad_argument;
  // Rows, columns and taps are counted in 32 bits.
  const bool small = args.radius < (1 << 14) && masks.size[2] < (1 << 30) && masks.size[3] < (1 << 30) &&
                     blocks_for(masks.size[2] * masks.size[3], kWalkPixels) <= 0x7fffffff;
  return small ? Status::ok : Status::unsupported;
}

static LaunchShape walk_shape(const WalkTaps& taps) {
  LaunchShape shape;
  shape.block = dim3(kWalkPixels, kWalkGroups);
  shape.grid = dim3(unsigned(blocks_for(taps.pixels(), kWalkPixels)), grid_limit(taps.affinity.size[0]));
  shape.shared_bytes = SharedArena::bytes<float>(kWalkThreads);
  return shape;
}

static int64_t weight_floats(const WalkTaps& taps) { return round_up(taps.affinity.size[0] * taps.count() * taps.pixels(), 64); }

static DiffusionArgs diffusion_of(const WalkTaps& taps, const WalkMasks& masks, float* weights, const std::vector<int32_t>& offsets) {
  DiffusionArgs args;
  args.weights = taps.affinity;
  args.weights.data = weights, args.weights.dtype = DType::f32, args.weights.size[1] = taps.count();
  pack_rows(&args.weights, 1);
  args.masks = masks.cams, args.out = masks.out, args.class_mask = masks.class_mask, args.num_iter = masks.num_steps;
  args.offsets = offsets.data(), args.taps = taps.count(), args.border = Border::zero, args.transpose = masks.transpose;
  return args;
}

static std::vector<int32_t> offsets_of(const WalkTaps& taps) {
  std::vector<int32_t> offsets;
  for (int tap = 0; tap < taps.count(); ++tap) offsets.push_back(taps.dy(tap)), offsets.push_back(taps.dx(tap));
  return offsets;
}

// Streaming, in the sense of AFA_PLAN, is the weights in memory and a launch for each step.
static FusedPlan plan_walk(const WalkArgs& args, const WalkMasks& masks) {
  return plan_wish() == PlanWish::streaming ? FusedPlan() : plan_fused(args, masks);
}

int64_t random_walk_cuda_workspace(const WalkArgs& args, const WalkMasks& masks, int device) {
  DeviceGuard guard(device);
  const FusedPlan plan = plan_walk(args, masks);
  if (plan.one_launch) return plan.bytes;
  const WalkTaps taps(args);
  const std::vector<int32_t> offsets = offsets_of(taps);
  return 4 * weight_floats(taps) + diffuse_cuda_workspace(diffusion_of(taps, masks, nullptr, offsets), device);
}

Status random_walk_cuda(const WalkArgs& args, const WalkMasks& masks, void* workspace, int64_t bytes, int device, void* stream) {
  AFA_TRY(check_window(args, masks.cams));
  if (!same_size(masks.cams, masks.out) || masks.cams.size[1] < 1) return Status::bad_argument;
  DeviceGuard guard(device);
  const FusedPlan plan = plan_walk(args, masks);
  if (plan.one_launch) return bytes < plan.bytes ? Status::not_resident : launch_fused(args, masks, workspace, stream);
  if (plan_wish() == PlanWish::resident && masks.num_steps > 0 && !masks.transpose) return Status::unsupported;
  const WalkTaps taps(args);
  float* weights = static_cast<float*>(workspace);
  const int64_t rest = bytes - 4 * weight_floats(taps);  // the diffusion's
  if (rest < 0) return Status::not_resident;
  if (masks.num_steps > 0) AFA_TRY(launch(walk_weights_kernel, walk_shape(taps), stream, taps, weights));
  const std::vector<int32_t> offsets = offsets_of(taps);
  return diffuse_cuda(diffusion_of(taps, masks, weights, offsets), weights + weight_floats(taps), rest, device, stream);
}

int64_t random_walk_affinity_gradient_cuda_workspace(const WalkArgs& args) {
  const WalkTaps taps(args);
  return 4 * (weight_floats(taps) + 2 * round_up(taps.affinity.size[0] * taps.pixels(), 64));
}

Status random_walk_affinity_gradient_cuda(const WalkArgs& args, const View<4>& states, const View<4>& grads,
                                          const View<4>& grad_affinity, void* workspace, int device, void* stream) {
  AFA_TRY(check_window(args, states));
  if (!same_size(states, grads)) return Status::bad_argument;
  DeviceGuard guard(device);
  const WalkTaps taps(args);
  float *slopes = static_cast<float*>(workspace), *sums = slopes + weight_floats(taps);
  float* totals = sums + round_up(taps.affinity.size[0] * taps.pixels(), 64);
  const WalkGradientArgs gradient = {taps, states, grads, grad_affinity, slopes, sums, totals};
  AFA_TRY(launch(walk_slopes_kernel, walk_shape(taps), stream, gradient));
  LaunchShape shape;
  shape.block = dim3(kWalkThreads);
  shape.grid = dim3(unsigned(blocks_for(taps.pixels(), kWalkThreads)), grid_limit(grad_affinity.size[0] * grad_affinity.size[1]));
  return launch(walk_gradient_kernel, shape, stream, gradient);
}

}  // namespace afa
