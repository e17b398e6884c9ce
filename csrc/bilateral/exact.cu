// The bilateral filter as the sum that it is, on a GPU.
//
//   out_i = sum_j w_ij v_j,   w_ij = 2^(-sum_k (a_ik - a_jk)^2),   a = (x, y, r, g, b) times sqrt(log2(e)) / (sqrt(2) sigma)
//
// Data flow: pixels in tiles of 64 that are compact in a, values packed (exact_tiles.cu). A block of exact_kernel owns 128 pixels (64 if
// there are more than 24 channels) and up to 48 channels. From the boxes around tiles follows the most that a weight can be: others are
// counted by that, whose farthest a tile leaves out as long as all of them together stay under 1e-6 of what its own weights add up to at
// least. The block then goes through those that are left: their features, in a frame that begins at a pixel of its own, so that few
// digits are lost, are in shared memory while the next tile's are on their way; a thread makes the weights that tensor cores want of it,
// differences squared in float32; each weight and value in two halves, of whose products the three larger ones count: 22 bits. A tile is
// summed up by tensor cores, which cut digits off, the sums of tiles in float32, in order: the same bits every run. Values that are not
// finite are added by exact_special_kernel. Where there are few pixels, several blocks share the tiles, every n-th each, and
// exact_unpack_kernel adds up.
// Error against float64: under 1e-6 (norm of the difference over norm) in emulation, whose exponentials and sums are the host's; the
// device's add ex2.approx's 2^-22 and, in the worst case, 2^-23 for each of a tile's 12 products.
// Floor: pairs * (10 float32 operations, an exponential, 3 to halve it), at 128 instructions and 16 exponentials a clock and
// multiprocessor 0.11 clocks a pair; tensor cores, 6 K operations a pair, keep up. The loop has 303 instructions for 16 pairs a thread:
// 0.15 clocks. Of the 3.5e10 pairs of a 500 x 375 photograph 16 to 25 % matter (sigmas 64, 5): on an H100 (132 x 1.7 GHz) 4 to 6 ms, by
// this count; not yet timed. Bound: issue of instructions.
// Occupancy: exact_kernel 128 x 3 (threads x blocks a multiprocessor, by registers). Wide loads: exact_kernel<*, true>.
#include "bilateral/exact.cuh"

#include <algorithm>
#include <cmath>

#include "common/arena.h"
#include "common/radix_sort.h"

namespace afa {

// What a block keeps in shared memory, for kM tiles of pixels.
template <int kM>
struct BlockShared {
  SharedArray<float> box;     // [kM][10]: low, high
  SharedArray<float> frame;   // [10]: where its features begin, and their scales
  SharedArray<float> scratch; // [4]
  SharedArray<float> most;    // [kM][129] what the tiles of each bin weigh at most
  SharedArray<float> least;   // [kM] what a pixel's weights add up to at least
  SharedArray<int> bins;      // [kM][129] pixels of the tiles of each bin
  SharedArray<int> from;      // [kM] the bin from which on tiles are left out
  SharedArray<int> list, found;  // [128] tiles to be met, times 4, and by which of the block's; [4] how many of a warp
  SharedArray<float> features;   // [2][5][64]

