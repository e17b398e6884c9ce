// The random walk on a GPU in one launch: normalised, weighed and stepped by the block that owns the pixels.
//
//   M'_i = sum_j P_ij M_j / D_i with P = A^p,   D_i = sum_k P_ki + eps
//
// A pixel's step needs its own taps and what points at it, nothing that another block makes: one step is one launch, whatever the size
// of the grid. Data flow: a block has 32 neighbouring pixels. Its 8 threads for each share the taps of D_i, then those of T, which stays
// in shared memory as [taps][32] and never reaches device memory. Then a thread sums all taps of up to 3 channels; where there are fewer
// than 5, several threads share the rows of a channel's window and their sums meet in shared memory, in order. Between two steps the
// maps travel through the workspace (in L2) with a barrier of the whole grid: several steps are one cooperative launch, as long as all
// blocks fit on the device at once, 32 pixels each, 3 a multiprocessor: B * N up to 12,672 at radius 8 on an H100. More than that, and
// the adjoint, whose pixels need other pixels' D, go by way of T in memory (random_walk.cu).
// Floor: the window read twice, once from L2; taps * channels loads of 4 bytes a pixel and step from L1, as many multiply-adds. Bound:
// these loads from many channels on, latency on small grids.
// Occupancy: walk_fused_kernel 256 x 3 (threads x blocks a multiprocessor, by registers).
#include <algorithm>

#include "random_walk/walk.cuh"

namespace afa {

constexpr int kFusedTaps = 448, kFusedChannels = 3;
constexpr int fused_blocks(bool several_steps) { return several_steps ? 3 : 4; }  // a multiprocessor

struct FusedArgs {
  WalkTaps taps;
  View<4> cams, out;
  const uint8_t* class_mask;
  int64_t num_steps;
  float* buffers[2];  // [B][present channels][H][W]

