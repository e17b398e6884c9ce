// What the CUDA files of the affinity of features share: tiles of pixels, runs of taps, and elements on their way to shared memory.
//
// A block has a tile of 4 rows x 32 columns of pixels, a thread 4 neighbouring ones of a row. Taps of a row come in runs of 9: a run of
// 4 pixels reaches 12 columns, three loads of 16 bytes from shared memory for 36 sums.
#pragma once

#include "common/cuda_common.cuh"
#include "feature_affinity/feature_affinity.h"

namespace afa {

constexpr int kTileRows = 4, kTileColumns = 32, kPixels = 4, kRun = 9;
constexpr int kTileThreads = 128;  // 8 across, 4 down, 4 layers of these
constexpr int kLayers = kTileThreads / (kTileRows * kTileColumns / kPixels);
constexpr int kReached = 12;  // columns that a run of a thread's pixels reaches

struct FeatureGrid {
  View<4> features;
  int channels = 0, height = 0, width = 0, radius = 0, reach_y = 0, reach_x = 0, tiles_x = 0, tiles_y = 0;
  int64_t batch = 0;
  FeatureGrid() = default;
  explicit FeatureGrid(const FeatureArgs& args) : features(args.features), batch(args.features.size[0]) {
    channels = int(features.size[1]), height = int(features.size[2]), width = int(features.size[3]), radius = int(args.radius);
    reach_y = radius < height ? radius : height - 1, reach_x = radius < width ? radius : width - 1;  // of taps that can stay inside
    tiles_y = int(blocks_for(height, kTileRows)), tiles_x = int(blocks_for(width, kTileColumns));
  }
  __host__ __device__ int side() const { return 2 * reach_x + 1; }
  __host__ __device__ int runs() const { return (side() + kRun - 1) / kRun; }
  __host__ __device__ int64_t pixels() const { return int64_t(height) * width; }
  __host__ __device__ int64_t tiles() const { return int64_t(tiles_y) * tiles_x; }
  __host__ __device__ int taps() const { return (2 * reach_y + 1) * side(); }  // these alone
  __device__ bool inside(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  // The channel of a whole window.
  __host__ __device__ int tap(int dy, int dx) const { return (dy + radius) * (2 * radius + 1) + dx + radius; }
};

// Rows, columns, channels and taps are counted in 32 bits.
inline Status fits(const FeatureArgs& args) {
  const View<4>& view = args.features;
  if (is_empty(view) || args.radius < 0) return Status::bad_argument;
  const bool small = args.radius < (1 << 14) && view.size[1] < (1 << 30) && view.size[2] < (1 << 24) && view.size[3] < (1 << 24);
  return small && FeatureGrid(args).tiles() <= 0x7fffffff ? Status::ok : Status::unsupported;
}

// Where a thread stands in its tile.
struct TileThread {
  int layer, row, column;  // the latter: the first of the thread's pixels
  __device__ TileThread()
      : layer(int(threadIdx.x) / (kTileThreads / kLayers)), row(int(threadIdx.x) / (kTileColumns / kPixels) % kTileRows),
        column(int(threadIdx.x) % (kTileColumns / kPixels) * kPixels) {}
};

// One element of the features for some channels: where it comes from, and where in shared memory it goes.
struct Source {
  int64_t offset;  // of channel 0; -1 outside the image
  int place;       // -1: nothing
  __device__ Source() : offset(-1), place(-1) {}
  __device__ Source(const FeatureGrid& grid, int64_t b, int y, int x, int to) : offset(-1), place(to) {
    if (grid.inside(y, x)) offset = offset_of(grid.features, b, 0, y) + x * grid.features.stride[3];
  }
};

// Four neighbouring numbers in shared memory.
__device__ inline float4 four_at(SharedArray<float> from, int place) { return *reinterpret_cast<const float4*>(&from[place]); }
__device__ inline void read_four(SharedArray<float> from, int place, float* to) {
  const float4 four = four_at(from, place);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

}  // namespace afa