  __device__ explicit BlockShared(SharedArena& arena) {
    box = arena.take<float>(kM * 2 * kFeatures), frame = arena.take<float>(2 * kFeatures), scratch = arena.take<float>(4);
    most = arena.take<float>(kM * (kBins + 1)), least = arena.take<float>(kM);
    bins = arena.take<int>(kM * (kBins + 1)), from = arena.take<int>(kM);
    list = arena.take<int>(kExactThreads), found = arena.take<int>(kExactThreads / 32);
    features = arena.take<float>(2 * kTileFeatures);
  }
  static int64_t bytes() {
    return SharedArena::bytes<float>(kM * 2 * kFeatures) + SharedArena::bytes<float>(2 * kFeatures) + SharedArena::bytes<float>(4) +
           2 * SharedArena::bytes<float>(kM * (kBins + 1)) + 2 * SharedArena::bytes<float>(kM) + SharedArena::bytes<int>(kExactThreads) +
           SharedArena::bytes<int>(kExactThreads / 32) + SharedArena::bytes<float>(2 * kTileFeatures);
  }
};

// ---- which tiles are met -------------------------------------------------------------------------------------------------

__device__ inline int bin_of(float nearest) { return nearest < float(kBins) ? int(nearest) : kBins; }

// Boxes and frame of the block's tiles, and the bins from which on tiles are left out.
template <int kM>
__device__ inline void choose_tiles(const ExactPixels& pixels, int64_t b, int64_t tile, const BlockShared<kM>& shared) {
  const int thread = int(threadIdx.x);
  if (thread < 2 * kFeatures) {
    for (int t = 0; t < kM; ++t)
      shared.box[t * 2 * kFeatures + thread] = pixels.boxes[(b * 2 * kFeatures + thread) * pixels.rows + tile + t];
    const int k = thread % kFeatures;
    const float origin = pixels.features[(b * pixels.rows + tile) * kTileFeatures + k * kTile];
    shared.frame[thread] = thread >= kFeatures ? sqrtf(pixels.scale(k) * kLog2e) : is_finite(origin) ? origin : 0.0f;
  }
  for (int bin = thread; bin < kM * (kBins + 1); bin += kExactThreads) shared.bins[bin] = 0;
  __syncthreads();
#pragma unroll 1
  for (int t = 0; t < kM; ++t) {
    // At least: a pixel itself, and all others at their farthest.
    float least = 0.0f;
    for (int64_t other = thread; other < pixels.tiles; other += kExactThreads) {
      const Reach reach = reach_of(pixels, b, other, shared.box + t * 2 * kFeatures);
      const int count = pixels_of(pixels, other);
      atomicAdd(&shared.bins[t * (kBins + 1) + bin_of(reach.nearest)], count);
      if (reach.farthest < 16.0f) least += float(count) * exp2_of(reach.farthest * -kLog2e);
    }
    least = block_sum(least, shared.scratch);
    if (thread == 0) shared.least[t] = least;
  }
  __syncthreads();
  for (int at = thread; at < kM * (kBins + 1); at += kExactThreads)
    shared.most[at] = float(shared.bins[at]) * exp2_of(float(at % (kBins + 1)) * -kLog2e);
  __syncthreads();
  if (thread < kM) {
    const SharedArray<float> most = shared.most + thread * (kBins + 1);
    float left_out = most[kBins];
    int from = kBins;
    for (; from > 1; --from) {
      left_out += most[from - 1];
      if (left_out > kLeftOut * fmaxf(1.0f, shared.least[thread])) break;
    }
    shared.from[thread] = from;
  }
  __syncthreads();
}

// Fills the list with those of 128 tiles, from the first on every parts-th, that are met, in order; returns how many.
template <int kM>
__device__ inline int list_tiles(const ExactPixels& pixels, int64_t b, int64_t tile, int64_t first, const BlockShared<kM>& shared) {
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t other = first + int64_t(thread) * pixels.parts;
  int by = 0;
#pragma unroll
  for (int t = 0; t < kM; ++t)
    if (other < pixels.tiles && tile + t < pixels.tiles)
      by |= int(bin_of(reach_of(pixels, b, other, shared.box + t * 2 * kFeatures).nearest) < shared.from[t]) << t;
  const unsigned votes = __ballot_sync(0xffffffffu, by != 0);
  if (lane == 0) shared.found[warp] = __popc(votes);
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kExactThreads / 32; ++w) before += w < warp ? shared.found[w] : 0, all += shared.found[w];
  if (by != 0) shared.list[before + __popc(votes & ((1u << lane) - 1u))] = int(other) * 4 + by;
  __syncthreads();
  return all;
}

// ---- sums ----------------------------------------------------------------------------------------------------------------

// A thread's part of the block's pixels: of each of its warp's kM times 16 rows, 16 apart, two, 8 apart; and of each of kN times 8 channels
// two, as fragments are.
template <int kM, int kN>
struct PixelSums {
  const ExactPixels& pixels;
  const BlockShared<kM>& shared;
  int64_t b;
  int block;  // of 8 channels, the first
  float own[kM][2][kFeatures];
  float sums[kM][kN][4] = {};
  float ahead[(kTileFeatures + kExactThreads - 1) / kExactThreads];

