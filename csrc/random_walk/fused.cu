// The random walk on a GPU in one launch: normalised, weighed and stepped by the block that owns the pixels.
//
//   M'_i = sum_j P_ij M_j / D_i with P = A^p,   D_i = sum_k P_ki + eps
//
// A pixel's step needs its own taps and what points at it, nothing that another block makes: one step is one launch, whatever the size
// of the grid. Data flow: a block has a tile of 4 x 8 pixels, or of 1 x 8 where there would else be too few blocks for the device. Its 8
// or 32 threads for each pixel share the taps, of which each loads 10 at a time, those of D_i and its own side by side; T stays in shared
// memory as [taps][pixels] and never reaches device memory. The channels that have room there come next, 18 of them at radius 8 on an
// H100, of the rows and columns that the tile reaches, 0 outside the image. Then a warp sums up to 3 channels, its threads for a pixel
// every so manieth column of the window; where there are few channels several warps share the rows, and their sums meet in shared memory,
// in order. Between two steps the maps travel through the workspace (in L2) with a barrier of the whole grid: several steps are one
// cooperative launch, as long as all blocks fit on the device at once, 32 pixels each, 3 a multiprocessor: B * N up to 12,672 at radius 8
// on an H100. More than that, and the adjoint, whose pixels need other pixels' D, go by way of T in memory (random_walk.cu).
// Floor: the window read twice, once from L2; taps * channels loads of 4 bytes a pixel and step from shared memory, as many
// multiply-adds. Bound: these loads from many channels on, latency on small grids.
// Occupancy: walk_fused_kernel 256 x 3 (threads x blocks a multiprocessor, by registers).
#include <algorithm>

#include "random_walk/walk.cuh"

