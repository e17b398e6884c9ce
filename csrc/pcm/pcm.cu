// The pixel correlation module on a GPU.
//
// Data flow: pcm_pack_kernel writes what is given as float32 with whole tiles of pixels: features, and for the gradient values and g,
// channel by channel for products of pixels; what is added up, the values or for the gradient the features, pixel by pixel. A block of
// pcm_kernel has 64 pixels j and a share of the pixels i. Tile by tile of these it forms the 64 x 64 products f_i . f_j in registers, 32
// a thread, from panels of 16 channels that are fetched ahead into two buffers; what becomes of them goes to a table in shared memory:
// max(f_i . f_j, 0), or for the gradient g_j . values_i + values_j . g_i, formed likewise, where the first product was positive. The
// table times the rows i, read through the first cache, is added to the block's sums, which lie in shared memory, where each thread
// has its own. pcm_finish_kernel adds up the shares, in order.
// Both in plain float32, whatever was given: tensor cores would keep 11 bits of it.
// Floor: 2 N^2 (C + K) operations, for the gradient 2 N^2 (2 C + 2 K), K with the channel of ones. Bound: these, and a third of them in
// reads of shared memory.
// Occupancy: pcm_pack_kernel 256 x 4, pcm_kernel 128 x 3, pcm_finish_kernel 256 x 4 (threads x blocks a multiprocessor, by registers).
#include <algorithm>

#include "common/arena.h"
#include "common/cuda_common.cuh"
#include "pcm/pcm.h"

namespace afa {

constexpr int kPixelThreads = 256;
constexpr int kThreads = 128;
constexpr int kTile = 64;      // pixels
constexpr int kPanel = 16;     // channels
constexpr int kRows = 8;       // pixels i of a thread
constexpr int kColumns = 4;    // pixels j of a thread
constexpr int kAcross = kTile / kColumns;  // threads side by side
constexpr int kQuads = 2 * kPanel * kTile / 4 / kThreads;  // four pixels each, that a thread fetches of both panels

// Channels of a thread that are added up together: 8 such make a run.
template <bool kGradient>
constexpr int kOwn = kGradient ? 8 : 4;
template <bool kGradient>
constexpr int kRun = kOwn<kGradient> * kThreads / kAcross;

struct PcmPacked {
  int64_t batch = 0, pixels = 0, tiles = 0;  // pixels: of whole tiles
  int depth = 0, channels = 0, added = 0;  // features, values, and what is added up; of whole panels, panels and runs
  int share = 0, parts = 1;                // tiles i of a block, and how many such
  int runs = 0, chunks = 1;                // runs of a block, and how many such
  float* features = nullptr;                     // [batch][depth][pixels]
  float *values = nullptr, *grads = nullptr;     // [batch][channels][pixels]; of the gradient alone
  float* rows = nullptr;                         // [batch][pixels][added]
  float* sums = nullptr;                         // [parts][batch][added][pixels]
};

// ---- packing -------------------------------------------------------------------------------------------------------------

struct PackTarget {
  float* to = nullptr;
  int64_t pixels = 0, channels = 0;  // with what pads them, which is 0
  bool by_pixel = false, ones = false;
};

__global__ void __launch_bounds__(kPixelThreads, 4)
    pcm_pack_kernel(const __grid_constant__ View<4> from, const __grid_constant__ PackTarget target) {
  const int64_t at = blockIdx.x * int64_t(kPixelThreads) + threadIdx.x, per_image = target.pixels * target.channels;
  if (at >= from.size[0] * per_image) return;
  const int64_t b = at / per_image, within = at % per_image;
  const int64_t c = target.by_pixel ? within % target.channels : within / target.pixels;
  const int64_t pixel = target.by_pixel ? within / target.channels : within % target.pixels;
  const int64_t width = from.size[3];
  float value = 0.0f;
  if (pixel < from.size[2] * width) {
    if (c < from.size[1])
      value = load_element(from.data, from.dtype, offset_of(from, b, c, pixel / width) + pixel % width * from.stride[3]);
    else if (c == from.size[1] && target.ones)
      value = 1.0f;
  }
  target.to[at] = value;
}

// ---- sums ----------------------------------------------------------------------------------------------------------------

struct PcmShared {
  SharedArray<float> panels;  // [2][rows, columns][kPanel][kTile]
  SharedArray<float> table;   // [kTile rows][kTile columns]
  SharedArray<float> sums;    // [runs][own channels][kThreads][kColumns]
  __device__ PcmShared(SharedArena& arena, int floats)
      : panels(arena.take<float>(4 * kPanel * kTile)), table(arena.take<float>(kTile * kTile)), sums(arena.take<float>(floats)) {}
  static int64_t bytes(int64_t floats) {
    return SharedArena::bytes<float>(4 * kPanel * kTile) + SharedArena::bytes<float>(kTile * kTile) + SharedArena::bytes<float>(floats);
  }
};

// Both panels of channels, on their way to registers and from there to a buffer. Quad q of a thread: the first half rows, then columns.
struct PanelFetch {
  float4 ahead[kQuads];
  __device__ __forceinline__ void fetch(const float* rows, const float* columns, int64_t pixels) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int at = (q % (kQuads / 2)) * kThreads + int(threadIdx.x);
      const float* from = q < kQuads / 2 ? rows : columns;
      ahead[q] = __ldg(reinterpret_cast<const float4*>(from + at / kAcross * pixels + at % kAcross * 4));
    }
  }
  __device__ __forceinline__ void keep(SharedArray<float> buffer) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) *reinterpret_cast<float4*>(&buffer[(q * kThreads + int(threadIdx.x)) * 4]) = ahead[q];
  }
};

