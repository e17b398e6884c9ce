// Diffusion on a GPU, streaming the weights: the kernels for what does not fit on chip.
//
// diffuse_step is one iteration: a thread takes 16 bytes of weights at a time (4 pixels of float, 8 of half) for up to 7 channels,
// whose sums it keeps in registers. Data flow: masks that are not float32 with unit stride are first copied to the workspace as
// float32; the iterations alternate two buffers there; the last writes `out` in its own type and strides. Weights whose rows are not
// on 16-byte boundaries take the same kernel one pixel at a time. diffuse_step_split shares a pixel's taps between 8 threads where
// the image is too small to fill the device otherwise. diffuse_adjoint gathers, for each pixel, the (pixel, tap) pairs that read it;
// at replicated borders these are ranges.
// The taps travel with the launch, in the constant bank where a warp reads one at once; those that find no room there are first
// written to the workspace by store_offsets.
// Floor: taps * 4 (2 in half) bytes of weights per pixel and iteration through device memory.
// Occupancy: diffuse_step 128 x 4, diffuse_step_split 128 x 4, diffuse_adjoint 128 x 4, copy_masks 128 x 8, store_offsets 128 x 8
// (threads x blocks a multiprocessor, by registers).
// Wide loads: diffuse_step<float, 4, *>, diffuse_step<__half, 8, *>, diffuse_step<__nv_bfloat16, 8, *>,
// diffuse_step_split<float, 4, *>.
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
  bool zero_border, wide_in;  // wide_in: rows of `in` are on 16-byte boundaries
  int32_t taps[kParameterTaps];  // dx above 16 bits of dy
};

__device__ inline int2 tap_at(const StepArgs& args, int tap) {
  if (args.offsets != nullptr) return __ldg(reinterpret_cast<const int2*>(args.offsets) + tap);
  const int32_t packed = args.taps[tap];
  return make_int2(int16_t(packed), packed >> 16);
}

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

