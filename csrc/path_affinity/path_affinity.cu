// The path affinity on a GPU, forward and backward.
//
//   A_ij = 1 - max of edge over the path from i to j;   backward: the gradients of both taps of a pair go to its path's first maximum
//
// Data flow: a block has 32 x 16 pixels, two for each thread, and some directions of the half plane. The edge tile with a halo as wide as
// a path reaches goes to shared memory as keys (path_affinity.h); each thread then walks its paths level by level, all threads of
// a block in step, and writes a direction's tap at its pixel and the opposite one at the pixel that the path leads to. Where the halo
// does not fit, the edge is read through the cache. Backward: path_choice_kernel does the same, but keeps of each path which point
// is the first maximum, one byte or two, and the sum of its two gradients; path_gather_kernel looks, for each pixel, at every point
// of every path that may lie on it, eight threads sharing the directions, and adds up in a fixed order.
// Floor: the window written once; backward its gradient read once. Bound: the stores up to a radius of about 10, then
// the walks: a load from shared memory and a maximum for each point.
// Occupancy: path_window_kernel 256 x 4, path_choice_kernel 256 x 4, path_gather_kernel 256 x 4 (threads x blocks a
// multiprocessor, by registers).
#include <type_traits>

#include "common/cuda_common.cuh"
#include "path_affinity/path_affinity.h"

namespace afa {

constexpr int kPathW = 32, kPathRows = 8, kPathH = 2 * kPathRows, kPathThreads = kPathW * kPathRows;

// Directions of the half plane that some pixel has, row-major, in the disc or not.
struct PathTaps {
  View<4> edge, window;
  int reach = 0, reach_y = 0, reach_x = 0, height = 0, width = 0;
  int64_t disc = 0;  // radius^2
  int per_block = 0; // directions

  // Of the window, or `in_disc` alone.
  PathTaps(const PathArgs& args, bool in_disc) : edge(args.edge), window(args.window), reach(int(args.reach)) {
    height = int(edge.size[2]), width = int(edge.size[3]), disc = args.radius * args.radius;
    const int farthest = in_disc && args.radius <= args.reach ? int(args.radius) - 1 : reach;
    reach_y = farthest < height ? farthest : height - 1, reach_x = farthest < width ? farthest : width - 1;
  }
  __host__ __device__ int side() const { return 2 * reach_x + 1; }
  __host__ __device__ int count() const { return reach_y * side() + reach_x; }
  __host__ __device__ int dy(int direction) const { return (direction + reach_x + 1) / side(); }
  __host__ __device__ int dx(int direction) const { return (direction + reach_x + 1) % side() - reach_x; }
  __host__ __device__ int64_t pixels() const { return int64_t(height) * width; }
  __host__ __device__ int columns() const { return kPathW + 2 * reach_x; }  // of a tile with its halo
  __host__ __device__ int64_t tile() const { return int64_t(kPathH + reach_y) * columns(); }
  __device__ bool has_path(int dy, int dx) const { return int64_t(dy) * dy + int64_t(dx) * dx < disc; }
  __device__ bool inside(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  __device__ int32_t key(int64_t b, int y, int x) const {
    return path_key(load_element(edge.data, edge.dtype, offset_of(edge, b, 0, y) + x * edge.stride[3]));
  }
  // Where the window holds the tap (dy, dx) of a pixel.
  __device__ int64_t at(int64_t b, int dy, int dx, int y, int x) const {
    const int64_t channel = int64_t(dy + reach) * (2 * reach + 1) + dx + reach;
    return offset_of(window, b, channel, y) + x * window.stride[3];
  }
};

// A block's pixels, and the keys around them: in shared memory (kTile), or in the edge map.
template <bool kTile>
struct PathTile {
  const PathTaps& taps;
  SharedArray<int32_t> keys;
  int64_t b = 0;
  int x, y;  // of the thread's first pixel; the second is kPathRows below

