// Diffusion on a GPU, streaming the weights: the kernels for what does not fit on chip.
//
// diffuse_step is one iteration: a thread has one pixel, whose sums for up to 7 channels it keeps in registers. A warp's 32 neighbouring
// pixels read whole lines of weights and of masks wherever a tap points, and clamping costs each of them the same: vectors of pixels
// would have to be taken apart at the borders, and where a tap does not move by whole vectors. 4 or 6 taps are loaded before the first is
// used. Data flow: masks that are not float32 with unit stride are first copied to the workspace as float32; the iterations alternate two
// buffers there; the last writes `out` in its own type and strides. Weights may have any strides.
// Groups of channels that use the same weights lie side by side in the grid, so that they meet in L2. diffuse_step_split shares a
// pixel's taps between 8 threads where the image is too small to fill the device otherwise. diffuse_adjoint gathers, for each pixel, the
// (pixel, tap) pairs that read it; at replicated borders these are ranges.
// The taps travel with the launch, in the constant bank where a warp reads one at once; those that find no room there are first
// written to the workspace by store_offsets.
// Floor: taps * 4 (2 in half) bytes of weights per pixel and iteration through device memory.
// Occupancy: diffuse_step 128 x 6, diffuse_step_split 128 x 6, diffuse_adjoint 128 x 4, copy_masks 128 x 8, store_offsets 128 x 8
// (threads x blocks a multiprocessor, by registers).
#include <cstdlib>
#include <type_traits>

#include "diffusion/resident.cuh"

namespace afa {

constexpr int kStepThreads = 128;

// Taps that are parameters of a kernel, of which all together are 4 KB at most: 1.8 KB of them, as a radius of 10 needs.
constexpr int kParameterTaps = 448;

struct StepArgs {
  View<4> weights;            // [B, T, H, W]
  const float* in;            // [B, C, H, W], unit stride in x
  int64_t in_stride[3];
  View<4> out;                // [B, C, H, W]
  const int32_t* offsets;     // [T][2], on the device; null: in `taps`
  const uint8_t* class_mask;  // [B][C] or null
  bool zero_border, near;  // near: the taps are here, and offsets within a channel of `in` fit in 32 bits
  int32_t taps[kParameterTaps];  // dx above 16 bits of dy
};

template <bool kNear>
__device__ inline int2 tap_at(const StepArgs& args, int tap) {
  if (!kNear && args.offsets != nullptr) return __ldg(reinterpret_cast<const int2*>(args.offsets) + tap);
  const int32_t packed = args.taps[tap];
  return make_int2(int16_t(packed), packed >> 16);
}

// ---- one iteration -------------------------------------------------------------------------------------------------------

// Adds weight * neighbour over taps [begin, end) of pixel (y, x) for kChannels channels, whose images begin at `in`. kZero: zero border.
template <class T, int kChannels, bool kZero, bool kNear>
__device__ inline void add_taps(const StepArgs& args, int64_t b, int y, int x, const float* const (&in)[kChannels], int begin, int end,
                                float (&sum)[kChannels]) {
  constexpr int kAhead = kChannels > 4 ? 4 : 6;  // taps, as far as registers go
  typedef std::conditional_t<kNear, int, int64_t> Offset;
  const Offset line = Offset(args.in_stride[2]);
  const int height = int(args.out.size[2]), width = int(args.out.size[3]);
  const int64_t step = args.weights.stride[1];
  const T* from = static_cast<const T*>(args.weights.data) + offset_of(args.weights, b, begin, y) + x * args.weights.stride[3];
  auto offset_at = [&](int tap, bool* outside) {
    const int2 offset = tap_at<kNear>(args, tap);
    const int row = max(min(y + offset.x, height - 1), 0), column = max(min(x + offset.y, width - 1), 0);
    *outside = kZero && ((row != y + offset.x) | (column != x + offset.y));
    return row * line + column;
  };
  int tap = begin;
  for (; tap + kAhead <= end; tap += kAhead) {
    T weight[kAhead];
    float value[kAhead][kChannels];
#pragma unroll
    for (int k = 0; k < kAhead; ++k, from += step) weight[k] = *from;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      bool outside;
      const Offset at = offset_at(tap + k, &outside);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) value[k][c] = outside ? 0.0f : __ldg(in[c] + at);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(to_float(weight[k]), value[k][c], sum[c]);
  }
#pragma unroll 1
  for (; tap < end; ++tap, from += step) {
    bool outside;
    const Offset at = offset_at(tap, &outside);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(to_float(*from), outside ? 0.0f : __ldg(in[c] + at), sum[c]);
  }
}