// Adds weight * neighbour over taps [begin, end) of kPixels pixels from (y, x0) on, for the first `count` channels.
template <class T, int kPixels, int kChannels>
__device__ inline void add_taps(const StepArgs& args, int64_t b, int y, int x0, const float* const (&in)[kChannels], int count,
                                int begin, int end, float (&sum)[kChannels][kPixels]) {
  constexpr int kAhead = 4;  // taps whose weights are loaded before the first is used
  const int height = int(args.out.size[2]), width = int(args.out.size[3]);
  const int64_t at = offset_of(args.weights, b, 0, y) + x0 * (kPixels == 1 ? args.weights.stride[3] : 1);
  for (int first = begin; first < end; first += kAhead) {
    WeightVector<T, kPixels> ahead[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (first + k < end) ahead[k].load(args.weights, at + (first + k) * args.weights.stride[1]);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= end) break;
      float weight[kPixels];
      ahead[k].unpack(weight);
      const int2 offset = tap_at(args, first + k);
      const int wanted = y + offset.x, row = clamp_to(wanted, 0, height - 1), left = x0 + offset.y;
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
}

// Where the input's channels begin: those of `present` from `begin` on, the last one repeated.
template <int kChannels>
__device__ inline void channel_inputs(const StepArgs& args, int64_t b, SharedArray<int> present, int begin, int count,
                                      const float* (&in)[kChannels]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    in[c] = args.in + b * args.in_stride[0] + present[begin + min(c, count - 1)] * args.in_stride[1];
}

template <class T, int kPixels, int kChannels>
__global__ void __launch_bounds__(kStepThreads, 4) diffuse_step(const __grid_constant__ StepArgs args) {
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
    channel_inputs(args, b, present, begin, count, in);
    for (int64_t y = blockIdx.y * blockDim.y + threadIdx.y; y < height; y += gridDim.y * blockDim.y) {
      float sum[kChannels][kPixels] = {};
      add_taps<T>(args, b, int(y), x0, in, count, 0, taps, sum);
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

// The same for images too small to fill the device: kSplit threads share the taps of their pixels, whose sums meet in shared memory
// and are added in order. Blocks are kSplitWidth x 1 x kSplit.
constexpr int kSplit = 8, kSplitWidth = kStepThreads / kSplit;

template <class T, int kPixels, int kChannels>
__global__ void __launch_bounds__(kStepThreads, 4) diffuse_step_split(const __grid_constant__ StepArgs args) {
  constexpr int kLine = kSplitWidth * kPixels, kPart = kChannels * kLine;
  const int channels = int(args.out.size[1]), height = int(args.out.size[2]), width = int(args.out.size[3]);
  const int taps = int(args.weights.size[1]), groups = (channels + kChannels - 1) / kChannels;
  const int share = (taps + kSplit - 1) / kSplit, first = int(threadIdx.z) * share;
  SharedArena arena;
  SharedArray<int> present = arena.take<int>(channels + 1);
  SharedArray<float> parts = arena.take<float>(kSplit * kPart);  // [kSplit][kChannels][kLine]
  const int left = int(blockIdx.x) * kLine, x0 = left + int(threadIdx.x) * kPixels;
  for (int64_t z = blockIdx.z; z < args.out.size[0] * groups; z += gridDim.z) {
    const int64_t b = z / groups;
    const int begin = int(z % groups) * kChannels;
    const int count = min(present_channels(args.class_mask, b, channels, present) - begin, kChannels);
    if (count <= 0) continue;
    const float* in[kChannels];
    channel_inputs(args, b, present, begin, count, in);
    for (int y = int(blockIdx.y); y < height; y += int(gridDim.y)) {
      float sum[kChannels][kPixels] = {};
      if (x0 < width) add_taps<T>(args, b, y, x0, in, count, first, min(first + share, taps), sum);
      __syncthreads();  // the last row's parts have been read
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
#pragma unroll
        for (int i = 0; i < kPixels; ++i) parts[threadIdx.z * kPart + c * kLine + threadIdx.x * kPixels + i] = sum[c][i];
      __syncthreads();
      for (int at = int(threadIdx.z * kSplitWidth + threadIdx.x); at < count * kLine; at += kStepThreads) {
        const int c = at / kLine, x = left + at % kLine;
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
        const int2 offset = tap_at(args, t);
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

template <class T, int kPixels, int kChannels>
static Status launch_step(const StepArgs& args, void* stream) {
  const auto& size = args.out.size;
  const int64_t items = blocks_for(size[3], kPixels), groups = size[0] * blocks_for(size[1], kChannels);
  LaunchShape shape = image_shape(items, size[2], groups);
  shape.shared_bytes = SharedArena::bytes<int>(size[1] + 1);
  // Less than two blocks for a multiprocessor, and enough taps to share: the random walk's windows.
  const int64_t blocks = int64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  if constexpr (std::is_same<T, float>::value) {
    if (args.weights.size[1] >= 8 * kSplit && blocks < 2 * device_limits().multiprocessors) {
      shape.block = dim3(kSplitWidth, 1, kSplit);
      shape.grid = dim3(unsigned(blocks_for(items, kSplitWidth)), grid_limit(size[2]), grid_limit(groups));
      shape.shared_bytes += SharedArena::bytes<float>(kStepThreads * kChannels * kPixels);
      return launch(diffuse_step_split<T, kPixels, kChannels>, shape, stream, args);
    }
  }
  return launch(diffuse_step<T, kPixels, kChannels>, shape, stream, args);
}

static Status launch_iteration(const StepArgs& args, bool padded, bool transpose, void* stream) {
  const int64_t channels = args.out.size[1];
  if (transpose) {
    LaunchShape shape = image_shape(args.out.size[3], args.out.size[2], args.out.size[0] * blocks_for(channels, kAdjointChannels));
    shape.shared_bytes = SharedArena::bytes<int>(channels + 1);
    return launch(diffuse_adjoint, shape, stream, args);
  }
  const bool whole = padded || args.weights.size[3] % vector_elements(args.weights) == 0;
  if (!wide_rows(args.weights) || !whole) return launch_step<float, 1, 7>(args, stream);
  if (args.weights.dtype == DType::f16) return launch_step<__half, 8, 4>(args, stream);
  if (args.weights.dtype == DType::bf16) return launch_step<__nv_bfloat16, 8, 4>(args, stream);
  return channels > 4 ? launch_step<float, 4, 7>(args, stream) : launch_step<float, 4, 4>(args, stream);
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
    step.in = static_cast<const float*>(in.data), step.wide_in = wide_rows(in);
    for (int i = 0; i < 3; ++i) step.in_stride[i] = in.stride[i];
    step.out = iteration + 1 == args.num_iter ? args.out : buffers[iteration & 1];
    AFA_TRY(launch_iteration(step, padded, args.transpose, stream));
    in = step.out;
  }
  return Status::ok;
}

}  // namespace afa
