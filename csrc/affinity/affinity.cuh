// What the CUDA files of the affinity share: pairs of tiles, rows of queries and keys, the loss of sums.
//
// The grid of pixels is cut into tiles of 8 x 8, and the band into pairs of tiles: a tile, and itself or one of its neighbours below
// or to the right. A block owns one pair, 64 x 64 scores; the pairs above and to the left are the mirror images of these.
#pragma once

#include <cassert>
#include <cstring>
#include <type_traits>

#include "affinity/affinity.h"
#include "common/block.cuh"
#include "common/cuda_common.cuh"
#include "common/tensor_cores.cuh"

namespace afa {

constexpr int kTileSide = 8, kTilePixels = kTileSide * kTileSide;
constexpr int kPairThreads = 256;  // each has 16 of a pair's 4096 scores
constexpr int kPairScores = kTilePixels * kTilePixels;

struct PairGrid {
  int height = 0, width = 0, radius = 0, tiles_y = 0, tiles_x = 0, reach = 0, neighbours = 0;
  int64_t batch = 0;
  PairGrid() = default;
  PairGrid(int64_t b, int64_t h, int64_t w, int64_t r) : height(int(h)), width(int(w)), batch(b) {
    const int64_t longest = h > w ? h : w;
    radius = int(r < longest ? r : longest);  // a larger one reaches no further pixel
    tiles_y = int(blocks_for(h, kTileSide)), tiles_x = int(blocks_for(w, kTileSide));
    reach = int(blocks_for(radius, kTileSide));
    neighbours = ((2 * reach + 1) * (2 * reach + 1) + 1) / 2;
  }
  __host__ __device__ int64_t tiles() const { return int64_t(tiles_y) * tiles_x; }
  __host__ __device__ int64_t pixels() const { return int64_t(height) * width; }
  int64_t pairs() const { return batch * tiles() * neighbours; }
  __device__ int64_t pair(int64_t b, int64_t tile, int neighbour) const { return (b * tiles() + tile) * neighbours + neighbour; }
  // The same without the places of neighbours that there are not, beyond the grid's edge: how many pairs stand before a tile's first in
  // an image, how many there are in all, and the number of one. A tile at column x has min(reach, tiles_x - 1 - x) neighbours to its
  // right, and in each row below those, itself and min(reach, x).
  __host__ __device__ int64_t capped(int64_t count) const {  // sum of min(reach, i) over i < count
    const int64_t rising = count < reach + 1 ? count : reach + 1;
    return rising * (rising - 1) / 2 + (count - rising) * reach;
  }
  __host__ __device__ int64_t met_before(int64_t y, int64_t x) const {
    const int64_t right = capped(tiles_x), below = capped(tiles_y) - capped(tiles_y - y);
    const int64_t here = right - capped(tiles_x - x), rows = tiles_y - 1 - y < reach ? tiles_y - 1 - y : reach;
    return y * (tiles_x + right) + below * (tiles_x + 2 * right) + x + here + rows * (x + here + capped(x));
  }
  __host__ __device__ int64_t met() const { return met_before(tiles_y, 0); }
  __device__ int64_t met_pair(int64_t b, int64_t tile, int neighbour) const {
    const int y = int(tile) / tiles_x, x = int(tile) % tiles_x, side = 2 * reach + 1;
    const int left = min(reach, x), right = min(reach, tiles_x - 1 - x), dy = (neighbour + reach) / side;
    const int own = dy == 0 ? neighbour : 1 + right + (dy - 1) * (left + 1 + right) + (neighbour + reach) % side - reach + left;
    return b * met() + met_before(y, x) + own;
  }
  // Grid dimensions that fit; the batch is walked over.
  bool launchable() const { return tiles() <= 0x7fffffff && neighbours <= 65535; }
  LaunchShape shape(int64_t shared_bytes) const {
    LaunchShape launch;
    launch.grid = dim3(unsigned(tiles()), unsigned(neighbours), grid_limit(batch)), launch.block = dim3(kPairThreads);
    launch.shared_bytes = shared_bytes;
    return launch;
  }
};

// Pixel i of a tile.
struct TilePlace {
  int y, x;  // of its first pixel
  __device__ TilePlace(const PairGrid& grid, int64_t tile) : y(int(tile) / grid.tiles_x * kTileSide), x(int(tile) % grid.tiles_x * kTileSide) {}
  __device__ int row(int i) const { return y + i / kTileSide; }
  __device__ int column(int i) const { return x + i % kTileSide; }
  __device__ bool inside(const PairGrid& grid, int i) const { return row(i) < grid.height && column(i) < grid.width; }
  __device__ int64_t pixel(const PairGrid& grid, int i) const { return int64_t(row(i)) * grid.width + column(i); }
};

// The same number, of which the compiler knows nothing: what follows from it is computed here, and not ahead of a loop that needs all
// registers.
__device__ __forceinline__ int computed_here(int number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}
// The block's place in the grid, read here: no register holds it until then.
__device__ __forceinline__ int block_x_here() {
#if defined(__CUDA_ARCH__)
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
#else
  return int(blockIdx.x);
#endif
}
__device__ __forceinline__ int block_y_here() {
#if defined(__CUDA_ARCH__)
  int y;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
  return y;
#else
  return int(blockIdx.y);
#endif
}
// Of a number from 1 to 2, to an ulp or so: no division's special cases.
__device__ __forceinline__ float reciprocal(float number) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(number));
  return inverse;
