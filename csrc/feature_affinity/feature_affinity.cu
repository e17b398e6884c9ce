// Affinity of features on a GPU, forward.
//
// Data flow: a block has a tile of pixels, 4 dy and a run of dx (feature_tiles.cuh). 8 channels at a time, of the tile and of the rows
// and columns that it reaches, are in shared memory as float32, twice: while a thread sums 4 pixels with 9 taps of one dy in registers,
// its elements of the next 8 channels are on their way to registers. Then the function of the sums, and a store to the tap and to its
// mirror image: only dy >= 0 is summed, and of dy = 0 only dx >= 0 is kept.
// Floor: N * ((2r+1)^2 + 1) / 2 * C multiply-adds, of "exp_l1" as many differences and sums. Bound: shared memory, 16 bytes for 9 sums.
// Occupancy: feature_affinity_kernel 128 x 3 (threads x blocks a multiprocessor, by registers).
#include "feature_affinity/feature_tiles.cuh"

namespace afa {

constexpr int kChannels = 8;                                          // at a time
constexpr int kNearRows = kTileRows + kLayers - 1, kNearColumns = kTileColumns + kReached;  // rows and columns that a block reaches
constexpr int kOwn = kTileRows * kTileColumns, kPlaces = kOwn + kNearRows * kNearColumns;   // of one channel
constexpr int kSources = (kPlaces + kTileThreads - 1) / kTileThreads;  // elements a thread brings of each channel

struct FeatureWindowArgs {
  FeatureGrid grid;
  PairKind kind;
  View<4> out, slopes;  // slopes without data: not kept
};

// Element i of the thread's, of the tile at (y, x), its neighbours from column near_x on.
__device__ inline Source source_at(const FeatureGrid& grid, int64_t b, int y, int x, int near_y, int near_x, int i) {
  const int place = i * kTileThreads + int(threadIdx.x);
  if (place >= kPlaces) return Source();
  if (place < kOwn) return Source(grid, b, y + place / kTileColumns, x + place % kTileColumns, place);
  const int near = place - kOwn;
  return Source(grid, b, near_y + near / kNearColumns, near_x + near % kNearColumns, place);
}

// A thread's elements of kChannels channels, 0 of those that are not there: all loads are under way before the first is used.
template <class T>
struct Pending {
  T value[kSources][kChannels];
  __device__ void load(const FeatureGrid& grid, const Source (&sources)[kSources], int channel) {
    const int64_t step = grid.features.stride[1];
    const T* data = static_cast<const T*>(grid.features.data);
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      const T* from = data + sources[i].offset + channel * step;
#pragma unroll
      for (int k = 0; k < kChannels; ++k, from += step) {
        value[i][k] = T{};
        if ((sources[i].offset >= 0) & (channel + k < grid.channels)) value[i][k] = *from;
      }
    }
  }
  __device__ void store(SharedArray<float> shared, const Source (&sources)[kSources]) const {
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      if (sources[i].place < 0) continue;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) shared[k * kPlaces + sources[i].place] = to_float(value[i][k]);
    }
  }
};

// A of a sum, and its slope if it is a product.
__device__ inline float affinity_of(PairKind kind, float sum, int channels, float* slope) {
  if (kind == PairKind::exp_l1) return expf(-(sum / float(channels)));
  if (kind == PairKind::abs_dot) {
    *slope = sum > 0 ? 1.0f : sum < 0 ? -1.0f : sum * 0.0f;
    return fabsf(sum);
  }
  *slope = sum <= 0 ? 0.0f : 1.0f;
  return sum <= 0 ? 0.0f : sum;
}

__device__ inline void write_pair(const FeatureWindowArgs& args, int64_t b, int y, int x, int dy, int dx, float sum) {
  const FeatureGrid& grid = args.grid;
  if (!grid.inside(y, x) || !grid.inside(y + dy, x + dx) || dx > grid.reach_x || (dy == 0 && dx < 0)) return;
  float slope = 0;
  const float value = affinity_of(args.kind, sum, grid.channels, &slope);
  const View<4>&out = args.out, &slopes = args.slopes;
  store_element(out.data, out.dtype, offset_of(out, b, grid.tap(dy, dx), y) + x * out.stride[3], value);
  store_element(out.data, out.dtype, offset_of(out, b, grid.tap(-dy, -dx), y + dy) + (x + dx) * out.stride[3], value);
  if (slopes.data)
    store_element(slopes.data, slopes.dtype, offset_of(slopes, b, grid.tap(dy, dx) - grid.tap(0, 0), y) + x * slopes.stride[3], slope);
}