namespace afa {

constexpr int kFusedTaps = 448, kFusedChannels = 3, kFusedBlocks = 3;  // the last: of a multiprocessor
constexpr int kTileColumns = 8;                                        // of a block's tile
// Rows that a warp brings to shared memory at a time, as far as registers go.
template <bool kSeveralSteps>
constexpr int kStagedTogether = kSeveralSteps ? 10 : 20;

// What a block reaches: its tile and the window around it.
struct Staged {
  int rows, columns, channels;  // the latter: at a time
  Staged(const WalkTaps& taps, int pixels)
      : rows(pixels / kTileColumns + 2 * taps.reach_y), columns(kTileColumns + 2 * taps.reach_x), channels(1) {}
  __host__ __device__ int plane() const { return rows * columns; }
};

struct FusedArgs {
  WalkTaps taps;
  View<4> cams, out;
  const uint8_t* class_mask;
  int64_t num_steps;
  float* buffers[2];  // [B][present channels][H][W]
  Staged staged;
  int tiles_x;
};

// T of the block's pixels to shared memory. A thread has the taps `share`, `share` + `shares` and so on.
template <int kPixels>
__device__ inline void fill_weights(const WalkTaps& taps, int64_t b, bool present, int y, int x, SharedArray<float> weights,
                                    SharedArray<float> sums) {
  const int pixel = int(threadIdx.x) % kPixels, share = int(threadIdx.y * 32 + threadIdx.x) / kPixels, shares = kWalkThreads / kPixels;
  auto keep = [&](int tap, float value) { weights[tap * kPixels + pixel] = value; };
  const float total = column_sum<kPixels, 10, true>(taps, b, present, y, x, share, shares, sums, keep);
#pragma unroll 3
  for (int tap = share; tap < taps.count(); tap += shares) {
    const float value = present ? weights[tap * kPixels + pixel] / total : 0.0f;
    weights[tap * kPixels + pixel] = value;
  }
}

// Where a step reads its maps: the CAMs as they are, or what the step before left in the workspace, numbered by present channels.
template <class T>
struct CamReader {
  typedef T Element;
  const View<4>& cams;
  int64_t b;
  SharedArray<int> kept;
  __device__ const T* at(int c, int y, int x) const {
    return static_cast<const T*>(cams.data) + offset_of(cams, b, kept[c], y) + x * cams.stride[3];
  }
  __device__ int64_t row() const { return cams.stride[2]; }
  __device__ T read(const T* from) const { return *from; }
};
struct StepReader {
  typedef float Element;
  const float* image;
  int64_t pixels;
  int width;
  __device__ const float* at(int c, int y, int x) const { return image + c * pixels + int64_t(y) * width + x; }
  __device__ int64_t row() const { return width; }
  __device__ float read(const float* from) const { return __ldcg(from); }
};

// The channels [first, first + count) to `maps` [count][staged.rows][staged.columns], whose corner is at (top, left) of the image. Outside
// the image nothing is read: 0 times it need not be 0. A warp has a channel.
template <int kTogether, class Reader>
__device__ inline void stage(const WalkTaps& taps, const Staged& staged, const Reader& reader, int first, int count, int top, int left,
                             SharedArray<float> maps) {
  for (int c = int(threadIdx.y); c < count; c += kWalkGroups)
    for (int column = int(threadIdx.x); column < staged.columns; column += 32) {
      const bool inside = unsigned(left + column) < unsigned(taps.width);
      const typename Reader::Element* from = reader.at(first + c, top, left + column);
      int place = c * staged.plane() + column;
      for (int begin = 0; begin < staged.rows; begin += kTogether) {
        typename Reader::Element value[kTogether] = {};
#pragma unroll
        for (int k = 0; k < kTogether; ++k, from += reader.row())
          if (inside & (begin + k < staged.rows) & (unsigned(top + begin + k) < unsigned(taps.height))) value[k] = reader.read(from);
#pragma unroll
        for (int k = 0; k < kTogether; ++k, place += staged.columns)
          if (begin + k < staged.rows) maps[place] = to_float(value[k]);
      }
    }
}

// The sums of kChannels channels, `between` planes of maps apart, over the rows `part`, `part` + `parts` and so on of the window and every
// 32 / kPixels th of their columns.
template <int kChannels, int kPixels>
__device__ inline void add_rows(const WalkTaps& taps, const Staged& staged, SharedArray<float> weights, SharedArray<float> maps, int part,
                                int parts, int between, float (&sum)[kFusedChannels]) {
  constexpr int kLanes = 32 / kPixels;
  const int pixel = int(threadIdx.x) % kPixels, lane = int(threadIdx.x) / kPixels;
  const int side = taps.side(), rows = 2 * taps.reach_y + 1, whole = side / kLanes, apart = between * staged.plane();
  for (int row = part; row < rows; row += parts) {
    int weight = (row * side + lane) * kPixels + pixel;
    int map = (row + pixel / kTileColumns) * staged.columns + pixel % kTileColumns + lane;
#pragma unroll 4
    for (int k = 0; k < whole; ++k, weight += 32, map += kLanes) {
      const float factor = weights[weight];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(factor, maps[map + c * apart], sum[c]);
    }
    if (whole * kLanes + lane < side) {
      const float factor = weights[weight];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(factor, maps[map + c * apart], sum[c]);
    }
  }
}

// One step of the block's pixels; `write(c, value)` takes the results. The whole block calls this.
template <int kPixels, int kTogether, class Reader, class Write>
__device__ inline void step_pixels(const FusedArgs& args, SharedArray<float> weights, SharedArray<float> sums, SharedArray<float> maps,
                                   bool present, int top, int left, int found, const Reader& reader, const Write& write) {
  const int warp = int(threadIdx.y), pixel = int(threadIdx.x) % kPixels, lane = int(threadIdx.x) / kPixels;
  for (int first = 0; first < found; first += args.staged.channels) {
    const int count = min(args.staged.channels, found - first);
    const int slots = count > 4 * kFusedChannels ? 8 : count > 2 * kFusedChannels ? 4 : count > kFusedChannels ? 2 : 1;
    const int parts = kWalkGroups / slots, slot = warp % slots, part = warp / slots, plane = args.staged.plane();
    __syncthreads();  // the channels before, and their sums, may still be read
    stage<kTogether>(args.taps, args.staged, reader, first, count, top, left, maps);
    __syncthreads();
    float sum[kFusedChannels] = {};
    if (slot + 2 * slots < count)
      add_rows<3, kPixels>(args.taps, args.staged, weights, maps + slot * plane, part, parts, slots, sum);
    else if (slot + slots < count)
      add_rows<2, kPixels>(args.taps, args.staged, weights, maps + slot * plane, part, parts, slots, sum);
    else if (slot < count)
      add_rows<1, kPixels>(args.taps, args.staged, weights, maps + slot * plane, part, parts, slots, sum);
#pragma unroll
    for (int c = 0; c < kFusedChannels; ++c)
#pragma unroll
      for (int distance = kPixels; distance < 32; distance *= 2) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], distance);
    if (parts > 1) {
      if (lane == 0)
#pragma unroll
        for (int c = 0; c < kFusedChannels; ++c) sums[(c * kWalkGroups + warp) * kPixels + pixel] = sum[c];
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kFusedChannels; ++c)
#pragma unroll 1
        for (int other = 1; part == 0 && other < parts; ++other) sum[c] += sums[(c * kWalkGroups + other * slots + slot) * kPixels + pixel];
    }