// sum [rows][columns] of this thread += products over `depth` channels; rows and columns: the first channel's pixels of the tiles.
__device__ __forceinline__ void add_products(const float* rows, const float* columns, int64_t pixels, int depth,
                                             SharedArray<float> panels, float (&sum)[kRows][kColumns]) {
  const int row = int(threadIdx.x) / kAcross * kRows, column = int(threadIdx.x) % kAcross * kColumns;
  PanelFetch panel;
  panel.fetch(rows, columns, pixels);
  panel.keep(panels);
  __syncthreads();
#pragma unroll 1
  for (int c = 0; c < depth; c += kPanel) {
    const int buffer = c / kPanel % 2 * 2 * kPanel * kTile, next = c + kPanel;
    if (next < depth) panel.fetch(rows + next * pixels, columns + next * pixels, pixels);
#pragma unroll
    for (int k = 0; k < kPanel; ++k) {
      const float4 one = *reinterpret_cast<const float4*>(&panels[buffer + k * kTile + row]);
      const float4 two = *reinterpret_cast<const float4*>(&panels[buffer + k * kTile + row + 4]);
      const float4 other = *reinterpret_cast<const float4*>(&panels[buffer + (kPanel + k) * kTile + column]);
      const float a[kRows] = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
      const float b[kColumns] = {other.x, other.y, other.z, other.w};
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[r][j] = fmaf(a[r], b[j], sum[r][j]);
    }
    if (next < depth) panel.keep(panels + (2 * kPanel * kTile - buffer));
    __syncthreads();
  }
}

// The table's entries of this thread, from the tile i of rows on, whose columns are the tile j.
template <bool kGradient>
__device__ __forceinline__ void fill_table(const PcmPacked& packed, int64_t b, int64_t i, int64_t j, const PcmShared& shared) {
  float sum[kRows][kColumns] = {};
  const float* features = packed.features + b * packed.depth * packed.pixels;
  add_products(features + i, features + j, packed.pixels, packed.depth, shared.panels, sum);
  if constexpr (kGradient) {
    unsigned apart = 0;
#pragma unroll
    for (int at = 0; at < kRows * kColumns; ++at) {
      apart |= unsigned(sum[at / kColumns][at % kColumns] <= 0.0f) << at;
      sum[at / kColumns][at % kColumns] = 0.0f;
    }
    const float* values = packed.values + b * packed.channels * packed.pixels;
    const float* grads = packed.grads + b * packed.channels * packed.pixels;
    add_products(values + i, grads + j, packed.pixels, packed.channels, shared.panels, sum);
    add_products(grads + i, values + j, packed.pixels, packed.channels, shared.panels, sum);
#pragma unroll
    for (int at = 0; at < kRows * kColumns; ++at)
      if (apart >> at & 1) sum[at / kColumns][at % kColumns] = 0.0f;
  } else {
#pragma unroll
    for (int at = 0; at < kRows * kColumns; ++at)  // NaN stays
      if (sum[at / kColumns][at % kColumns] < 0.0f) sum[at / kColumns][at % kColumns] = 0.0f;
  }
  const int row = int(threadIdx.x) / kAcross * kRows, column = int(threadIdx.x) % kAcross * kColumns;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    *reinterpret_cast<float4*>(&shared.table[(row + r) * kTile + column]) = make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
  __syncthreads();
}

// A run's sums of this thread += the table times rows [kTile][added], from its first channel on.
template <int kN>
__device__ __forceinline__ void add_run(const float* rows, int64_t added, SharedArray<float> table, SharedArray<float> sums) {
  const int column = int(threadIdx.x) % kAcross * kColumns;
  float4 sum[kN];
#pragma unroll
  for (int n = 0; n < kN; ++n) sum[n] = *reinterpret_cast<const float4*>(&sums[n * kThreads * kColumns]);
#pragma unroll 4
  for (int i = 0; i < kTile; ++i) {
    const float4 weight = *reinterpret_cast<const float4*>(&table[i * kTile + column]);
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(rows + i * added + n));
      const float value[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        sum[n + m].x = fmaf(value[m], weight.x, sum[n + m].x), sum[n + m].y = fmaf(value[m], weight.y, sum[n + m].y);
        sum[n + m].z = fmaf(value[m], weight.z, sum[n + m].z), sum[n + m].w = fmaf(value[m], weight.w, sum[n + m].w);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) *reinterpret_cast<float4*>(&sums[n * kThreads * kColumns]) = sum[n];
}