  __device__ PixelSums(const ExactPixels& args, const BlockShared<kM>& arrays, int64_t image, int64_t tile, int first)
      : pixels(args), shared(arrays), b(image), block(first) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int k = 0; k < kFeatures; ++k) {
          const int at = row(m, r);
          const float value = args.features[(b * args.rows + tile + at / kTile) * kTileFeatures + k * kTile + at % kTile];
          own[m][r][k] = (value - arrays.frame[k]) * arrays.frame[kFeatures + k];
        }
  }
  __device__ static int row(int m, int r) { return int(threadIdx.x) / 32 * 16 * kM + m * 16 + r * 8 + int(threadIdx.x) % 32 / 4; }
  __device__ int channel(int n) const { return (block + n) * 8 + int(threadIdx.x) % 4 * 2; }
  __device__ float2 factors(int64_t tile, int n) const {
    if (block + n >= pixels.blocks) return make_float2(0.0f, 0.0f);
    return __ldg(reinterpret_cast<const float2*>(pixels.factors + (b * pixels.tiles + tile) * pixels.stride() + channel(n)));
  }

  // Features of a tile on their way to registers, and from there in the block's frame to one of the two buffers.
  __device__ __forceinline__ void fetch(int64_t tile) {
    const float* from = pixels.features + (b * pixels.rows + tile) * kTileFeatures;
#pragma unroll
    for (int i = 0; i * kExactThreads < kTileFeatures; ++i) {
      const int at = i * kExactThreads + int(threadIdx.x);
      ahead[i] = at < kTileFeatures ? __ldg(from + at) : 0.0f;
    }
  }
  __device__ __forceinline__ void keep(int buffer) {
#pragma unroll
    for (int i = 0; i * kExactThreads < kTileFeatures; ++i) {
      const int at = i * kExactThreads + int(threadIdx.x);
      if (at < kTileFeatures)
        shared.features[buffer * kTileFeatures + at] = (ahead[i] - shared.frame[at / kTile]) * shared.frame[kFeatures + at / kTile];
    }
    __syncthreads();
  }

  __device__ static __forceinline__ float weight(const float (&a)[kFeatures], const float (&other)[kFeatures], float raised) {
    float sum = raised;
#pragma unroll
    for (int k = 0; k < kFeatures; ++k) {
      const float difference = a[k] - other[k];
      sum = fmaf(-difference, difference, sum);
    }
    return exp2_of(sum);
  }

  // One tile's weights times its values, on tensor cores.
  __device__ __forceinline__ void add_tile(int64_t tile, int buffer) {
    const int lane = int(threadIdx.x) % 32;
    float part[kM][kN][4] = {};
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      uint4 values[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n)
        values[n] = block + n < pixels.blocks ? __ldg(pixels.packed + packed_at(pixels, b, tile, block + n, step) + lane)
                                              : make_uint4(0, 0, 0, 0);
      unsigned high[kM][4], low[kM][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float one[kFeatures], two[kFeatures];
#pragma unroll
        for (int k = 0; k < kFeatures; ++k) {
          const int at = buffer * kTileFeatures + k * kTile + step * 16 + half * 8 + lane % 4 * 2;
          const float2 both = *reinterpret_cast<const float2*>(&shared.features[at]);
          one[k] = both.x, two[k] = both.y;
        }
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const Halves weights(weight(own[m][r], one, kRaised), weight(own[m][r], two, kRaised));
            high[m][half * 2 + r] = weights.high, low[m][half * 2 + r] = weights.low;
          }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const unsigned value[2] = {values[n].x, values[n].y}, rest[2] = {values[n].z, values[n].w};
          multiply_fragments<__half>(part[m][n], low[m], value);
          multiply_fragments<__half>(part[m][n], high[m], rest);
          multiply_fragments<__half>(part[m][n], high[m], value);
        }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 factor = factors(tile, n);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = fmaf(part[m][n][e], e % 2 ? factor.y : factor.x, sums[m][n][e]);
    }
  }

  // The same by plain multiplication, where there are no tensor cores.
  __device__ __forceinline__ void add_plainly(int64_t tile, int buffer) {
#pragma unroll 1
    for (int j = 0; j < kTile; ++j) {
      float other[kFeatures];
#pragma unroll
      for (int k = 0; k < kFeatures; ++k) other[k] = shared.features[buffer * kTileFeatures + k * kTile + j];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float weights[2] = {weight(own[m][0], other, 0.0f), weight(own[m][1], other, 0.0f)};
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (channel(n) + e % 2 < pixels.channels)
              sums[m][n][e] = fmaf(weights[e / 2], value_of(pixels, b, tile, j, channel(n) + e % 2), sums[m][n][e]);
      }
    }
  }

  __device__ void store(int part, int64_t tile) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (block + n >= pixels.blocks) continue;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* to = pixels.sums + pixels.sums_at(part, b) + (tile * kTile + row(m, r)) * pixels.stride() + channel(n);
          *reinterpret_cast<float2*>(to) = make_float2(sums[m][n][2 * r], sums[m][n][2 * r + 1]);
        }
    }
  }
};