// The sums over a share of the taps for the channels of `present` from `begin` on; those behind `count` repeat the last one.
template <class T, int kChannels>
__device__ inline void add_share(const StepArgs& args, SharedArray<int> present, int64_t b, int begin, int count, int y, int x, int first,
                                 int end, float (&sum)[kChannels]) {
  const float* in[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    in[c] = args.in + b * args.in_stride[0] + present[begin + min(c, count - 1)] * args.in_stride[1];
#ifndef AFA_CUDA_EMULATOR
    // The compiler forgets what this is the sum of: else it adds up all of it again for each tap, in four instructions instead of one.
    asm volatile("" : "+l"(in[c]));
#endif
  }
  if (args.zero_border && args.near) add_taps<T, kChannels, true, true>(args, b, y, x, in, first, end, sum);
  if (args.zero_border && !args.near) add_taps<T, kChannels, true, false>(args, b, y, x, in, first, end, sum);
  if (!args.zero_border && args.near) add_taps<T, kChannels, false, true>(args, b, y, x, in, first, end, sum);
  if (!args.zero_border && !args.near) add_taps<T, kChannels, false, false>(args, b, y, x, in, first, end, sum);
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kStepThreads, kChannels > 4 ? 6 : 8)
    diffuse_step(const __grid_constant__ StepArgs args) {
  const int channels = int(args.out.size[1]), height = int(args.out.size[2]), width = int(args.out.size[3]);
  const int taps = int(args.weights.size[1]), groups = (channels + kChannels - 1) / kChannels;
  SharedArena arena;
  SharedArray<int> present = arena.take<int>(channels + 1);
  const int begin = int(blockIdx.x % unsigned(groups)) * kChannels;
  const int x = int(blockIdx.x / unsigned(groups) * blockDim.x + threadIdx.x);
  for (int64_t b = blockIdx.z; b < args.out.size[0]; b += gridDim.z) {
    const int count = min(present_channels(args.class_mask, b, channels, present) - begin, kChannels);
    if (count <= 0 || x >= width) continue;
    for (int64_t y = blockIdx.y * blockDim.y + threadIdx.y; y < height; y += gridDim.y * blockDim.y) {
      float sum[kChannels] = {};
      add_share<T>(args, present, b, begin, count, int(y), x, 0, taps, sum);
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (c < count)
          store_element(args.out.data, args.out.dtype, offset_of(args.out, b, present[begin + c], y) + x * args.out.stride[3], sum[c]);
    }
  }
}

// The same for images too small to fill the device: kSplit threads share the taps of their pixels, whose sums meet in shared memory
// and are added in order. Blocks are kSplitWidth x 1 x kSplit.
constexpr int kSplit = 8, kSplitWidth = kStepThreads / kSplit;