// Grid: the tiles j of all images, times the shares of tiles i, times the chunks of runs.
template <bool kGradient>
__global__ void __launch_bounds__(kThreads, 3) pcm_kernel(const __grid_constant__ PcmPacked packed) {
  constexpr int kN = kOwn<kGradient>, kFloats = kN * kThreads * kColumns;
  SharedArena arena;
  const PcmShared shared(arena, packed.runs * kFloats);
  const int64_t b = blockIdx.x / packed.tiles, j = blockIdx.x % packed.tiles * kTile;
  const int part = int(blockIdx.y) % packed.parts, first = int(blockIdx.y) / packed.parts * packed.runs;
  const int left = packed.added / kRun<kGradient> - first, runs = left < packed.runs ? left : packed.runs;
  const int channel = first * kRun<kGradient> + int(threadIdx.x) / kAcross * kN;
  const SharedArray<float> own = shared.sums + int(threadIdx.x) * kColumns;
#pragma unroll 1
  for (int n = 0; n < runs * kN; ++n) *reinterpret_cast<float4*>(&own[n * kThreads * kColumns]) = make_float4(0, 0, 0, 0);
  const int64_t begin = int64_t(part) * packed.share, end = begin + packed.share < packed.tiles ? begin + packed.share : packed.tiles;
  for (int64_t tile = begin; tile < end; ++tile) {
    fill_table<kGradient>(packed, b, tile * kTile, j, shared);
    const float* rows = packed.rows + (b * packed.pixels + tile * kTile) * packed.added + channel;
#pragma unroll 1
    for (int run = 0; run < runs; ++run) add_run<kN>(rows + run * kRun<kGradient>, packed.added, shared.table, own + run * kFloats);
  }
  float* to = packed.sums + ((part * packed.batch + b) * packed.added + channel) * packed.pixels + j + int(threadIdx.x) % kAcross * kColumns;
#pragma unroll 1
  for (int run = 0; run < runs; ++run)
#pragma unroll
    for (int n = 0; n < kN; ++n)
      *reinterpret_cast<float4*>(to + (run * kRun<kGradient> + n) * packed.pixels) =
          *reinterpret_cast<const float4*>(&own[run * kFloats + n * kThreads * kColumns]);
}

__global__ void __launch_bounds__(kPixelThreads, 4)
    pcm_finish_kernel(const __grid_constant__ PcmPacked packed, const __grid_constant__ View<4> out) {
  const int64_t at = blockIdx.x * int64_t(kPixelThreads) + threadIdx.x, width = out.size[3], count = out.size[2] * width;
  if (at >= packed.batch * out.size[1] * count) return;
  const int64_t b = at / (out.size[1] * count), c = at / count % out.size[1], pixel = at % count;
  const float* from = packed.sums + (b * packed.added + c) * packed.pixels + pixel;
  float sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < packed.parts; ++part) sum += from[part * packed.batch * packed.added * packed.pixels];
  store_element(out.data, out.dtype, offset_of(out, b, c, pixel / width) + pixel % width * out.stride[3], sum);
}

// ---- entry points --------------------------------------------------------------------------------------------------------

constexpr int64_t kLeastShared = 48 * 1024;  // bytes, which every device has
constexpr int64_t kMostSums = 64 * 1024;     // bytes: two blocks on a multiprocessor, or a large one of four

template <bool kGradient>
struct PcmPlan {
  PcmPacked packed;
  int64_t shared_bytes = 0, bytes = 0;