  __device__ PathTile(const PathTaps& path_taps, SharedArray<int32_t> tile) : taps(path_taps), keys(tile) {
    const int across = (taps.width + kPathW - 1) / kPathW;
    x = int(blockIdx.x % across) * kPathW + threadIdx.x, y = int(blockIdx.x / across) * kPathH + threadIdx.y;
  }
  __device__ int column(int i) const { return x + i - int(threadIdx.x) - taps.reach_x; }
  // Image b; the whole block calls this.
  __device__ void load(int64_t image) {
    b = image;
    if (!kTile) return;
    __syncthreads();
    for (int row = threadIdx.y; row < kPathH + taps.reach_y; row += kPathRows)
      for (int i = threadIdx.x; i < taps.columns(); i += kPathW) {
        const int from_y = y - int(threadIdx.y) + row, from_x = column(i);
        keys[row * taps.columns() + i] = taps.inside(from_y, from_x) ? taps.key(b, from_y, from_x) : 0;
      }
    __syncthreads();
  }
  // The key that is (py, px) away from a pixel, whose place in the tile is `at`. What lies outside the image is no matter.
  __device__ int32_t key(int at, int py, int px) const {
    if (kTile) return keys[at];
    return taps.inside(y + py, x + px) ? taps.key(b, y + py, x + px) : 0;
  }
  // visit(code, keys of both pixels) for each point of a path, in order.
  template <class Visit>
  __device__ void walk(int dy, int dx, const Visit& visit) const {
    const int sign = dx < 0 ? -1 : 1, row = taps.columns(), down = kPathRows * row;
    const int here = int(threadIdx.y) * row + int(threadIdx.x) + taps.reach_x;
    for (PathLevels path(dy, dx); path.more(); path.next()) {
      const int py = path.lower, px = sign * (path.level - py), at = here + py * row + px, next = at + row - sign;
      visit(path.code(), key(at, py, px), key(at + down, py + kPathRows, px));
      if (path.two()) visit(path.code() + 1, key(next, py + 1, px - sign), key(next + down, py + 1 + kPathRows, px - sign));
    }
  }
};

// Calls visit(tile, direction) for every image and direction of this block.
template <bool kTile, class Visit>
__device__ inline void each_direction(const PathTaps& taps, PathTile<kTile>& tile, const Visit& visit) {
  for (int64_t b = blockIdx.z; b < taps.edge.size[0]; b += gridDim.z) {
    tile.load(b);
    for (int first = int(blockIdx.y) * taps.per_block; first < taps.count(); first += int(gridDim.y) * taps.per_block)
      for (int d = first; d < first + taps.per_block && d < taps.count(); ++d) visit(d);
  }
}

template <bool kTile>
__global__ void __launch_bounds__(kPathThreads, 4) path_window_kernel(const __grid_constant__ PathTaps taps) {
  SharedArena arena;
  PathTile<kTile> tile(taps, arena.take<int32_t>(kTile ? taps.tile() : 0));
  auto write = [&](int dy, int dx, int y, int x, float value) {
    store_element(taps.window.data, taps.window.dtype, taps.at(tile.b, dy, dx, y, x), value);
  };
  auto centre = [&] {
    for (int y = tile.y; y < tile.y + kPathH; y += kPathRows)
      if (taps.inside(y, tile.x)) write(0, 0, y, tile.x, 1.0f);
  };
  if (blockIdx.y == 0)
    for (tile.b = blockIdx.z; tile.b < taps.edge.size[0]; tile.b += gridDim.z) centre();
  each_direction(taps, tile, [&](int d) {
    const int dy = taps.dy(d), dx = taps.dx(d);
    const bool has_path = taps.has_path(dy, dx);
    int32_t best[2] = {INT32_MIN, INT32_MIN};
    if (has_path)
      tile.walk(dy, dx, [&](int, int32_t first, int32_t second) {
        best[0] = first > best[0] ? first : best[0], best[1] = second > best[1] ? second : best[1];
      });
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int y = tile.y + which * kPathRows, x = tile.x;
      if (!taps.inside(y, x)) continue;
      const bool pair = has_path && taps.inside(y + dy, x + dx);
      const float affinity = pair ? 1.0f - path_value(best[which]) : 0.0f;
      write(dy, dx, y, x, affinity);
      if (pair) write(-dy, -dx, y + dy, x + dx, affinity);
      if (!has_path || !taps.inside(y - dy, x - dx)) write(-dy, -dx, y, x, 0.0f);
    }
  });
}

// ---- the gradient of the edge map -----------------------------------------------------------------------------------------------

// [B][directions][H][W]: the sum of the gradients of a path's two taps, and which point is its first maximum (PathLevels::code).
template <class Code>
struct PathChoices {
  float* slopes;
  Code* codes;
};

// A byte holds every code where the tile fits (path_narrow).
template <bool kTile>
using PathCode = std::conditional_t<kTile, uint8_t, uint16_t>;

template <bool kTile>
__global__ void __launch_bounds__(kPathThreads, 4)
    path_choice_kernel(const __grid_constant__ PathTaps taps, const PathChoices<PathCode<kTile>> choices) {
  SharedArena arena;
  PathTile<kTile> tile(taps, arena.take<int32_t>(kTile ? taps.tile() : 0));
  each_direction(taps, tile, [&](int d) {
    const int dy = taps.dy(d), dx = taps.dx(d);
    if (!taps.has_path(dy, dx)) return;
    int32_t best[2] = {INT32_MIN, INT32_MIN};
    int code[2] = {};
    tile.walk(dy, dx, [&](int at, int32_t first, int32_t second) {
      if (first > best[0]) best[0] = first, code[0] = at;
      if (second > best[1]) best[1] = second, code[1] = at;
    });
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int y = tile.y + which * kPathRows, x = tile.x;
      if (!taps.inside(y, x)) continue;
      float slope = 0;
      if (taps.inside(y + dy, x + dx))
        slope = load_element(taps.window.data, taps.window.dtype, taps.at(tile.b, dy, dx, y, x)) +
                load_element(taps.window.data, taps.window.dtype, taps.at(tile.b, -dy, -dx, y + dy, x + dx));
      const int64_t to = (tile.b * taps.count() + d) * taps.pixels() + int64_t(y) * taps.width + x;
      choices.slopes[to] = slope, choices.codes[to] = PathCode<kTile>(code[which]);
    }
  });
}

