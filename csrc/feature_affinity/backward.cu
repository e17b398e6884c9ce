// Affinity of features on a GPU, backward.
//
//   dL/df_i = sum_j w_ij f_j   or   sum_j w_ij sign(f_i - f_j),        w_ij = (G_ij + G_ji) dA_ij/ds_ij
//
// Data flow: feature_weights_kernel writes w to the workspace, 0 where a tap leaves the image, without the taps that always do. Then a
// block has a tile of pixels (feature_tiles.cuh) and a few channels, of which each of its four layers of threads has its own: one dy and
// two runs of dx after the other, the rows that the tile reaches are in shared memory, a thread reads w of 4 pixels and 9 taps, which
// serve all its channels, and sums in registers.
// Floor: N * (2r+1)^2 * C multiply-adds, of "exp_l1" as many differences, signs and sums. Bound: these and shared memory.
// Occupancy: feature_weights_kernel 256 x 4, feature_gradient_kernel 128 x 4 (threads x blocks a multiprocessor, by registers).
#include "feature_affinity/feature_tiles.cuh"

namespace afa {

constexpr int kWeightThreads = 256;
constexpr int kStagedRuns = 2, kStagedColumns = kTileColumns + kStagedRuns * kRun - 1;
static_assert(kStagedColumns % 4 == 1, "a warp, 4 rows of every fourth column, reads from all 32 banks");
template <bool kL1>
constexpr int kOwnChannels = kL1 ? 4 : 8;  // of a thread

struct FeatureGradientArgs {
  FeatureGrid grid;
  View<4> slopes, grad, out;
  float factor;
  float* weights;  // [B][taps][H][W]
};

__device__ inline float element_at(const View<4>& view, int64_t b, int tap, int y, int x) {
  return load_element(view.data, view.dtype, offset_of(view, b, tap, y) + x * view.stride[3]);
}

__global__ void __launch_bounds__(kWeightThreads, 4) feature_weights_kernel(const __grid_constant__ FeatureGradientArgs args) {
  const FeatureGrid& grid = args.grid;
  const int64_t pixel = int64_t(blockIdx.x) * kWeightThreads + threadIdx.x;
  if (pixel >= grid.pixels()) return;
  const int y = int(pixel / grid.width), x = int(pixel % grid.width), middle = grid.tap(0, 0);
  for (int64_t plane = blockIdx.y; plane < grid.batch * grid.taps(); plane += gridDim.y) {
    const int64_t b = plane / grid.taps();
    const int tap = int(plane % grid.taps()), dy = tap / grid.side() - grid.reach_y, dx = tap % grid.side() - grid.reach_x;
    float weight = 0;
    if (grid.inside(y + dy, x + dx)) {
      const int here = grid.tap(dy, dx), back = grid.tap(-dy, -dx);
      const float slope =
          here >= middle ? element_at(args.slopes, b, here - middle, y, x) : element_at(args.slopes, b, back - middle, y + dy, x + dx);
      weight = (element_at(args.grad, b, here, y, x) + element_at(args.grad, b, back, y + dy, x + dx)) * slope * args.factor;
    }
    args.weights[plane * grid.pixels() + pixel] = weight;
  }
}

// Where w is 0, what d is does not matter.
__device__ inline float with_sign_of(float w, float d) { return d == 0 ? 0.0f : d < 0 ? -w : w; }

// w of the thread's pixels for a run of taps of one dy, 0 past the last tap or pixel.
__device__ inline void read_weights(const FeatureGradientArgs& args, int64_t b, int dy, int first, int y, int x,
                                    float (&weights)[kRun][kPixels]) {
  const FeatureGrid& grid = args.grid;
  const int64_t plane = b * grid.taps() + int64_t(dy + grid.reach_y) * grid.side();
#pragma unroll
  for (int t = 0; t < kRun; ++t) {
    const float* from = args.weights + (plane + first + t) * grid.pixels() + int64_t(y) * grid.width + x;
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
      weights[t][i] = first + t < grid.side() && y < grid.height && x + i < grid.width ? from[i] : 0.0f;
  }
}

// The rows of some channels that the tile reaches with one dy, from column near_x on: [channels][kTileRows][kStagedColumns].
__device__ inline void stage(const FeatureGrid& grid, int64_t b, int channel, int channels, int near_y, int near_x,
                             SharedArray<float> shared) {
  constexpr int kRow = kTileRows * kStagedColumns;
  const View<4>& view = grid.features;
  for (int place = threadIdx.x; place < kRow; place += kTileThreads) {
    const Source source(grid, b, near_y + place / kStagedColumns, near_x + place % kStagedColumns, place);
    for (int c = 0; c < channels; ++c) {
      const bool present = source.offset >= 0 && channel + c < grid.channels;
      const int64_t from = source.offset + (channel + c) * view.stride[1];
      shared[c * kRow + place] = present ? load_element(view.data, view.dtype, from) : 0.0f;
    }
  }
}

// Adds a run of taps to the sums of the thread's channels and pixels. Of a run that is not whole some are past the last tap, where a
// pixel outside the window may be no finite number: their weight of 0 must not meet it. A sign does not mind.
template <bool kL1, bool kWhole>
__device__ __forceinline__ void add_taps(const float (&weights)[kRun][kPixels], const float (&own)[kOwnChannels<kL1>][kPixels],
                                         SharedArray<float> shared, int place, int taps, float (&sums)[kOwnChannels<kL1>][kPixels]) {
#pragma unroll
  for (int c = 0; c < kOwnChannels<kL1>; ++c) {
    float near[kReached];
#pragma unroll
    for (int i = 0; i < kReached; ++i) near[i] = shared[place + c * kTileRows * kStagedColumns + i];
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      if (!kWhole && t >= taps) break;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (kL1)
          sums[c][i] += with_sign_of(weights[t][i], own[c][i] - near[i + t]);
        else
          sums[c][i] = fmaf(weights[t][i], near[i + t], sums[c][i]);
      }
    }
  }
}

