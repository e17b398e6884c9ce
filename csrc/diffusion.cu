// Diffusion on a GPU: the plan of the resident kernel (diffusion.cuh), and the kernels for what does not fit on chip.
//
// diffuse_step is one iteration, streaming the weights: a thread takes 16 bytes of them at a time (4 pixels of float, 8 of half)
// for up to 7 channels, whose sums it keeps in registers. Data flow: masks that are not float32 with unit stride are first copied
// to the workspace as float32; the iterations alternate two buffers there; the last writes `out` in its own type and strides.
// Floor: taps * 4 (2 in half) bytes of weights per pixel and iteration through device memory. Weights whose rows are not on
// 16-byte boundaries take the same kernel one pixel at a time.
// diffuse_adjoint gathers, for each pixel, the (pixel, tap) pairs that read it; at replicated borders these are ranges.
// Occupancy: diffuse_step 128 x 4, diffuse_adjoint 128 x 4, copy_masks 128 x 8, store_offsets 128 x 8 (threads x blocks a
// multiprocessor, by registers).
// Wide loads: diffuse_step<float, 4, *>, diffuse_step<__half, 8, *>, diffuse_step<__nv_bfloat16, 8, *>.
#include "diffusion.cuh"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace afa {

constexpr int kStepThreads = 128;

struct StepArgs {
  View<4> weights;            // [B, T, H, W]
  const float* in;            // [B, C, H, W], unit stride in x
  int64_t in_stride[3];
  View<4> out;                // [B, C, H, W]
  const int32_t* offsets;     // [T][2], on the device
  const uint8_t* class_mask;  // [B][C] or null
  bool zero_border, wide_in;  // wide_in: rows of `in` are on 16-byte boundaries
};

// ---- one iteration -------------------------------------------------------------------------------------------------------

// The weights of kPixels neighbouring pixels, as they come: unpacked only when they are used, to save registers.
template <class T, int kPixels>
struct WeightVector {
  static_assert(kPixels * sizeof(T) == 16, "streamed weights are loaded 16 bytes at a time");
  uint4 packed;
  __device__ void load(const View<4>& weights, int64_t at) {
    packed = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(weights.data) + at));
  }
  __device__ void unpack(float* to) const {
    T values[kPixels];
    memcpy(values, &packed, 16);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) to[i] = to_float(values[i]);
  }
};
template <>
struct WeightVector<float, 1> {  // any type and strides
  float value;
  __device__ void load(const View<4>& weights, int64_t at) { value = load_element(weights.data, weights.dtype, at); }
  __device__ void unpack(float* to) const { *to = value; }
};

