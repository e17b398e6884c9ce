// A spatial Gaussian on a GPU: down the columns, then along the rows.
//
// Data flow: gaussian_kernel sums along the lines of a plane that lie side by side in memory, and turns it: what the second launch sums
// along lies side by side too, and is turned back. A block has 32 lines of 32 sums, a thread 8 of a line: it walks over what these can
// see, one number at a time, with the 8 weights, which move on by one at every step, in registers. The sums leave through shared memory.
// Between the launches planes are float32. Weights end where 1e-8 of their sum is left; gaussian_weights_kernel tables them.
// Floor: values read and written twice, 16 bytes a value; 2 * (12 sigma + 1) fused multiply-adds for each value. Bound: memory below
// sigma 3, these above.
// Occupancy: gaussian_kernel 128 x 8, gaussian_weights_kernel 128 x 8 (threads x blocks a multiprocessor, by registers).
#include <algorithm>
#include <cmath>

#include "bilateral/bilateral.h"
#include "common/arena.h"
#include "common/cuda_common.cuh"

namespace afa {

constexpr int kGaussianThreads = 128;
constexpr int kLines = 32, kAlong = 32;  // of a block
constexpr int kRun = 8;                  // sums of a thread

// Lines of a plane: the element `along` of line `across` of plane (b, c) at b * stride[0] + c * stride[1] + across * stride[2] + along *
// stride[3]; those of out likewise.
struct GaussianArgs {
  View<4> values, out;
  const float* weights = nullptr;  // [reach + 1]
  int reach = 0;
};

__global__ void __launch_bounds__(kGaussianThreads, 8) gaussian_weights_kernel(float* weights, float sigma, int reach) {
  const int d = int(blockIdx.x) * kGaussianThreads + int(threadIdx.x);
  if (d > reach) return;
  const float sigmas = float(d) / sigma;
  weights[d] = d == 0 ? 1.0f : expf(0.0f - 0.5f * sigmas * sigmas);  // 0 / 0 of the smallest sigma
}

__global__ void __launch_bounds__(kGaussianThreads, 8) gaussian_kernel(const __grid_constant__ GaussianArgs args) {
  SharedArena arena;
  SharedArray<float> turned = arena.take<float>(kAlong * (kLines + 1));
  const int64_t lines = args.values.size[2], size = args.values.size[3];
  const int64_t across = blockIdx.x * int64_t(kLines) + threadIdx.x % kLines;
  const int64_t channels = args.values.size[1], planes = args.values.size[0] * channels;
  const int64_t reach = args.reach;
  for (int64_t plane = blockIdx.z; plane < planes; plane += gridDim.z)
    for (int64_t begin = int64_t(blockIdx.y) * kAlong; begin < size; begin += int64_t(gridDim.y) * kAlong) {
      const int64_t first = begin + threadIdx.x / kLines * kRun;
      float sums[kRun] = {};
      if (across < lines && first < size) {
        const int64_t from = offset_of(args.values, plane / channels, plane % channels, across);
        auto weight = [&](int64_t distance) {
          distance = distance < 0 ? -distance : distance;
          return distance <= reach ? __ldg(args.weights + distance) : 0.0f;
        };
        // Of what only some of the 8 see, the others must not have a part: 0 times infinity would be NaN.
        auto walk = [&](int64_t low, int64_t high, bool all) {
          low = low > 0 ? low : 0, high = high < size ? high : size;
          float weights[kRun];
#pragma unroll
          for (int o = 0; o < kRun; ++o) weights[o] = weight(low - first - o);
#pragma unroll 8
          for (int64_t at = low; at < high; ++at) {
            const float value = load_element(args.values.data, args.values.dtype, from + at * args.values.stride[3]);
#pragma unroll
            for (int o = 0; o < kRun; ++o) {
              const int64_t distance = at - first - o;
              if (all || (distance <= reach && distance >= -reach)) sums[o] = fmaf(weights[o], value, sums[o]);
            }
#pragma unroll
            for (int o = kRun - 1; o > 0; --o) weights[o] = weights[o - 1];
            weights[0] = weight(at + 1 - first);
          }
        };
        const int64_t end = first + kRun + reach, low = first + kRun - 1 - reach, high = first + reach + 1;  // between these all see
        walk(first - reach, low < high ? low : end, false);
        walk(low, high, true);
        walk(low < high ? high : end, end, false);
      }
      __syncthreads();  // the last sums have left
#pragma unroll
      for (int o = 0; o < kRun; ++o) turned[(threadIdx.x / kLines * kRun + o) * (kLines + 1) + threadIdx.x % kLines] = sums[o];
      __syncthreads();
      // A warp writes one line's 32.
      const int lane = threadIdx.x % kAlong;
      for (int line = threadIdx.x / kAlong; line < kLines; line += kGaussianThreads / kAlong) {
        const int64_t other = blockIdx.x * int64_t(kLines) + line;
        if (begin + lane < size && other < lines) {
          const int64_t to = offset_of(args.out, plane / channels, plane % channels, other) + (begin + lane) * args.out.stride[3];
          store_element(args.out.data, args.out.dtype, to, turned[lane * (kLines + 1) + line]);
        }
      }
    }
}

// ---- entry points --------------------------------------------------------------------------------------------------------

struct GaussianPlan {
  int64_t reach_y, reach_x, bytes;
  View<4> turned;  // [B, K, W, H] in float32
  float* weights;
  GaussianPlan(const View<4>& values, float sigma, void* workspace) {
    const double reach = std::ceil(5.8 * double(sigma));
    reach_y = int64_t(std::min(reach, double(values.size[2] - 1))), reach_x = int64_t(std::min(reach, double(values.size[3] - 1)));
    baseline::Arena arena(workspace);
    weights = arena.take<float>(std::max(reach_y, reach_x) + 1);
    turned.dtype = DType::f32;
    for (int i = 0; i < 4; ++i) turned.size[i] = values.size[i < 2 ? i : 5 - i];
    pack_rows(&turned, 1);
    turned.data = arena.take<float>(turned.stride[0] * turned.size[0]);
    bytes = arena.used;
  }
};

static View<4> turn(View<4> view) {
  std::swap(view.size[2], view.size[3]), std::swap(view.stride[2], view.stride[3]);
  return view;
}

static Status sum_lines(const View<4>& values, const View<4>& out, const float* weights, int64_t reach, void* stream) {
  GaussianArgs args;
  args.values = values, args.out = out, args.weights = weights, args.reach = int(reach);
  LaunchShape shape;
  shape.grid = dim3(unsigned(blocks_for(values.size[2], kLines)), grid_limit(blocks_for(values.size[3], kAlong)),
                    grid_limit(values.size[0] * values.size[1]));
  shape.block = dim3(kGaussianThreads), shape.shared_bytes = SharedArena::bytes<float>(kAlong * (kLines + 1));
  return launch(gaussian_kernel, shape, stream, args);
}

int64_t gaussian_cuda_workspace(const View<4>& values, float sigma) {
  return is_empty(values) ? 0 : GaussianPlan(values, sigma, nullptr).bytes;
}

Status gaussian_cuda(const View<4>& values, const View<4>& out, float sigma, void* workspace, int device, void* stream) {
  if (!same_size(values, out) || is_empty(values)) return Status::bad_argument;
  DeviceGuard guard(device);
  const GaussianPlan plan(values, sigma, workspace);
  const int64_t reach = std::max(plan.reach_y, plan.reach_x);
  LaunchShape shape;
  shape.grid = dim3(unsigned(blocks_for(reach + 1, kGaussianThreads))), shape.block = dim3(kGaussianThreads);
  AFA_TRY(launch(gaussian_weights_kernel, shape, stream, plan.weights, sigma, int(reach)));
  AFA_TRY(sum_lines(turn(values), plan.turned, plan.weights, plan.reach_y, stream));
  return sum_lines(turn(plan.turned), out, plan.weights, plan.reach_x, stream);
}

}  // namespace afa