template <bool kL1>
__global__ void __launch_bounds__(kTileThreads, 4) feature_gradient_kernel(const __grid_constant__ FeatureGradientArgs args) {
  constexpr int kOwn = kOwnChannels<kL1>, kBlock = kOwn * kLayers, kRow = kTileRows * kStagedColumns;
  SharedArena arena;
  SharedArray<float> shared = arena.take<float>(kBlock * kRow);
  const FeatureGrid& grid = args.grid;
  const TileThread at;
  const int tile_y = int(blockIdx.x) / grid.tiles_x * kTileRows, tile_x = int(blockIdx.x) % grid.tiles_x * kTileColumns;
  const int y = tile_y + at.row, x = tile_x + at.column, blocks = (grid.channels + kBlock - 1) / kBlock;
  for (int64_t work = blockIdx.y; work < grid.batch * blocks; work += gridDim.y) {
    const int64_t b = work / blocks;
    const int first_channel = int(work % blocks) * kBlock, channel = first_channel + at.layer * kOwn;
    float sums[kOwn][kPixels] = {}, own[kOwn][kPixels];
    if (kL1)
#pragma unroll
      for (int c = 0; c < kOwn; ++c)
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const bool present = channel + c < grid.channels && grid.inside(y, x + i);
          own[c][i] = present ? element_at(grid.features, b, channel + c, y, x + i) : 0.0f;
        }
    for (int dy = -grid.reach_y; dy <= grid.reach_y; ++dy) {
      if (tile_y + dy >= grid.height || tile_y + dy + kTileRows <= 0) continue;  // the same for the whole block
      for (int first = 0; first < grid.side(); first += kStagedRuns * kRun) {
        __syncthreads();  // the last rows are still read
        stage(grid, b, first_channel, kBlock, tile_y + dy, tile_x + first - grid.reach_x, shared);
        __syncthreads();
#pragma unroll 1
        for (int run = 0; run < kStagedRuns; ++run) {
          if (first + run * kRun >= grid.side()) break;
          float weights[kRun][kPixels];
          read_weights(args, b, dy, first + run * kRun, y, x, weights);
          const int place = at.layer * kOwn * kRow + at.row * kStagedColumns + at.column + run * kRun;
          const int taps = grid.side() - first - run * kRun;
          if (kL1 || taps >= kRun)
            add_taps<kL1, true>(weights, own, shared, place, taps, sums);
          else
            add_taps<kL1, false>(weights, own, shared, place, taps, sums);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kOwn; ++c)
#pragma unroll
      for (int i = 0; i < kPixels; ++i)
        if (channel + c < grid.channels && grid.inside(y, x + i))
          store_element(args.out.data, args.out.dtype, offset_of(args.out, b, channel + c, y) + (x + i) * args.out.stride[3], sums[c][i]);
  }
}

template <bool kL1>
static Status launch_gradient(const FeatureGradientArgs& args, void* stream) {
  constexpr int kBlock = kOwnChannels<kL1> * kLayers;
  LaunchShape shape;
  shape.grid = dim3(unsigned(args.grid.tiles()), grid_limit(args.grid.batch * blocks_for(args.grid.channels, kBlock)));
  shape.block = dim3(kTileThreads), shape.shared_bytes = SharedArena::bytes<float>(kBlock * kTileRows * kStagedColumns);
  return launch(feature_gradient_kernel<kL1>, shape, stream, args);
}

int64_t feature_affinity_backward_cuda_workspace(const FeatureArgs& args) {
  const FeatureGrid grid(args);
  return 4 * grid.batch * grid.taps() * grid.pixels();
}

Status feature_affinity_backward_cuda(const FeatureArgs& args, const View<4>& slopes, const View<4>& grad, const View<4>& grad_features,
                                      void* workspace, int device, void* stream) {
  AFA_TRY(fits(args));
  if (!same_images(args.features, grad) || !same_images(grad, slopes) || !same_size(args.features, grad_features))
    return Status::bad_argument;
  if (slopes.size[1] != (grad.size[1] + 1) / 2) return Status::bad_argument;
  DeviceGuard guard(device);
  const bool l1 = args.kind == PairKind::exp_l1;
  const float factor = l1 ? -1.0f / float(args.features.size[1]) : 1.0f;
  const FeatureGradientArgs gradient = {FeatureGrid(args), slopes, grad, grad_features, factor, static_cast<float*>(workspace)};
  LaunchShape shape;
  shape.grid = dim3(unsigned(blocks_for(gradient.grid.pixels(), kWeightThreads)), grid_limit(gradient.grid.batch * gradient.grid.taps()));
  shape.block = dim3(kWeightThreads);
  AFA_TRY(launch(feature_weights_kernel, shape, stream, gradient));
  return l1 ? launch_gradient<true>(gradient, stream) : launch_gradient<false>(gradient, stream);
}

}  // namespace afa