// Grid: the blocks of pixels of all images, times the parts, times the runs of kN times 8 channels.
template <int kM, int kN, bool kTensor>
__global__ void __launch_bounds__(kExactThreads, 3) exact_kernel(const __grid_constant__ ExactPixels pixels) {
  SharedArena arena;
  const BlockShared<kM> shared(arena);
  const int64_t per_image = pixels.rows / kM, b = blockIdx.x / per_image, tile = blockIdx.x % per_image * kM;
  const int part = int(blockIdx.y) % pixels.parts, block = int(blockIdx.y) / pixels.parts * kN;
  choose_tiles(pixels, b, tile, shared);
  PixelSums<kM, kN> sums(pixels, shared, b, tile, block);
  unsigned long long met = 0;
  for (int64_t first = part; first < pixels.tiles; first += int64_t(kExactThreads) * pixels.parts) {
    const int found = list_tiles(pixels, b, tile, first, shared);
    if (found > 0) sums.fetch(shared.list[0] / 4), sums.keep(0);
    for (int at = 0; at < found; ++at) {
      const int entry = shared.list[at];
      if (at + 1 < found) sums.fetch(shared.list[at + 1] / 4);
      met += unsigned(entry % 2 + entry / 2 % 2);
      if (entry >> (sums.row(0, 0) / kTile) & 1) {  // for all of a warp
        if constexpr (kTensor)
          sums.add_tile(entry / 4, at % 2);
        else
          sums.add_plainly(entry / 4, at % 2);
      }
      if (at + 1 < found) sums.keep((at + 1) % 2);
    }
    __syncthreads();  // the list is still read
  }
  sums.store(part, tile);
  if (pixels.counted != nullptr && threadIdx.x == 0 && block == 0) {
    atomicAdd(pixels.counted, met);
    const int64_t own = pixels.tiles - tile;
    if (part == 0) atomicAdd(pixels.counted + 1, static_cast<unsigned long long>((own < kM ? own : kM) * pixels.tiles));
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------------

constexpr int64_t kGroupPixels = int64_t(1) << 20;  // of several images together
constexpr int64_t kGroupImages = 64;

struct ExactPlan {
  ExactPixels pixels;
  void* scratch = nullptr;  // of the sort
  int row_tiles = 1, run = 1;   // tiles and blocks of channels that a block owns
  int64_t bytes = 0;

  ExactPlan(const BilateralArgs& args, void* workspace) {
    const int64_t count = args.images.size[2] * args.images.size[3], batch = args.images.size[0];
    pixels.images = args.images, pixels.values = args.values, pixels.out = args.out;
    pixels.scale_xy = args.scale_xy, pixels.scale_rgb = args.scale_rgb;
    pixels.counted = reinterpret_cast<unsigned long long*>(args.counted);
    pixels.count = count, pixels.tiles = blocks_for(count, kTile);
    pixels.batch = std::max<int64_t>(1, std::min({batch, kGroupPixels / count, kGroupImages}));
    pixels.channels = int(args.values.size[1]), pixels.blocks = int(blocks_for(pixels.channels, 8));
    run = pixels.blocks <= 1 ? 1 : pixels.blocks <= 3 ? 3 : 6, row_tiles = run == 6 ? 1 : 2;
    pixels.rows = round_up(pixels.tiles, 2);
    // Six blocks for each multiprocessor, of at least 16 tiles each.
    const int64_t blocks = pixels.batch * (pixels.rows / row_tiles) * blocks_for(pixels.blocks, run);
    const int64_t wanted = blocks_for(6 * int64_t(device_limits().multiprocessors), blocks);
    pixels.parts = int(std::max<int64_t>(1, std::min({wanted, pixels.tiles / 16, int64_t(16)})));
    baseline::Arena arena(workspace);
    const int64_t all = pixels.batch * count, tiles = pixels.batch * pixels.rows;
    pixels.keys = arena.take<uint32_t>(all), pixels.sorted_keys = arena.take<uint32_t>(all);
    pixels.order = arena.take<int32_t>(all), pixels.places = arena.take<int32_t>(all);
    pixels.features = arena.take<float>(tiles * kTileFeatures), pixels.boxes = arena.take<float>(tiles * 2 * kFeatures);
    pixels.packed = arena.take<uint4>(tiles * pixels.blocks * kSteps * 32);
    pixels.factors = arena.take<float>(tiles * pixels.stride()), pixels.special = arena.take<int32_t>(tiles);
    pixels.sums = arena.take<float>(pixels.parts * tiles * kTile * pixels.stride());
    scratch = arena.take<char>(radix_sort_cuda_workspace(all));
    bytes = arena.used;
  }
};

static Status launch_sums(const ExactPlan& plan, void* stream) {
  const ExactPixels& pixels = plan.pixels;
  LaunchShape shape;
  shape.grid = dim3(unsigned(pixels.batch * (pixels.rows / plan.row_tiles)), unsigned(pixels.parts * blocks_for(pixels.blocks, plan.run)));
  shape.block = dim3(kExactThreads), shape.shared_bytes = plan.row_tiles == 2 ? BlockShared<2>::bytes() : BlockShared<1>::bytes();
  if (!have_tensor_cores()) {
    shape.grid = dim3(unsigned(pixels.batch * pixels.rows), unsigned(pixels.parts * blocks_for(pixels.blocks, 3)));
    return launch(exact_kernel<1, 3, false>, shape, stream, pixels);
  }
  if (plan.run == 1) return launch(exact_kernel<2, 1, true>, shape, stream, pixels);
  if (plan.run == 3) return launch(exact_kernel<2, 3, true>, shape, stream, pixels);
  return launch(exact_kernel<1, 6, true>, shape, stream, pixels);
}

static Status check_exact(const BilateralArgs& args) {
  if (!same_images(args.images, args.values) || !same_size(args.values, args.out) || args.images.size[1] != 3 || args.values.size[1] < 1)
    return Status::bad_argument;
  const bool fits = args.images.size[2] * args.images.size[3] < (int64_t(1) << 31) - kTile && args.values.size[1] <= 1 << 15;
  return fits ? Status::ok : Status::unsupported;
}

int64_t bilateral_exact_cuda_workspace(const BilateralArgs& args, int device) {
  if (check_exact(args) != Status::ok) return 0;
  DeviceGuard guard(device);
  return ExactPlan(args, nullptr).bytes;
}

Status bilateral_exact_cuda(const BilateralArgs& args, void* workspace, int device, void* stream) {
  AFA_TRY(check_exact(args));
  DeviceGuard guard(device);
  ExactPlan plan(args, workspace);
  const int64_t group = plan.pixels.batch, images = args.images.size[0];
  for (int64_t first = 0; first < images; first += group) {
    plan.pixels.first = first, plan.pixels.batch = std::min(group, images - first);
    AFA_TRY(sort_pixels(plan.pixels, plan.scratch, stream));
    AFA_TRY(pack_tiles(plan.pixels, stream));
    AFA_TRY(launch_sums(plan, stream));
    if (have_tensor_cores()) AFA_TRY(add_special(plan.pixels, stream));
    AFA_TRY(unpack_sums(plan.pixels, stream));
  }
  return Status::ok;
}

}  // namespace afa