template <bool kTile>
__global__ void __launch_bounds__(kPathThreads, 6)
    path_gather_kernel(const __grid_constant__ PathTaps taps, const PathChoices<PathCode<kTile>> choices,
                       const __grid_constant__ View<4> out) {
  SharedArena arena;
  SharedArray<float> sums = arena.take<float>(kPathThreads);
  const int64_t pixel = int64_t(blockIdx.x) * kPathW + threadIdx.x;
  const int y = int(pixel / taps.width), x = int(pixel % taps.width);
  for (int64_t b = blockIdx.y; b < out.size[0]; b += gridDim.y) {
    float sum = 0;
    for (int d = threadIdx.y; d < taps.count() && y < taps.height; d += kPathRows) {
      const int dy = taps.dy(d), dx = taps.dx(d), sign = dx < 0 ? -1 : 1;
      if (!taps.has_path(dy, dx)) continue;
      const int64_t here = (b * taps.count() + d) * taps.pixels() + pixel;
      // The path that has this pixel as the point (py, px).
      auto add = [&](int code, int py, int px) {
        if (py > y || unsigned(x - px) >= unsigned(taps.width)) return;
        const int64_t from = here - int64_t(py) * taps.width - px;
        if (choices.codes[from] == code) sum += choices.slopes[from];
      };
      for (PathLevels path(dy, dx); path.more(); path.next()) {
        const int px = sign * (path.level - path.lower);
        add(path.code(), path.lower, px);
        if (path.two()) add(path.code() + 1, path.lower + 1, px - sign);
      }
    }
    __syncthreads();
    sums[threadIdx.y * kPathW + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || y >= taps.height) continue;
    float total = 0;
    for (int group = 0; group < kPathRows; ++group) total -= sums[group * kPathW + threadIdx.x];
    store_element(out.data, out.dtype, offset_of(out, b, 0, y) + x * out.stride[3], total);
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------------------

static int64_t path_tiles(const PathTaps& taps) { return blocks_for(taps.width, kPathW) * blocks_for(taps.height, kPathH); }

static Status check_paths(const PathArgs& args) {
  const int64_t side = 2 * args.reach + 1;
  const View<4>& edge = args.edge;
  if (args.radius < 1 || args.reach < 0 || args.window.size[1] != side * side) return Status::bad_argument;
  if (!same_images(edge, args.window) || edge.size[1] != 1) return Status::bad_argument;
  // Rows, columns and directions are counted in 32 bits, points of a path in 16.
  const bool small = args.reach < (1 << 14) && edge.size[2] < (1 << 30) && edge.size[3] < (1 << 30) &&
                     blocks_for(edge.size[2] * edge.size[3], kPathW) <= 0x7fffffff;
  return small && args.radius <= (1 << 20) && path_tiles(PathTaps(args, false)) <= 0x7fffffff ? Status::ok : Status::unsupported;
}

// Whether the tile fits in shared memory and its codes, at most 2 (reach_y + reach_x) + 1, in a byte.
static bool path_narrow(const PathTaps& taps, int shared_bytes) {
  return 4 * taps.tile() <= shared_bytes && taps.reach_y + taps.reach_x < 128;
}

// Directions are divided among blocks until there are several for each multiprocessor.
static LaunchShape path_shape(PathTaps* taps, const DeviceLimits& limits, bool narrow) {
  const int64_t tiles = path_tiles(*taps) * taps->edge.size[0], blocks = tiles * taps->count();
  const int64_t per_block = blocks / (8 * int64_t(limits.multiprocessors)) + 1;
  taps->per_block = int(per_block < 16 ? per_block : 16);
  LaunchShape shape;
  shape.block = dim3(kPathW, kPathRows);
  shape.grid = dim3(unsigned(path_tiles(*taps)), grid_limit(blocks_for(taps->count() + (taps->count() == 0), taps->per_block)),
                    grid_limit(taps->edge.size[0]));
  shape.shared_bytes = SharedArena::bytes<int32_t>(narrow ? taps->tile() : 0);
  return shape;
}

Status path_affinity_cuda(const PathArgs& args, int device, void* stream) {
  AFA_TRY(check_paths(args));
  DeviceGuard guard(device);
  PathTaps taps(args, false);
  const DeviceLimits limits = device_limits();
  const bool narrow = path_narrow(taps, limits.shared_bytes);
  const LaunchShape shape = path_shape(&taps, limits, narrow);
  return narrow ? launch(path_window_kernel<true>, shape, stream, taps) : launch(path_window_kernel<false>, shape, stream, taps);
}

static int64_t choices_of(const PathTaps& taps) { return round_up(taps.edge.size[0] * taps.count() * taps.pixels(), 64); }

int64_t path_affinity_gradient_cuda_workspace(const PathArgs& args) { return 6 * choices_of(PathTaps(args, true)); }

template <bool kTile>
static Status run_gradient(PathTaps taps, const DeviceLimits& limits, const View<4>& out, void* workspace, void* stream) {
  PathChoices<PathCode<kTile>> choices;
  choices.slopes = static_cast<float*>(workspace);
  choices.codes = reinterpret_cast<PathCode<kTile>*>(choices.slopes + choices_of(taps));
  const LaunchShape walks = path_shape(&taps, limits, kTile);
  AFA_TRY(launch(path_choice_kernel<kTile>, walks, stream, taps, choices));
  LaunchShape shape;
  shape.block = dim3(kPathW, kPathRows);
  shape.grid = dim3(unsigned(blocks_for(taps.pixels(), kPathW)), grid_limit(out.size[0]));
  shape.shared_bytes = SharedArena::bytes<float>(kPathThreads);
  return launch(path_gather_kernel<kTile>, shape, stream, taps, choices, out);
}

Status path_affinity_gradient_cuda(const PathArgs& args, const View<4>& grad_edge, void* workspace, int device, void* stream) {
  AFA_TRY(check_paths(args));
  if (!same_size(args.edge, grad_edge)) return Status::bad_argument;
  DeviceGuard guard(device);
  const PathTaps taps(args, true);
  const DeviceLimits limits = device_limits();
  const bool narrow = path_narrow(taps, limits.shared_bytes);
  return narrow ? run_gradient<true>(taps, limits, grad_edge, workspace, stream)
                : run_gradient<false>(taps, limits, grad_edge, workspace, stream);
}

}  // namespace afa