#pragma unroll
    for (int c = 0; c < kFusedChannels; ++c)
      if (present && part == 0 && lane == 0 && slot + c * slots < count) write(first + slot + c * slots, sum[c]);
  }
}

template <int kPixels, bool kSeveralSteps>
__global__ void __launch_bounds__(kWalkThreads, kFusedBlocks) walk_fused_kernel(const __grid_constant__ FusedArgs args) {
  const WalkTaps& taps = args.taps;
  const View<4>&cams = args.cams, &out = args.out;
  const int channels = int(cams.size[1]);
  SharedArena arena;
  SharedArray<float> weights = arena.take<float>(taps.count() * kPixels);
  SharedArray<float> sums = arena.take<float>(kFusedChannels * kWalkGroups * kPixels);
  SharedArray<float> staged = arena.take<float>(args.staged.channels * args.staged.plane());
  SharedArray<int> kept = arena.take<int>(channels + 1);
  const int top = int(blockIdx.x) / args.tiles_x * (kPixels / kTileColumns), left = int(blockIdx.x) % args.tiles_x * kTileColumns;
  const int y = top + int(threadIdx.x) % kPixels / kTileColumns, x = left + int(threadIdx.x) % kTileColumns;
  const bool present = taps.inside(y, x);
  // With several steps there is a block for each image: all of them meet at each barrier.
  for (int64_t b = blockIdx.y; b < cams.size[0]; b += gridDim.y) {
    const int found = present_channels(args.class_mask, b, channels, kept);
    if (args.class_mask != nullptr && present && int(threadIdx.x) < kPixels)
      for (int c = threadIdx.y; c < channels; c += kWalkGroups)
        if (args.class_mask[b * channels + c] == 0)
          store_element(out.data, out.dtype, offset_of(out, b, c, y) + x * out.stride[3], 0.0f);
    if (found > 0) fill_weights<kPixels>(taps, b, present, y, x, weights, sums);
    const int64_t image = b * channels * taps.pixels();
    for (int64_t step = 0; step < (kSeveralSteps ? args.num_steps : 1); ++step) {
      const bool last = !kSeveralSteps || step + 1 == args.num_steps;
      float* to = args.buffers[step & 1] + image;
      auto write = [&](int c, float value) {
        if (last)
          store_element(out.data, out.dtype, offset_of(out, b, kept[c], y) + x * out.stride[3], value);
        else
          __stcg(to + c * taps.pixels() + int64_t(y) * taps.width + x, value);
      };
      auto walk = [&](const auto& reader) {
        step_pixels<kPixels, kStagedTogether<kSeveralSteps>>(args, weights, sums, staged, present, top - taps.reach_y,
                                                            left - taps.reach_x, found, reader, write);
      };
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

struct FusedShape {
  int pixels;  // of a block
  Staged staged;
  LaunchShape launch;
  int64_t room, blocks;  // blocks that are on the device at a time, and all of them
};

static FusedShape fused_shape(const WalkTaps& taps, const WalkMasks& masks, int pixels, const DeviceLimits& device) {
  const int64_t channels = masks.cams.size[1], tile_rows = pixels / kTileColumns, batch = taps.affinity.size[0];
  FusedShape shape = {pixels, Staged(taps, pixels), LaunchShape(), 0, 0};
  const int64_t tiles = blocks_for(taps.height, tile_rows) * blocks_for(taps.width, kTileColumns);
  shape.blocks = tiles * batch;
  shape.launch.block = dim3(32, kWalkGroups), shape.launch.grid = dim3(unsigned(tiles), grid_limit(batch));
  shape.launch.cooperative = masks.num_steps > 1;
  const int64_t fixed = SharedArena::bytes<float>(taps.count() * pixels) + SharedArena::bytes<int>(channels + 1) +
                        SharedArena::bytes<float>(kFusedChannels * kWalkGroups * pixels);
  // Every block has a kilobyte of the multiprocessor's shared memory besides its own.
  const int64_t plane = 4 * shape.staged.plane(), least = fixed + SharedArena::bytes<float>(shape.staged.plane()) + 1024;
  const int64_t blocks = std::min<int64_t>(kFusedBlocks, device.shared_bytes / least);
  if (blocks > 0) {
    const int64_t fit = (device.shared_bytes / blocks - 1024 - fixed - 15) / plane;
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(fit, kFusedChannels * kWalkGroups));
    shape.staged.channels = int(blocks_for(channels, blocks_for(channels, most)));  // as many each time
  }
  shape.launch.shared_bytes = fixed + SharedArena::bytes<float>(shape.staged.channels * shape.staged.plane());
  shape.room = blocks * device.multiprocessors;
  return shape;
}

// Tiles of 8 pixels if they leave no more blocks than are there at once, with one step two such rounds; else of 32.
static FusedShape fused_shape(const WalkTaps& taps, const WalkMasks& masks, const DeviceLimits& device) {
  const FusedShape narrow = fused_shape(taps, masks, kTileColumns, device);
  const int64_t rounds = narrow.launch.cooperative ? 1 : 2;
  if (narrow.blocks <= rounds * narrow.room) return narrow;
  return fused_shape(taps, masks, kWalkPixels, device);
}

FusedPlan plan_fused(const WalkArgs& args, const WalkMasks& masks) {
  FusedPlan plan;
  const WalkTaps taps(args);
  if (masks.transpose || masks.num_steps < 1 || taps.count() > kFusedTaps || masks.cams.size[1] > 4096) return plan;
  const DeviceLimits device = device_limits();
  const FusedShape shape = fused_shape(taps, masks, device);
  const int64_t batch = masks.cams.size[0], maps = round_up(batch * masks.cams.size[1] * taps.pixels(), 64);
  if (shape.room == 0 || shape.blocks / batch > 0x7fffffff) return plan;
  const bool fits = shape.blocks <= shape.room && batch <= 65535;
  if (shape.launch.cooperative && !(device.cooperative && fits)) return plan;
  plan.one_launch = true;
  plan.bytes = 4 * maps * std::min<int64_t>(masks.num_steps - 1, 2);
  return plan;
}

Status launch_fused(const WalkArgs& args, const WalkMasks& masks, void* workspace, void* stream) {
  const WalkTaps taps(args);
  const FusedShape shape = fused_shape(taps, masks, device_limits());
  const int64_t maps = round_up(masks.cams.size[0] * masks.cams.size[1] * taps.pixels(), 64);
  float* buffer = static_cast<float*>(workspace);
  const FusedArgs fused = {taps, masks.cams, masks.out, masks.class_mask, masks.num_steps, {buffer, buffer + maps}, shape.staged,
                           int(blocks_for(taps.width, kTileColumns))};
  const bool several = shape.launch.cooperative;
  if (shape.pixels == kTileColumns)
    return several ? launch(walk_fused_kernel<kTileColumns, true>, shape.launch, stream, fused)
                   : launch(walk_fused_kernel<kTileColumns, false>, shape.launch, stream, fused);
  return several ? launch(walk_fused_kernel<kWalkPixels, true>, shape.launch, stream, fused)
                 : launch(walk_fused_kernel<kWalkPixels, false>, shape.launch, stream, fused);
}

}  // namespace afa