template <class T, bool kL1>
__global__ void __launch_bounds__(kTileThreads, 3) feature_affinity_kernel(const __grid_constant__ FeatureWindowArgs args) {
  SharedArena arena;
  SharedArray<float> shared = arena.take<float>(2 * kChannels * kPlaces);
  const FeatureGrid& grid = args.grid;
  const TileThread at;
  const int y = int(blockIdx.x) / grid.tiles_x * kTileRows, x = int(blockIdx.x) % grid.tiles_x * kTileColumns;
  const int groups = (grid.reach_y + kLayers) / kLayers;  // of dy, from 0 on
  for (int64_t work = blockIdx.y; work < grid.batch * groups * grid.runs(); work += gridDim.y) {
    const int64_t b = work / (groups * grid.runs());
    const int first_dy = int(work / grid.runs() % groups) * kLayers, first_dx = int(work % grid.runs()) * kRun - grid.reach_x;
    Source sources[kSources];
#pragma unroll
    for (int i = 0; i < kSources; ++i) sources[i] = source_at(grid, b, y, x, y + first_dy, x + first_dx, i);
    float sums[kRun][kPixels] = {};
    Pending<T> pending;
    pending.load(grid, sources, 0);
    __syncthreads();  // the last channels of the work before are still read
    for (int c = 0, half = 0; c < grid.channels; c += kChannels, half = kChannels * kPlaces - half) {
      pending.store(shared + half, sources);
      __syncthreads();  // who comes here no longer reads the other half
      if (c + kChannels < grid.channels) pending.load(grid, sources, c + kChannels);
#pragma unroll 2
      for (int k = 0; k < kChannels; ++k) {
        const int own_place = half + k * kPlaces + at.row * kTileColumns + at.column;
        const int near_place = half + k * kPlaces + kOwn + (at.row + at.layer) * kNearColumns + at.column;
        float own[kPixels], near[kReached];
        read_four(shared, own_place, own);
#pragma unroll
        for (int i = 0; i < kReached; i += 4) read_four(shared, near_place + i, near + i);
#pragma unroll
        for (int t = 0; t < kRun; ++t)
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            if (kL1)
              sums[t][i] += fabsf(own[i] - near[i + t]);
            else
              sums[t][i] = fmaf(own[i], near[i + t], sums[t][i]);
          }
      }
    }
    if (first_dy + at.layer > grid.reach_y) continue;
#pragma unroll
    for (int t = 0; t < kRun; ++t)
#pragma unroll
      for (int i = 0; i < kPixels; ++i)
        write_pair(args, b, y + at.row, x + at.column + i, first_dy + at.layer, first_dx + t, sums[t][i]);
  }
}

static Status clear(const View<4>& out, void* stream) {
  const int64_t bytes = contiguous_bytes(out);
  if (bytes < 0) return Status::bad_argument;
  return cuda_failed(cudaMemsetAsync(out.data, 0, size_t(bytes), static_cast<cudaStream_t>(stream)));
}

template <class T>
static Status launch_window(const FeatureWindowArgs& window, void* stream) {
  const int64_t groups = blocks_for(window.grid.reach_y + 1, kLayers);
  LaunchShape shape;
  shape.grid = dim3(unsigned(window.grid.tiles()), grid_limit(window.grid.batch * groups * window.grid.runs()));
  shape.block = dim3(kTileThreads), shape.shared_bytes = SharedArena::bytes<float>(2 * kChannels * kPlaces);
  return window.kind == PairKind::exp_l1 ? launch(feature_affinity_kernel<T, true>, shape, stream, window)
                                         : launch(feature_affinity_kernel<T, false>, shape, stream, window);
}

Status feature_affinity_cuda(const FeatureArgs& args, const View<4>& out, const View<4>& slopes, int device, void* stream) {
  AFA_TRY(fits(args));
  if (!same_images(args.features, out)) return Status::bad_argument;
  DeviceGuard guard(device);
  AFA_TRY(clear(out, stream));  // taps that leave the image
  if (slopes.data) AFA_TRY(clear(slopes, stream));
  const FeatureWindowArgs window = {FeatureGrid(args), args.kind, out, slopes};
  switch (args.features.dtype) {
    case DType::f16: return launch_window<__half>(window, stream);
    case DType::bf16: return launch_window<__nv_bfloat16>(window, stream);
    default: return launch_window<float>(window, stream);
  }
}

}  // namespace afa