#else
  return 1.0f / number;
#endif
}

// The neighbour number `place` of a tile, among all (2 reach + 1)^2 of which it is itself the middle one; -1 if there is none.
__device__ inline int64_t neighbour_of(const PairGrid& grid, int64_t tile, int place) {
  const int side = 2 * grid.reach + 1;
  const int y = int(tile) / grid.tiles_x + place / side - grid.reach, x = int(tile) % grid.tiles_x + place % side - grid.reach;
  if (y < 0 || y >= grid.tiles_y || x < 0 || x >= grid.tiles_x) return -1;
  return int64_t(y) * grid.tiles_x + x;
}
// Among those, the first of the lower half, which is the tile itself.
__device__ inline int middle_of(const PairGrid& grid) { return (2 * grid.reach + 1) * grid.reach + grid.reach; }

// ---- elements ------------------------------------------------------------------------------------------------------------

// Whether rows may be read 16 bytes at a time: their vectors end where they do.
inline bool whole_vectors(const View<4>& view) { return wide_rows(view) && view.size[3] % vector_elements(view) == 0; }

// And whether those of an image lie within 2^31 of each other.
inline bool near_vectors(const View<4>& view) {
  const int64_t step = view.stride[2] / vector_elements(view), most = int64_t(1) << 30;
  return whole_vectors(view) && step < most && step > -most && view.size[2] < most / (step < 0 ? 1 - step : 1 + step);
}

// One element, of any type as float or of T as it is.
template <class T>
__device__ inline T load_narrow(const View<4>& view, int64_t line, bool present, int channel) {
  if (!present || channel >= view.size[3]) {
    T none;
    memset(&none, 0, sizeof none);
    return none;
  }
  const int64_t at = line + channel * view.stride[3];
  if constexpr (std::is_same<T, float>::value)
    return load_element(view.data, view.dtype, at);
  else
    return static_cast<const T*>(view.data)[at];
}

// ---- the head and the labels ---------------------------------------------------------------------------------------------

__device__ inline float weight_of(const DeviceHead& head, int64_t h) {
  return load_element(head.weight.data, head.weight.dtype, h * head.weight.stride[0]);
}
__device__ inline float bias_of(const DeviceHead& head) { return load_element(head.bias.data, head.bias.dtype, 0); }

__device__ inline void wrong_label() {
  constexpr const char* kSaid = "labels must be in 0..255 or ignore_index";
#if defined(AFA_CUDA_EMULATOR)
  emulator::fail(kSaid, {__FILE__, __LINE__});
#else
  __assert_fail(kSaid, __FILE__, __LINE__, "wrong_label");  // as assert() does, which a release build leaves out
#endif
}
// The label of a pixel, -1 if it is ignored. Compared as a number: in its own type 255 may be -1. Each pass checks a pixel's once.
template <bool kCheck>
__device__ inline int label_at(const DeviceLabels& labels, int64_t b, int64_t y, int64_t x) {
  const int64_t at = b * labels.stride[0] + y * labels.stride[1] + x * labels.stride[2];
  int64_t label;
  switch (labels.type) {
    case LabelType::u8: label = static_cast<const uint8_t*>(labels.data)[at]; break;
    case LabelType::i8: label = static_cast<const int8_t*>(labels.data)[at]; break;
    case LabelType::i16: label = static_cast<const int16_t*>(labels.data)[at]; break;
    case LabelType::i32: label = static_cast<const int32_t*>(labels.data)[at]; break;
    default: label = static_cast<const int64_t*>(labels.data)[at];
  }
  if (label == labels.ignore) return -1;
  if (kCheck && (label < 0 || label > 255)) wrong_label();
  return int(label);
}