template <class T, int kPixels, int kChannels>
__global__ void __launch_bounds__(kStepThreads, 4) diffuse_step(const __grid_constant__ StepArgs args) {
  constexpr int kAhead = 4;  // taps whose weights are loaded before the first is used
  const int channels = int(args.out.size[1]), height = int(args.out.size[2]), width = int(args.out.size[3]);
  const int taps = int(args.weights.size[1]), groups = (channels + kChannels - 1) / kChannels;
  SharedArena arena;
  SharedArray<int> present = arena.take<int>(channels + 1);
  const int x0 = int((blockIdx.x * blockDim.x + threadIdx.x) * kPixels);
  for (int64_t z = blockIdx.z; z < args.out.size[0] * groups; z += gridDim.z) {
    const int64_t b = z / groups;
    const int begin = int(z % groups) * kChannels;
    const int count = min(present_channels(args.class_mask, b, channels, present) - begin, kChannels);
    if (count <= 0 || x0 >= width) continue;
    const float* in[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      in[c] = args.in + b * args.in_stride[0] + present[begin + min(c, count - 1)] * args.in_stride[1];
    for (int64_t y = blockIdx.y * blockDim.y + threadIdx.y; y < height; y += gridDim.y * blockDim.y) {
      float sum[kChannels][kPixels] = {};
      const int64_t at = offset_of(args.weights, b, 0, y) + x0 * (kPixels == 1 ? args.weights.stride[3] : 1);
      for (int first = 0; first < taps; first += kAhead) {
        WeightVector<T, kPixels> ahead[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (first + k < taps) ahead[k].load(args.weights, at + (first + k) * args.weights.stride[1]);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (first + k >= taps) break;
          float weight[kPixels];
          ahead[k].unpack(weight);
          const int2 offset = __ldg(reinterpret_cast<const int2*>(args.offsets) + first + k);
          const int wanted = int(y) + offset.x, row = clamp_to(wanted, 0, height - 1), left = x0 + offset.y;
          const bool outside = args.zero_border && row != wanted;
          const int64_t line = row * args.in_stride[2];
          if (!outside && left >= 0 && left + kPixels <= width) {
            if (kPixels > 1 && args.wide_in && left % 4 == 0) {
#pragma unroll
              for (int c = 0; c < kChannels; ++c)
#pragma unroll
                for (int i = 0; i + 4 <= kPixels; i += 4) {
                  if (c >= count) continue;
                  const float4 value = __ldg(reinterpret_cast<const float4*>(in[c] + line + left + i));
                  sum[c][i] = fmaf(weight[i], value.x, sum[c][i]);
                  sum[c][i + 1] = fmaf(weight[i + 1], value.y, sum[c][i + 1]);
                  sum[c][i + 2] = fmaf(weight[i + 2], value.z, sum[c][i + 2]);
                  sum[c][i + 3] = fmaf(weight[i + 3], value.w, sum[c][i + 3]);
                }
            } else {
#pragma unroll
              for (int c = 0; c < kChannels; ++c)
#pragma unroll
                for (int i = 0; i < kPixels; ++i)
                  if (c < count) sum[c][i] = fmaf(weight[i], __ldg(in[c] + line + left + i), sum[c][i]);
            }
          } else {
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
              const int x = clamp_to(left + i, 0, width - 1);
              const bool zero = outside || (args.zero_border && x != left + i);
#pragma unroll
              for (int c = 0; c < kChannels; ++c)
                if (c < count) sum[c][i] = fmaf(weight[i], zero ? 0.0f : __ldg(in[c] + line + x), sum[c][i]);
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c >= count) continue;
        const int64_t to = offset_of(args.out, b, present[begin + c], y);
#pragma unroll
        for (int i = 0; i < kPixels; ++i)
          if (x0 + i < width) store_element(args.out.data, args.out.dtype, to + (x0 + i) * args.out.stride[3], sum[c][i]);
      }
    }
  }
}

// ---- the adjoint ---------------------------------------------------------------------------------------------------------

struct Range {
  int first, last;
};
// Places s with clamp(s + offset) == place (replicate), or s + offset == place (zero border), along one axis.
__device__ inline Range sources(int place, int offset, int size, bool zero_border) {
  Range range = {place - offset, place - offset};
  if (!zero_border) {
    if (place == 0) range.first = 0;
    if (place == size - 1) range.last = size - 1;
  }
  range.first = max(range.first, 0), range.last = min(range.last, size - 1);
  return range;
}

constexpr int kAdjointChannels = 4;
__global__ void __launch_bounds__(kStepThreads, 4) diffuse_adjoint(const __grid_constant__ StepArgs args) {
  const int channels = int(args.out.size[1]), height = int(args.out.size[2]), width = int(args.out.size[3]);
  const int groups = (channels + kAdjointChannels - 1) / kAdjointChannels;
  SharedArena arena;
  SharedArray<int> present = arena.take<int>(channels + 1);
  const int x = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (int64_t z = blockIdx.z; z < args.out.size[0] * groups; z += gridDim.z) {
    const int64_t b = z / groups;
    const int begin = int(z % groups) * kAdjointChannels;
    const int count = min(present_channels(args.class_mask, b, channels, present) - begin, kAdjointChannels);
    if (count <= 0 || x >= width) continue;
    for (int64_t y = blockIdx.y * blockDim.y + threadIdx.y; y < height; y += gridDim.y * blockDim.y) {
      float sum[kAdjointChannels] = {};
      for (int t = 0; t < int(args.weights.size[1]); ++t) {
        const Range rows = sources(int(y), args.offsets[2 * t], height, args.zero_border);
        const Range columns = sources(x, args.offsets[2 * t + 1], width, args.zero_border);
        for (int row = rows.first; row <= rows.last; ++row)
          for (int column = columns.first; column <= columns.last; ++column) {
            const float weight = load_element(args.weights.data, args.weights.dtype,
                                              offset_of(args.weights, b, t, row) + column * args.weights.stride[3]);
#pragma unroll
            for (int c = 0; c < kAdjointChannels; ++c)
              if (c < count)
                sum[c] = fmaf(weight, args.in[b * args.in_stride[0] + present[begin + c] * args.in_stride[1] +
                                              row * args.in_stride[2] + column], sum[c]);
          }
      }
#pragma unroll
      for (int c = 0; c < kAdjointChannels; ++c)
        if (c < count)
          store_element(args.out.data, args.out.dtype,
                        offset_of(args.out, b, present[begin + c], y) + x * args.out.stride[3], sum[c]);
    }
  }
}

// ---- copies --------------------------------------------------------------------------------------------------------------

// out = in where the channel is present (if copy_present), 0 where it is not (if zero_absent).
__global__ void __launch_bounds__(kStepThreads, 8)
    copy_masks(const __grid_constant__ View<4> in, const __grid_constant__ View<4> out, const uint8_t* class_mask,
               bool copy_present, bool zero_absent) {
  const int64_t x = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (x >= out.size[3]) return;
  for (int64_t z = blockIdx.z; z < out.size[0] * out.size[1]; z += gridDim.z) {
    const bool present = class_mask == nullptr || class_mask[z] != 0;
    if (!(present ? copy_present : zero_absent)) continue;
    const int64_t b = z / out.size[1], c = z % out.size[1];
    for (int64_t y = blockIdx.y * blockDim.y + threadIdx.y; y < out.size[2]; y += gridDim.y * blockDim.y) {
      const float value = present ? load_element(in.data, in.dtype, offset_of(in, b, c, y) + x * in.stride[3]) : 0.0f;
      store_element(out.data, out.dtype, offset_of(out, b, c, y) + x * out.stride[3], value);
    }
  }
}

constexpr int kOffsetsAtOnce = 448;
struct OffsetChunk {
  int count;
  int32_t value[2 * kOffsetsAtOnce];
};
// The taps travel as a kernel parameter: no host memory need outlive the launch, and a CUDA graph keeps its own copy.
__global__ void __launch_bounds__(kStepThreads, 8) store_offsets(const __grid_constant__ OffsetChunk chunk, int32_t* to) {
  for (int i = threadIdx.x; i < 2 * chunk.count; i += blockDim.x) to[i] = chunk.value[i];
}

// ---- launching -----------------------------------------------------------------------------------------------------------

// Threads side by side along x for `items` of them, the rest of the block along y.
static LaunchShape image_shape(int64_t items, int64_t height, int64_t planes) {
  unsigned wide = 32;
  while (wide > 1 && wide / 2 >= items) wide /= 2;
  while (wide < kStepThreads && wide < items && height == 1) wide *= 2;
  LaunchShape shape;
  shape.block = dim3(wide, kStepThreads / wide);
  shape.grid = dim3(unsigned(blocks_for(items, wide)), grid_limit(blocks_for(height, shape.block.y)), grid_limit(planes));
  return shape;
}

static Status launch_copy(const View<4>& in, const View<4>& out, const uint8_t* class_mask, bool copy_present, bool zero_absent,
                          void* stream) {
  return launch(copy_masks, image_shape(out.size[3], out.size[2], out.size[0] * out.size[1]), stream, in, out, class_mask,
                copy_present, zero_absent);
}

static bool wide_rows(const View<4>& view, int64_t pixels) {
  return view.stride[3] == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[0] % pixels == 0 &&
         view.stride[1] % pixels == 0 && view.stride[2] % pixels == 0;
}

template <class T, int kPixels, int kChannels>
static Status launch_step(const StepArgs& args, void* stream) {
  const auto& size = args.out.size;
  LaunchShape shape = image_shape(blocks_for(size[3], kPixels), size[2], size[0] * blocks_for(size[1], kChannels));
  shape.shared_bytes = SharedArena::bytes<int>(size[1] + 1);
  return launch(diffuse_step<T, kPixels, kChannels>, shape, stream, args);
}

static Status launch_iteration(const StepArgs& args, bool padded, bool transpose, void* stream) {
  const int64_t channels = args.out.size[1];
  if (transpose) {
    LaunchShape shape = image_shape(args.out.size[3], args.out.size[2], args.out.size[0] * blocks_for(channels, kAdjointChannels));
    shape.shared_bytes = SharedArena::bytes<int>(channels + 1);
    return launch(diffuse_adjoint, shape, stream, args);
  }
  const int64_t pixels = args.weights.dtype == DType::f32 ? 4 : 8;
  if (!wide_rows(args.weights, pixels) || !(padded || args.weights.size[3] % pixels == 0)) return launch_step<float, 1, 7>(args, stream);
  if (args.weights.dtype == DType::f16) return launch_step<__half, 8, 4>(args, stream);
  if (args.weights.dtype == DType::bf16) return launch_step<__nv_bfloat16, 8, 4>(args, stream);
  return channels > 4 ? launch_step<float, 4, 7>(args, stream) : launch_step<float, 4, 4>(args, stream);
}

static View<4> buffer_view(const View<4>& masks, float* data) {
  View<4> view = masks;
  view.data = data, view.dtype = DType::f32;
  view.stride[3] = 1, view.stride[2] = round_up(masks.size[3], 4);
  view.stride[1] = view.stride[2] * masks.size[2], view.stride[0] = view.stride[1] * masks.size[1];
  return view;
}
static int64_t buffer_floats(const View<4>& masks) {
  return round_up(masks.size[0] * masks.size[1] * masks.size[2] * round_up(masks.size[3], 4), 64);
}

int64_t stream_workspace(const DiffusionArgs& args) {
  const bool packs = args.masks.dtype != DType::f32 || args.masks.stride[3] != 1;
  const int64_t buffers = packs || args.num_iter > 2 ? 2 : args.num_iter > 1 ? 1 : 0;
  return 4 * (round_up(2 * args.taps, 64) + buffers * buffer_floats(args.masks));
}

Status stream_diffusion(const DiffusionArgs& args, bool padded, void* workspace, void* stream) {
  if (args.class_mask != nullptr)
    AFA_TRY(launch_copy(args.masks, args.out, args.class_mask, args.num_iter == 0, true, stream));
  else if (args.num_iter == 0)
    AFA_TRY(launch_copy(args.masks, args.out, nullptr, true, false, stream));
  if (args.num_iter == 0) return Status::ok;

  int32_t* offsets = static_cast<int32_t*>(workspace);
  const int limits[2] = {int(args.masks.size[2]), int(args.masks.size[3])};
  for (int64_t first = 0; first < args.taps; first += kOffsetsAtOnce) {
    OffsetChunk chunk = {int(args.taps - first < kOffsetsAtOnce ? args.taps - first : kOffsetsAtOnce), {}};
    // One image length away an offset already reaches the border; farther could overflow.
    for (int i = 0; i < 2 * chunk.count; ++i)
      chunk.value[i] = clamp_to(args.offsets[2 * first + i], -limits[i & 1], limits[i & 1]);
    LaunchShape shape;
    shape.grid = dim3(1), shape.block = dim3(kStepThreads);
    AFA_TRY(launch(store_offsets, shape, stream, chunk, offsets + 2 * first));
  }

  float* memory = reinterpret_cast<float*>(offsets) + round_up(2 * args.taps, 64);
  const View<4> buffers[2] = {buffer_view(args.masks, memory), buffer_view(args.masks, memory + buffer_floats(args.masks))};
  View<4> in = args.masks;
  if (in.dtype != DType::f32 || in.stride[3] != 1) {
    in = buffers[1];
    AFA_TRY(launch_copy(args.masks, in, args.class_mask, true, false, stream));
  }
  for (int64_t iteration = 0; iteration < args.num_iter; ++iteration) {
    const View<4>& to = iteration + 1 == args.num_iter ? args.out : buffers[iteration & 1];
    const StepArgs step = {args.weights, static_cast<const float*>(in.data), {in.stride[0], in.stride[1], in.stride[2]},
                           to, offsets, args.class_mask, args.border == Border::zero, wide_rows(in, 4)};
    AFA_TRY(launch_iteration(step, padded, args.transpose, stream));
    in = to;
  }
  return Status::ok;
}

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
  __device__ void fill(const ResidentArgs& args, const Tile& tile, SharedArray<Word> to, HeldWeights<kHeld>& held,
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
  for (int i = 0; i < 4; ++i) {
    if (args.masks.size[i] != args.out.size[i] || args.masks.size[i] < 1) return Status::bad_argument;
    if (i != 1 && args.weights.size[i] != args.masks.size[i]) return Status::bad_argument;
  }
  if (args.weights.size[1] != args.taps) return Status::bad_argument;
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

Status diffuse_cuda(const DiffusionArgs& args, void* workspace, int device, void* stream) {
  AFA_TRY(check_sizes(args));
  DeviceGuard guard(device);
  ResidentPlan plan;
  if (plan_for_tensor(args, &plan)) return launch_resident(args, plan, TensorWeights{args.weights}, workspace, stream);
  return stream_diffusion(args, false, workspace, stream);
}

}  // namespace afa
