// What the CUDA files of the affinity share: pairs of tiles, tensor-core fragments, sums over a block.
//
// The grid of pixels is cut into tiles of 8 x 8, and the band into pairs of tiles: a tile, and itself or one of its neighbours below
// or to the right. A block owns one pair, 64 x 64 scores; the pairs above and to the left are the mirror images of these.
#pragma once

#include <cstring>
#include <type_traits>

#include "affinity/affinity.h"
#include "common/cuda_common.cuh"

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
  __device__ TilePlace(const PairGrid& grid, int64_t tile) : y(int(tile / grid.tiles_x) * kTileSide), x(int(tile % grid.tiles_x) * kTileSide) {}
  __device__ int row(int i) const { return y + i / kTileSide; }
  __device__ int column(int i) const { return x + i % kTileSide; }
  __device__ bool inside(const PairGrid& grid, int i) const { return row(i) < grid.height && column(i) < grid.width; }
  __device__ int64_t pixel(const PairGrid& grid, int i) const { return int64_t(row(i)) * grid.width + column(i); }
};

// The neighbour number `place` of a tile, among all (2 reach + 1)^2 of which it is itself the middle one; -1 if there is none.
__device__ inline int64_t neighbour_of(const PairGrid& grid, int64_t tile, int place) {
  const int side = 2 * grid.reach + 1;
  const int y = int(tile / grid.tiles_x) + place / side - grid.reach, x = int(tile % grid.tiles_x) + place % side - grid.reach;
  if (y < 0 || y >= grid.tiles_y || x < 0 || x >= grid.tiles_x) return -1;
  return int64_t(y) * grid.tiles_x + x;
}
// Among those, the first of the lower half, which is the tile itself.
__device__ inline int middle_of(const PairGrid& grid) { return (2 * grid.reach + 1) * grid.reach + grid.reach; }

// ---- elements ------------------------------------------------------------------------------------------------------------

// Whether load_wide may be used: the vectors of a row end where the row does.
inline bool whole_vectors(const View<4>& view) { return wide_rows(view) && view.size[3] % vector_elements(view) == 0; }

// 16 bytes from `channel` on of one line of a head, zeros where the line ends or is absent.
__device__ inline uint4 load_wide(const View<4>& view, int64_t line, bool present, int channel) {
  if (!present || channel >= view.size[3]) return make_uint4(0, 0, 0, 0);
  const int64_t bytes = view.dtype == DType::f32 ? 4 : 2;
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(view.data) + (line + channel) * bytes));
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

// ---- tensor cores --------------------------------------------------------------------------------------------------------

#if defined(AFA_CUDA_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define AFA_TENSOR_CORES 1
#else
#define AFA_TENSOR_CORES 0  // such code is not asked to, see have_tensor_cores()
#endif