// ---- results of a pair ---------------------------------------------------------------------------------------------------

// Where a thread's 16 numbers of a 64 x 64 result lie. With tensor cores a warp has 32 rows x 16 columns, fragments of 16 x 8; without,
// a thread has rows 8 apart and columns 8 apart, and two lanes side by side the same column, four the same two rows: so a warp reads
// rows of shared memory without conflicts.
template <bool kTensor>
struct ResultPlace {
  __device__ static int row(unsigned thread, int e) {
    if (kTensor) return thread / 64 % 2 * 32 + e / 8 * 16 + thread % 32 / 4 + e % 4 / 2 * 8;
    return thread / 64 * 16 + e / 8 * 8 + own_row(thread);
  }
  __device__ static int column(unsigned thread, int e) {
    if (kTensor) return thread / 32 % 2 * 32 + thread / 128 * 16 + e / 4 % 2 * 8 + 2 * (thread % 4) + e % 2;
    return e % 8 * 8 + own_column(thread);
  }
  // Without tensor cores: of 8, in a group of 64 threads.
  __device__ static int own_row(unsigned thread) { return thread % 2 + thread / 16 % 4 * 2; }
  __device__ static int own_column(unsigned thread) { return thread / 2 % 8; }
};

// ---- the loss ------------------------------------------------------------------------------------------------------------

// The derivative of the loss by the affinity of a pair with the same label, and with different ones.
struct LossSlopes {
  float same = 0, different = 0;
};
__device__ inline LossSlopes loss_slopes(const DeviceSlopes& slopes) {
  const float half = 0.5f * *slopes.grad;
  LossSlopes by;
  by.same = -half / float(*slopes.pos_count), by.different = half / float(*slopes.neg_count);
  return by;
}

// From sums over all pairs and their counts, which stay exact far beyond 2^32 in double.
__device__ inline void write_loss(const PairResults& results, double same, double different, double same_count, double different_count) {
  *results.loss = float(0.5 * same / (same_count + 1) + 0.5 * different / (different_count + 1));
  *results.pos_count = int64_t(same_count) + 1, *results.neg_count = int64_t(different_count) + 1;
}

// ---- what the CUDA files ask of one another --------------------------------------------------------------------------------

// The gradients of the scores, G, of every pair of tiles: [pairs][64][64] in float, or in the type of the operands, scaled by `scale`.
struct PairBuffers {
  void* values = nullptr;
  bool tensor = false;      // in the operands' type
  float* scale = nullptr;   // [pairs]: powers of two, float16's alone
  float* sums = nullptr;    // [pairs]: of G, both orders
  unsigned* counter = nullptr;  // set to 0, for the kernel that comes next
};

// Whether queries, keys and grid agree, and are of sizes that the kernels count with.
Status fits(const AttentionArgs& args);
// From the loss, in the operands' type if buffers.tensor; or from a window's gradient, always in float. By way of the scores.
Status pair_gradients(const AttentionArgs& args, const DeviceHead& head, const DeviceSlopes& slopes, const PairBuffers& buffers, void* stream);
Status pair_gradients(const MapsArgs& args, const DeviceHead& head, const DeviceSlopes& slopes, const PairBuffers& buffers, void* stream);
// The same from the loss and slopes.kept; whether a tensor is one that a loss keeps its derivatives in.
Status kept_gradients(const AttentionArgs& args, const DeviceSlopes& slopes, const PairBuffers& buffers, void* stream);
bool can_keep(const AttentionArgs& args, const View<4>& kept);

}  // namespace afa