  explicit FusedArgs(const WalkArgs& args) : taps(args) {}
};

// T of the block's pixels to shared memory.
__device__ inline void fill_weights(const WalkTaps& taps, int64_t b, bool present, int y, int x, SharedArray<float> weights,
                                    SharedArray<float> sums) {
  const float total = column_sum(taps, b, present, y, x, sums);
  for (int tap = threadIdx.y; tap < taps.count(); tap += kWalkGroups) {
    const int dy = taps.dy(tap), dx = taps.dx(tap);
    const bool inside = present && taps.inside(y + dy, x + dx);
    weights[tap * kWalkPixels + threadIdx.x] = inside ? taps.powered(taps.at(b, dy, dx, y, x)) / total : 0.0f;
  }
}

// Where a step reads its maps: the CAMs as they are, or what the step before left in the workspace, numbered by present channels. A row
// is walked by a pointer: an index times a stride would be more than half of what the loop does.
template <class T>
struct CamReader {
  typedef T Element;
  static constexpr int kAhead = 4;  // taps, as far as registers go
  const View<4>& cams;
  int64_t b;
  SharedArray<int> kept;
  __device__ const T* begin(int c, int y, int x) const {
    return static_cast<const T*>(cams.data) + offset_of(cams, b, kept[c], y) + x * cams.stride[3];
  }
  __device__ int64_t step() const { return cams.stride[3]; }
  __device__ float read(const T* at) const { return to_float(*at); }
};
struct StepReader {
  typedef float Element;
  static constexpr int kAhead = 2;
  const float* image;
  int64_t pixels;
  int width;
  __device__ const float* begin(int c, int y, int x) const { return image + c * pixels + int64_t(y) * width + x; }
  __device__ int64_t step() const { return 1; }
  __device__ float read(const float* at) const { return __ldcg(at); }
};

// The sums of the channels `from` + k * `between`, over every `shares`th row of the window; of those that are not `found` the first is
// taken once more. Outside the image nothing is read: 0 times it need not be 0.
template <int kChannels, class Reader>
__device__ inline void add_rows(const WalkTaps& taps, SharedArray<float> weights, int y, int x, int share, int shares, int from,
                                int between, int found, const Reader& maps, float (&sum)[kFusedChannels]) {
  const int64_t step = maps.step();
  for (int dy = -taps.reach_y + share; dy <= taps.reach_y; dy += shares) {
    if (y + dy < 0 || y + dy >= taps.height) continue;
    const SharedArray<float> row = weights + ((dy + taps.reach_y) * taps.side() * kWalkPixels + int(threadIdx.x));
    const typename Reader::Element* at[kChannels];
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      at[k] = maps.begin(from + k * between < found ? from + k * between : from, y + dy, x - taps.reach_x);
#pragma unroll Reader::kAhead
    for (int tap = 0; tap < taps.side(); ++tap) {
      const bool inside = unsigned(x + tap - taps.reach_x) < unsigned(taps.width);
      const float weight = row[tap * kWalkPixels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        if (inside) sum[k] = fmaf(weight, maps.read(at[k]), sum[k]);
        at[k] += step;
      }
    }
  }
}

// One step of the block's pixels; `write(c, value)` takes the results. The whole block calls this.
template <class Reader, class Write>
__device__ inline void step_pixels(const WalkTaps& taps, SharedArray<float> weights, SharedArray<float> sums, bool present, int y, int x,
                                   int found, const Reader& maps, Write write) {
  const int shares = found >= 5 ? 1 : found >= 3 ? 2 : found == 2 ? 4 : 8, slots = kWalkGroups / shares;
  const int slot = int(threadIdx.y) % slots, share = int(threadIdx.y) / slots;
  for (int first = 0; first < found; first += kFusedChannels * slots) {
    float sum[kFusedChannels] = {};
    const int from = first + slot;
    if (present && from < found) {
      if (from + slots < found)
        add_rows<kFusedChannels>(taps, weights, y, x, share, shares, from, slots, found, maps, sum);
      else
        add_rows<1>(taps, weights, y, x, share, shares, from, slots, found, maps, sum);
    }
    if (shares > 1) {  // then `found` is at most the number of slots
      __syncthreads();
      sums[threadIdx.y * kWalkPixels + threadIdx.x] = sum[0];
      __syncthreads();
      if (share > 0) continue;
      for (int other = 1; other < shares; ++other) sum[0] += sums[(other * slots + slot) * kWalkPixels + threadIdx.x];
    }
#pragma unroll
    for (int k = 0; k < kFusedChannels; ++k)
      if (present && from + k * slots < found) write(from + k * slots, sum[k]);
  }
}

template <bool kSeveralSteps>
__global__ void __launch_bounds__(kWalkThreads, fused_blocks(kSeveralSteps)) walk_fused_kernel(const __grid_constant__ FusedArgs args) {
  const WalkTaps& taps = args.taps;
  const View<4>&cams = args.cams, &out = args.out;
  const int channels = int(cams.size[1]);
  SharedArena arena;
  SharedArray<float> weights = arena.take<float>(taps.count() * kWalkPixels);
  SharedArray<float> sums = arena.take<float>(kWalkThreads);
  SharedArray<int> kept = arena.take<int>(channels + 1);
  const int64_t pixel = int64_t(blockIdx.x) * kWalkPixels + threadIdx.x;
  const int y = int(pixel / taps.width), x = int(pixel % taps.width);
  const bool present = pixel < taps.pixels();
  // With several steps there is a block for each image: all of them meet at each barrier.
  for (int64_t b = blockIdx.y; b < cams.size[0]; b += gridDim.y) {
    const int found = present_channels(args.class_mask, b, channels, kept);
    if (args.class_mask != nullptr && present)
      for (int c = threadIdx.y; c < channels; c += kWalkGroups)
        if (args.class_mask[b * channels + c] == 0)
          store_element(out.data, out.dtype, offset_of(out, b, c, y) + x * out.stride[3], 0.0f);
    if (found > 0) fill_weights(taps, b, present, y, x, weights, sums);
    __syncthreads();
    const int64_t image = b * channels * taps.pixels();
    for (int64_t step = 0; step < (kSeveralSteps ? args.num_steps : 1); ++step) {
      const bool last = !kSeveralSteps || step + 1 == args.num_steps;
      float* to = args.buffers[step & 1] + image;
      auto write = [&](int c, float value) {
        if (last)
          store_element(out.data, out.dtype, offset_of(out, b, kept[c], y) + x * out.stride[3], value);
        else
          __stcg(to + c * taps.pixels() + pixel, value);
      };
      auto walk = [&](const auto& maps) { step_pixels(taps, weights, sums, present, y, x, found, maps, write); };
      if (kSeveralSteps && step > 0)
        walk(StepReader{args.buffers[~step & 1] + image, taps.pixels(), taps.width});
      else if (cams.dtype == DType::f32)
        walk(CamReader<float>{cams, b, kept});
      else if (cams.dtype == DType::f16)
        walk(CamReader<__half>{cams, b, kept});
      else
        walk(CamReader<__nv_bfloat16>{cams, b, kept});
      if (kSeveralSteps && !last) cooperative_groups::this_grid().sync();
    }
  }
}

// ---- launching -------------------------------------------------------------------------------------------------------------------

static LaunchShape fused_shape(const WalkTaps& taps, const WalkMasks& masks) {
  LaunchShape shape;
  shape.block = dim3(kWalkPixels, kWalkGroups);
  shape.grid = dim3(unsigned(blocks_for(taps.pixels(), kWalkPixels)), grid_limit(taps.affinity.size[0]));
  shape.shared_bytes = SharedArena::bytes<float>(taps.count() * kWalkPixels) + SharedArena::bytes<float>(kWalkThreads) +
                       SharedArena::bytes<int>(masks.cams.size[1] + 1);
  shape.cooperative = masks.num_steps > 1;
  return shape;
}

FusedPlan plan_fused(const WalkArgs& args, const WalkMasks& masks) {
  FusedPlan plan;
  const WalkTaps taps(args);
  if (masks.transpose || masks.num_steps < 1 || taps.count() > kFusedTaps || masks.cams.size[1] > 4096) return plan;
  const DeviceLimits device = device_limits();
  const LaunchShape shape = fused_shape(taps, masks);
  if (shape.shared_bytes > device.shared_bytes) return plan;
  const int64_t batch = masks.cams.size[0], maps = round_up(batch * masks.cams.size[1] * taps.pixels(), 64);
  if (shape.cooperative) {
    // Every block has a kilobyte of the multiprocessor's shared memory besides its own.
    const int64_t blocks = std::min<int64_t>(fused_blocks(true), device.shared_bytes / (shape.shared_bytes + 1024));
    if (!device.cooperative || batch > 65535 || int64_t(shape.grid.x) * batch > blocks * device.multiprocessors) return plan;
  }
  plan.one_launch = true;
  plan.bytes = 4 * maps * std::min<int64_t>(masks.num_steps - 1, 2);
  return plan;
}

Status launch_fused(const WalkArgs& args, const WalkMasks& masks, void* workspace, void* stream) {
  FusedArgs fused(args);
  fused.cams = masks.cams, fused.out = masks.out, fused.class_mask = masks.class_mask, fused.num_steps = masks.num_steps;
  const int64_t maps = round_up(masks.cams.size[0] * masks.cams.size[1] * fused.taps.pixels(), 64);
  fused.buffers[0] = static_cast<float*>(workspace), fused.buffers[1] = fused.buffers[0] + maps;
  const LaunchShape shape = fused_shape(fused.taps, masks);
  if (shape.cooperative) return launch(walk_fused_kernel<true>, shape, stream, fused);
  return launch(walk_fused_kernel<false>, shape, stream, fused);
}

}  // namespace afa