template <class T, int kChannels>
__global__ void __launch_bounds__(kStepThreads, 6) diffuse_step_split(const __grid_constant__ StepArgs args) {
  constexpr int kPart = kChannels * kSplitWidth;
  const int channels = int(args.out.size[1]), height = int(args.out.size[2]), width = int(args.out.size[3]);
  const int taps = int(args.weights.size[1]), groups = (channels + kChannels - 1) / kChannels;
  const int share = (taps + kSplit - 1) / kSplit, first = int(threadIdx.z) * share;
  SharedArena arena;
  SharedArray<int> present = arena.take<int>(channels + 1);
  SharedArray<float> parts = arena.take<float>(kSplit * kPart);  // [kSplit][kChannels][kSplitWidth]
  const int begin = int(blockIdx.x % unsigned(groups)) * kChannels;
  const int left = int(blockIdx.x / unsigned(groups)) * kSplitWidth, own = left + int(threadIdx.x);
  for (int64_t b = blockIdx.z; b < args.out.size[0]; b += gridDim.z) {
    const int count = min(present_channels(args.class_mask, b, channels, present) - begin, kChannels);
    if (count <= 0) continue;
    for (int y = int(blockIdx.y); y < height; y += int(gridDim.y)) {
      float sum[kChannels] = {};
      if (own < width) add_share<T>(args, present, b, begin, count, y, own, first, min(first + share, taps), sum);
      __syncthreads();  // the last row's parts have been read
#pragma unroll
      for (int c = 0; c < kChannels; ++c) parts[threadIdx.z * kPart + c * kSplitWidth + threadIdx.x] = sum[c];
      __syncthreads();
      for (int at = int(threadIdx.z * kSplitWidth + threadIdx.x); at < count * kSplitWidth; at += kStepThreads) {
        const int c = at / kSplitWidth, x = left + at % kSplitWidth;
        if (x >= width) continue;
        float total = 0;
        for (int part = 0; part < kSplit; ++part) total += parts[part * kPart + at];
        store_element(args.out.data, args.out.dtype, offset_of(args.out, b, present[begin + c], y) + x * args.out.stride[3], total);
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
        const int2 offset = tap_at<false>(args, t);
        const Range rows = sources(int(y), offset.x, height, args.zero_border);
        const Range columns = sources(x, offset.y, width, args.zero_border);
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
// More of them than fit in StepArgs. They travel as a parameter too: no host memory need outlive the launch, and a CUDA graph keeps
// its own copy.
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

template <class T, int kChannels>
static Status launch_step(const StepArgs& args, void* stream) {
  const auto& size = args.out.size;
  const int64_t groups = blocks_for(size[1], kChannels);
  LaunchShape shape = image_shape(size[3], size[2], size[0]);
  shape.shared_bytes = SharedArena::bytes<int>(size[1] + 1);
  // Less than four blocks for a multiprocessor, and enough taps to share: the random walk's windows.
  const int64_t blocks = groups * shape.grid.x * shape.grid.y * shape.grid.z;
  if (args.weights.size[1] >= 8 * kSplit && blocks < 4 * device_limits().multiprocessors) {
    shape.block = dim3(kSplitWidth, 1, kSplit);
    shape.grid = dim3(unsigned(groups * blocks_for(size[3], kSplitWidth)), grid_limit(size[2]), grid_limit(size[0]));
    shape.shared_bytes += SharedArena::bytes<float>(kStepThreads * kChannels);
    return launch(diffuse_step_split<T, kChannels>, shape, stream, args);
  }
  if (groups * shape.grid.x > 0x7fffffff) return Status::unsupported;
  shape.grid.x *= unsigned(groups);
  return launch(diffuse_step<T, kChannels>, shape, stream, args);
}

template <class T>
static Status launch_step(const StepArgs& args, void* stream) {
  if (args.out.size[1] > 4) return launch_step<T, 7>(args, stream);
  return args.out.size[1] > 3 ? launch_step<T, 4>(args, stream) : launch_step<T, 3>(args, stream);
}

static Status launch_iteration(const StepArgs& args, bool transpose, void* stream) {
  const int64_t channels = args.out.size[1];
  if (transpose) {
    LaunchShape shape = image_shape(args.out.size[3], args.out.size[2], args.out.size[0] * blocks_for(channels, kAdjointChannels));
    shape.shared_bytes = SharedArena::bytes<int>(channels + 1);
    return launch(diffuse_adjoint, shape, stream, args);
  }
  switch (args.weights.dtype) {
    case DType::f16: return launch_step<__half>(args, stream);
    case DType::bf16: return launch_step<__nv_bfloat16>(args, stream);
    default: return launch_step<float>(args, stream);
  }
}

static View<4> buffer_view(const View<4>& masks, float* data) {
  View<4> view = masks;
  view.data = data, view.dtype = DType::f32;
  pack_rows(&view, 4);
  return view;
}
static int64_t buffer_floats(const View<4>& masks) {
  return round_up(masks.size[0] * masks.size[1] * masks.size[2] * round_up(masks.size[3], 4), 64);
}

// Whether the taps, none farther than the image is large, fit in StepArgs.
static bool in_parameter(const DiffusionArgs& args) {
  return args.taps <= kParameterTaps && args.masks.size[2] <= INT16_MAX && args.masks.size[3] <= INT16_MAX;
}
static int64_t offset_floats(const DiffusionArgs& args) { return in_parameter(args) ? 0 : round_up(2 * args.taps, 64); }

// Coordinate i % 2 of tap i / 2. One image length away an offset already reaches the border; farther could overflow.
static int32_t near_offset(const DiffusionArgs& args, int64_t i) {
  const int limit = int(args.masks.size[2 + i % 2]);
  return clamp_to(args.offsets[i], -limit, limit);
}

static Status store_taps(const DiffusionArgs& args, int32_t* offsets, void* stream) {
  for (int64_t first = 0; first < args.taps; first += kOffsetsAtOnce) {
    OffsetChunk chunk = {int(args.taps - first < kOffsetsAtOnce ? args.taps - first : kOffsetsAtOnce), {}};
    for (int i = 0; i < 2 * chunk.count; ++i) chunk.value[i] = near_offset(args, 2 * first + i);
    LaunchShape shape;
    shape.grid = dim3(1), shape.block = dim3(kStepThreads);
    AFA_TRY(launch(store_offsets, shape, stream, chunk, offsets + 2 * first));
  }
  return Status::ok;
}

int64_t stream_workspace(const DiffusionArgs& args) {
  const bool packs = args.masks.dtype != DType::f32 || args.masks.stride[3] != 1;
  const int64_t buffers = packs || args.num_iter > 2 ? 2 : args.num_iter > 1 ? 1 : 0;
  return 4 * (offset_floats(args) + buffers * buffer_floats(args.masks));
}

Status stream_diffusion(const DiffusionArgs& args, bool padded, void* workspace, void* stream) {
  if (args.class_mask != nullptr)
    AFA_TRY(launch_copy(args.masks, args.out, args.class_mask, args.num_iter == 0, true, stream));
  else if (args.num_iter == 0)
    AFA_TRY(launch_copy(args.masks, args.out, nullptr, true, false, stream));
  if (args.num_iter == 0) return Status::ok;

  float* memory = static_cast<float*>(workspace) + offset_floats(args);
  StepArgs step = {};
  step.weights = args.weights, step.class_mask = args.class_mask, step.zero_border = args.border == Border::zero;
  if (in_parameter(args)) {
    for (int64_t t = 0; t < args.taps; ++t)
      step.taps[t] = int32_t(uint32_t(near_offset(args, 2 * t + 1)) << 16 | uint16_t(near_offset(args, 2 * t)));
  } else {
    AFA_TRY(store_taps(args, static_cast<int32_t*>(workspace), stream));
    step.offsets = static_cast<const int32_t*>(workspace);
  }

  const View<4> buffers[2] = {buffer_view(args.masks, memory), buffer_view(args.masks, memory + buffer_floats(args.masks))};
  View<4> in = args.masks;
  if (in.dtype != DType::f32 || in.stride[3] != 1) {
    in = buffers[1];
    AFA_TRY(launch_copy(args.masks, in, args.class_mask, true, false, stream));
  }
  for (int64_t iteration = 0; iteration < args.num_iter; ++iteration) {
    step.in = static_cast<const float*>(in.data);
    for (int i = 0; i < 3; ++i) step.in_stride[i] = in.stride[i];
    step.near = in_parameter(args) && in.size[2] * std::abs(in.stride[2]) + in.size[3] <= INT32_MAX;
    step.out = iteration + 1 == args.num_iter ? args.out : buffers[iteration & 1];
    AFA_TRY(launch_iteration(step, args.transpose, stream));
    in = step.out;
  }
  return Status::ok;
}

}  // namespace afa