  PcmPlan(const PcmArgs& args, void* workspace) {
    const DeviceLimits limits = device_limits();
    packed.batch = args.features.size[0], packed.tiles = blocks_for(args.count(), kTile), packed.pixels = packed.tiles * kTile;
    packed.depth = int(round_up(args.features.size[1], kPanel)), packed.channels = int(round_up(args.channels(), kPanel));
    packed.added = int(round_up(kGradient ? args.features.size[1] : args.channels(), kRun<kGradient>));
    // As many runs to a block as there is room for their sums, about as many to each.
    const int64_t all = packed.added / kRun<kGradient>, run_bytes = kRun<kGradient> * kTile * int64_t(sizeof(float));
    const int64_t room = std::max(kLeastShared, int64_t(limits.shared_bytes)) - PcmShared::bytes(0);
    packed.chunks = int(blocks_for(all, std::max<int64_t>(1, std::min(room, kMostSums) / run_bytes)));
    packed.runs = int(blocks_for(all, packed.chunks)), packed.chunks = int(blocks_for(all, packed.runs));
    shared_bytes = PcmShared::bytes(packed.runs * run_bytes / int64_t(sizeof(float)));
    // Four blocks for each multiprocessor, if there are tiles for them.
    const int64_t wanted = blocks_for(4 * int64_t(limits.multiprocessors), packed.batch * packed.tiles * packed.chunks);
    packed.share = int(blocks_for(packed.tiles, std::max<int64_t>(1, std::min({wanted, packed.tiles, int64_t(16)}))));
    packed.parts = int(blocks_for(packed.tiles, packed.share));
    baseline::Arena arena(workspace);
    const int64_t pixels = packed.batch * packed.pixels;
    packed.features = arena.take<float>(pixels * packed.depth), packed.rows = arena.take<float>(pixels * packed.added);
    if (kGradient) packed.values = arena.take<float>(pixels * packed.channels), packed.grads = arena.take<float>(pixels * packed.channels);
    packed.sums = arena.take<float>(packed.parts * pixels * packed.added);
    bytes = arena.used;
  }
};

static Status launch_pack(const View<4>& from, float* to, int64_t pixels, int64_t channels, bool by_pixel, bool ones, void* stream) {
  PackTarget target;
  target.to = to, target.pixels = pixels, target.channels = channels, target.by_pixel = by_pixel, target.ones = ones;
  LaunchShape shape;
  shape.grid = dim3(unsigned(blocks_for(from.size[0] * pixels * channels, kPixelThreads))), shape.block = dim3(kPixelThreads);
  return launch(pcm_pack_kernel, shape, stream, from, target);
}

template <bool kGradient>
static Status run(const PcmArgs& args, void* workspace, void* stream) {
  const PcmPlan<kGradient> plan(args, workspace);
  const PcmPacked& packed = plan.packed;
  const bool ones = args.sums.size[1] > args.values.size[1];
  AFA_TRY(launch_pack(args.features, packed.features, packed.pixels, packed.depth, false, false, stream));
  if (kGradient) {
    AFA_TRY(launch_pack(args.features, packed.rows, packed.pixels, packed.added, true, false, stream));
    AFA_TRY(launch_pack(args.values, packed.values, packed.pixels, packed.channels, false, ones, stream));
    AFA_TRY(launch_pack(args.sums, packed.grads, packed.pixels, packed.channels, false, false, stream));
  } else {
    AFA_TRY(launch_pack(args.values, packed.rows, packed.pixels, packed.added, true, ones, stream));
  }
  LaunchShape shape;
  shape.grid = dim3(unsigned(packed.batch * packed.tiles), unsigned(packed.parts * packed.chunks)), shape.block = dim3(kThreads);
  shape.shared_bytes = plan.shared_bytes;
  AFA_TRY(launch(pcm_kernel<kGradient>, shape, stream, packed));
  const View<4>& out = kGradient ? args.grad_features : args.sums;
  LaunchShape last;
  last.grid = dim3(unsigned(blocks_for(out.size[0] * out.size[1] * args.count(), kPixelThreads))), last.block = dim3(kPixelThreads);
  return launch(pcm_finish_kernel, last, stream, packed, out);
}

static Status check_pcm(const PcmArgs& args, bool gradient) {
  if (!pcm_fits(args, gradient)) return Status::bad_argument;
  // In all they are fewer than grids have blocks.
  const bool fits = args.count() < int64_t(1) << 24 && args.features.size[1] <= 1 << 15 && args.channels() <= 1 << 15 &&
                    args.features.size[0] * args.count() * std::max(args.features.size[1], args.channels()) < int64_t(1) << 38;
  return fits ? Status::ok : Status::unsupported;
}

int64_t pcm_cuda_workspace(const PcmArgs& args, int device) {
  if (check_pcm(args, false) != Status::ok) return 0;
  DeviceGuard guard(device);
  return PcmPlan<false>(args, nullptr).bytes;
}
int64_t pcm_features_gradient_cuda_workspace(const PcmArgs& args, int device) {
  if (check_pcm(args, true) != Status::ok) return 0;
  DeviceGuard guard(device);
  return PcmPlan<true>(args, nullptr).bytes;
}

Status pcm_cuda(const PcmArgs& args, void* workspace, int device, void* stream) {
  AFA_TRY(check_pcm(args, false));
  DeviceGuard guard(device);
  return run<false>(args, workspace, stream);
}
Status pcm_features_gradient_cuda(const PcmArgs& args, void* workspace, int device, void* stream) {
  AFA_TRY(check_pcm(args, true));
  DeviceGuard guard(device);
  return run<true>(args, workspace, stream);
}

}  // namespace afa