// Four 8 x 8 matrices of 16-bit elements from shared memory. row(m, r) gives the address of row r of matrix m. Register m of a lane
// holds elements (lane / 4, 2 * (lane % 4) + {0, 1}) of matrix m, or of its transpose.
template <bool kTranspose, class Row>
__device__ inline void load_matrices(unsigned (&to)[4], Row row) {
  const int lane = threadIdx.x % 32;
#if defined(AFA_CUDA_EMULATOR)
  for (int m = 0; m < 4; ++m) {
    uint16_t values[2];
    for (int e = 0; e < 2; ++e) {
      const int across = lane / 4, along = 2 * (lane % 4) + e;
      memcpy(&values[e], row(m, kTranspose ? along : across) + (kTranspose ? across : along), 2);
    }
    memcpy(&to[m], values, 4);
  }
#else
  const unsigned address = unsigned(__cvta_generic_to_shared(row(lane / 8, lane % 8)));
  if (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#endif
}

#if defined(AFA_CUDA_EMULATOR)
// sum += a b by the definition of the fragments: every lane shows its registers to the others, which is no race.
template <class T>
__attribute__((no_sanitize("thread"))) inline void multiply_fragments(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
  if (emulator::settings().compiled < 80) emulator::fail("trap: tensor cores in code of an architecture without", {__FILE__, __LINE__});
  struct Fragments {
    const unsigned *a, *b;
  } own = {a, b};
  const int lane = threadIdx.x % 32;
  const uint64_t* all = emulator::warp_exchange(0xffffffffu, reinterpret_cast<uint64_t>(&own), {__FILE__, __LINE__});
  auto element = [](unsigned packed, int half) {
    T value;
    const uint16_t bits = uint16_t(packed >> (16 * half));
    memcpy(&value, &bits, 2);
    return to_float(value);
  };
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < 16; ++k) {
      const int row = lane / 4 + e / 2 * 8, column = 2 * (lane % 4) + e % 2;
      const auto* left = reinterpret_cast<const Fragments*>(all[row % 8 * 4 + k % 8 / 2]);
      const auto* right = reinterpret_cast<const Fragments*>(all[column * 4 + k % 8 / 2]);
      sum[e] += element(left->a[row / 8 + 2 * (k / 8)], k % 2) * element(right->b[k / 8], k % 2);
    }
  emulator::warp_exchange(0xffffffffu, 0, {__FILE__, __LINE__});
}
#else
// sum [16 x 8] += a [16 x 16] b [16 x 8], in float32.
template <class T>
__device__ inline void multiply_fragments(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
#if AFA_TENSOR_CORES
  if constexpr (std::is_same<T, __half>::value)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // rather than sums of nothing
#endif
}
#endif

// Where a thread's 16 numbers of a 64 x 64 result lie: with tensor cores a warp has 16 rows x 32 columns, each of its 4 fragments 8
// columns; without, a thread has 4 x 4.
template <bool kTensor>
struct ResultPlace {
  __device__ static int row(int e) {
    const int thread = threadIdx.x;
    if (kTensor) return thread / 32 % 4 * 16 + thread % 32 / 4 + e % 4 / 2 * 8;
    return thread / 16 * 4 + e / 4;
  }
  __device__ static int column(int e) {
    const int thread = threadIdx.x;
    if (kTensor) return thread / 128 * 32 + e / 4 * 8 + 2 * (thread % 4) + e % 2;
    return thread % 16 * 4 + e % 4;
  }
};

// ---- sums over a block, in a fixed order -----------------------------------------------------------------------------------

template <class T>
__device__ inline T block_sum(T value, SharedArray<T> scratch) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += scratch[warp];
  return total;
}
__device__ inline float block_max(float value, SharedArray<float> scratch) {
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float largest = scratch[0];
  for (int warp = 1; warp < int(blockDim.x) / 32; ++warp) largest = fmaxf(largest, scratch[warp]);
  return largest;
}

// True in every thread of the block that comes last, which then sees what all others have written to global memory.
__device__ inline bool comes_last(unsigned* counter, SharedArray<int> scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) scratch[0] = atomicAdd(counter, 1u) == gridDim.x * gridDim.y * gridDim.z - 1;
  __syncthreads();
  __threadfence();
  return scratch[0] != 0;
}

// ---- what the CUDA files ask of one another --------------------------------------------------------------------------------

// The gradients of the scores, G, of every pair of tiles: [pairs][64][64] in float, or in the type of the operands, scaled by `scale`.
struct PairBuffers {
  void* values = nullptr;
  bool tensor = false;      // in the operands' type
  float* scale = nullptr;   // [pairs]
  float* sums = nullptr;    // [pairs]: of G, both orders
};

// From the loss; float, or the operands' type if buffers.tensor.
Status pair_gradients(const AttentionArgs& args, const float* head, const DeviceSlopes& slopes, const PairBuffers& buffers, void* stream);
bool have_tensor_cores();  // in the code that the current device runs

}  // namespace afa
