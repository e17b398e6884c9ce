// Affinity on a GPU, backward: G, the gradients of the scores of every pair of tiles, times queries and keys.
//
// G comes from pair_kernel (affinity.cu), which computes the scores again: a sigmoid that has been rounded no longer tells its slope. It
// lives in the workspace for the length of this pass alone. Then, since z = u v^T + bias,
//   dL/dq_h = w_h G k_h,   dL/dk_h = w_h G q_h,   dL/dw_h = sum q_h . (G k_h),   dL/dbias = 1/2 sum G .
// Data flow of product_kernel: a block owns a tile of 64 pixels and 64 channels of one head, of the queries' gradient or the keys'; it
// walks over the tile's neighbours, whose G (mirrored for those above and to the left) and values pass through shared memory, and sums
// in registers. The block that comes last adds up what all found for the head, in order: two launches, the first of which sets the
// counter of the second to 0. A query or key that is no finite number counts
// as 0 there, lest 0 times it reach pixels outside its window, or, where its label is ignored, any: the pairs that it does count in have
// a G that is NaN, or 0 at the sigmoid's ends.
// Floor: 4 * N * (2r+1)^2 * heads * d operations; at r = 8 the tiles hold twice as many pairs as the band.
// Occupancy: product_kernel 256 x 2, map_product_kernel 256 x 2 (threads x blocks a multiprocessor, by registers).
// Wide loads: product_kernel<__half, true>, product_kernel<__nv_bfloat16, true>, product_kernel<float, false>.
#include "affinity/affinity.cuh"
#include "common/arena.h"

namespace afa {

constexpr int kProductChannels = 64;

// ---- the head --------------------------------------------------------------------------------------------------------------

// What the blocks of a pass found for the head, and where its gradient goes.
struct HeadSums {
  float* dots;  // [count][heads][chunks]
  int64_t count;
  int heads, chunks;
  const float* sums;  // [pairs]
  int64_t pairs;
  unsigned* counter;
  DeviceHead out;
};

// In the block that comes last: a warp adds up a weight's gradient, or the bias's.
__device__ inline void finish_head(const HeadSums& head, SharedArray<int> scratch) {
  if (!comes_last(head.counter, scratch)) return;
  const int lane = threadIdx.x % 32, warps = int(blockDim.x) / 32;
  for (int h = threadIdx.x / 32; h <= head.heads; h += warps) {
    double total = 0;
    if (h < head.heads) {
      for (int64_t at = lane; at < head.count * head.chunks; at += 32)
        total += __ldcg(head.dots + (at / head.chunks * head.heads + h) * head.chunks + at % head.chunks);
    } else {
      for (int64_t at = lane; at < head.pairs; at += 32) total += 0.5 * __ldcg(head.sums + at);
    }
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
    if (lane != 0) continue;
    const View<1>& to = h < head.heads ? head.out.weight : head.out.bias;
    store_element(to.data, to.dtype, h < head.heads ? h * to.stride[0] : 0, float(total));
  }
}

// ---- G times values ------------------------------------------------------------------------------------------------------

struct ProductArgs {
  PairGrid grid;
  PairBuffers buffers;
  View<4> query, key;
  View<4> grad_query, grad_key;
  bool wide;
  bool write[2];       // the queries' gradient, the keys'
  DeviceHead head;
  int chunks;          // of kProductChannels in a head
  HeadSums found;      // of each tile
};

// The elements of 16 bytes, 0 for those that are no finite numbers: their exponents are all ones, and carry into the sign from the
// lowest of them.
template <class T>
__device__ inline uint4 finite_or_zero(uint4 packed) {
  constexpr unsigned kExponent = sizeof(T) == 4 ? 0x7f800000u : std::is_same<T, __half>::value ? 0x7c007c00u : 0x7f807f80u;
  constexpr unsigned kLowest = kExponent & ~(kExponent << 1), kSign = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
  auto odd = [](unsigned word) { return ((word & kExponent) + kLowest) & kSign; };
  if ((odd(packed.x) | odd(packed.y) | odd(packed.z) | odd(packed.w)) == 0) return packed;
  auto kept = [&](unsigned word) { return word & ~((odd(word) >> (8 * sizeof(T) - 1)) * (sizeof(T) == 4 ? 0xffffffffu : 0xffffu)); };
  return make_uint4(kept(packed.x), kept(packed.y), kept(packed.z), kept(packed.w));
}
__device__ inline bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }

// kProductChannels channels of the 64 pixels of a tile, kCount to a vector of 16 bytes.
template <class T, int kCount>
__device__ inline void load_rows(const ProductArgs& args, const View<4>& values, int64_t b, int64_t h, const TilePlace& from, int channel,
                                 int pitch, SharedArray<T> rows) {
  constexpr int kVectors = kProductChannels / kCount, kLines = kPairThreads / kVectors;
  const int part = threadIdx.x % kVectors * kCount;
#pragma unroll
  for (int k = 0; k < kTilePixels / kLines; ++k) {
    const int line = threadIdx.x / kVectors + k * kLines;
    const int64_t at = offset_of(values, b, h, from.pixel(args.grid, line));
    const bool present = from.inside(args.grid, line);
    if (args.wide) {
      *reinterpret_cast<uint4*>(&rows[line * pitch + part]) = finite_or_zero<T>(load_wide(values, at, present, channel + part));
    } else {
#pragma unroll 1
      for (int i = 0; i < kCount; ++i) {
        const T value = load_narrow<T>(values, at, present, channel + part + i);
        rows[line * pitch + part + i] = is_finite(to_float(value)) ? value : load_narrow<T>(values, at, false, 0);
      }
    }
  }
}

// Sums over the 64 pixels of one neighbour, G from `pairs` as it lies in memory (rows are those of the tile, or its columns if
// mirrored), added to `total`.
template <class T, bool kTensor>
struct ProductStep;

// Without tensor cores, in float32: shared [pixel of the neighbour][pixel of the tile] and [pixel of the neighbour][channel].
template <>
struct ProductStep<float, false> {
  static constexpr int kPitch = kTilePixels + 4;
  static int64_t shared_bytes() { return 2 * SharedArena::bytes<float>(kTilePixels * kPitch); }

  __device__ static void add(const ProductArgs& args, const View<4>& values, int64_t pair, bool mirrored, int64_t b, int64_t h,
                             const TilePlace& from, int channel, SharedArena arena, float (&total)[16]) {
    SharedArray<float> weights = arena.take<float>(kTilePixels * kPitch), rows = arena.take<float>(kTilePixels * kPitch);
    const float* pairs = static_cast<const float*>(args.buffers.values) + pair * kPairScores;
    const int part = threadIdx.x % 16 * 4;
    __syncthreads();  // the last neighbour's readers are done
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int line = threadIdx.x / 16 + k * 16;
      const float4 packed = __ldcg(reinterpret_cast<const float4*>(pairs + line * kTilePixels + part));
      const float four[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[mirrored ? line * kPitch + part + i : (part + i) * kPitch + line] = four[i];
    }
    load_rows<float, 4>(args, values, b, h, from, channel, kPitch, rows);
    __syncthreads();
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll 4
    for (int j = 0; j < kTilePixels; ++j)
      add_outer(*reinterpret_cast<const float4*>(&weights[j * kPitch + row]),
                *reinterpret_cast<const float4*>(&rows[j * kPitch + column]), total);
  }
};

// With tensor cores: shared [line of the pair][64] as it lies in memory, and [pixel of the neighbour][channel].
template <class T>
struct ProductStep<T, true> {
  static constexpr int kPitch = kTilePixels + 8;
  static int64_t shared_bytes() { return 2 * SharedArena::bytes<T>(kTilePixels * kPitch); }

  __device__ static void add(const ProductArgs& args, const View<4>& values, int64_t pair, bool mirrored, int64_t b, int64_t h,
                             const TilePlace& from, int channel, SharedArena arena, float (&total)[16]) {
    SharedArray<T> weights = arena.take<T>(kTilePixels * kPitch), rows = arena.take<T>(kTilePixels * kPitch);
    const T* pairs = static_cast<const T*>(args.buffers.values) + pair * kPairScores;
    const int part = threadIdx.x % 8 * 8;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int line = threadIdx.x / 8 + k * 32;
      *reinterpret_cast<uint4*>(&weights[line * kPitch + part]) =
          __ldcg(reinterpret_cast<const uint4*>(pairs + line * kTilePixels + part));
    }
    load_rows<T, 8>(args, values, b, h, from, channel, kPitch, rows);
    __syncthreads();
    const int warp = threadIdx.x / 32, row = warp % 4 * 16, column = warp / 4 * 32;
    float sums[4][4] = {};
#pragma unroll
    for (int j = 0; j < kTilePixels; j += 16) {
      unsigned left[4], right[4];
      if (mirrored)
        load_matrices<true>(left, [&](int m, int r) { return &weights[(j + m / 2 * 8 + r) * kPitch + row + m % 2 * 8]; });
      else
        load_matrices<false>(left, [&](int m, int r) { return &weights[(row + m % 2 * 8 + r) * kPitch + j + m / 2 * 8]; });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_matrices<true>(right,
                            [&](int m, int r) { return &rows[(j + m % 2 * 8 + r) * kPitch + column + half * 16 + m / 2 * 8]; });
        multiply_fragments<T>(sums[2 * half], left, right);
        multiply_fragments<T>(sums[2 * half + 1], left, right + 2);
      }
    }
    const float scale = args.buffers.scale[pair];
#pragma unroll
    for (int e = 0; e < 16; ++e) total[e] = fmaf(scale, sums[e / 4][e % 4], total[e]);
  }
};

template <class T, bool kTensor>
__global__ void __launch_bounds__(kPairThreads, 2) product_kernel(const __grid_constant__ ProductArgs args) {
  SharedArena arena;
  SharedArray<float> scratch = arena.take<float>(kPairThreads / 32);
  SharedArray<int> last = arena.take<int>(1);
  const PairGrid& grid = args.grid;
  const int64_t tile = blockIdx.x;
  const int share = int(blockIdx.y), per_side = int(args.query.size[1]) * args.chunks;
  const bool of_key = share >= per_side;
  const int64_t h = share % per_side / args.chunks;
  const int channel = share % args.chunks * kProductChannels, depth = int(args.query.size[3]), middle = middle_of(grid);
  const View<4>& values = of_key ? args.query : args.key;
  const View<4>& out = of_key ? args.grad_key : args.grad_query;
  const TilePlace place(grid, tile);
  for (int64_t b = blockIdx.z; b < grid.batch; b += gridDim.z) {
    float total[16] = {};
    for (int near = 0; near <= 2 * middle; ++near) {
      const int64_t other = neighbour_of(grid, tile, near);
      if (other < 0) continue;
      // A neighbour above or to the left holds the pair, the other way round.
      const bool mirrored = near < middle;
      const int64_t pair = mirrored ? grid.pair(b, other, middle - near) : grid.pair(b, tile, near - middle);
      ProductStep<T, kTensor>::add(args, values, pair, mirrored, b, h, TilePlace(grid, other), channel, arena, total);
    }
    float dot = 0;
    const float weight = weight_of(args.head, h);
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int i = ResultPlace<kTensor>::row(e), c = channel + ResultPlace<kTensor>::column(e);
      if (!place.inside(grid, i) || c >= depth) continue;
      const int64_t n = place.pixel(grid, i);
      if (!of_key) {
        const View<4>& query = args.query;
        const float own = load_element(query.data, query.dtype, offset_of(query, b, h, n) + c * query.stride[3]);
        dot = fmaf(is_finite(own) ? own : 0.0f, total[e], dot);
      }
      if (args.write[of_key]) store_element(out.data, out.dtype, offset_of(out, b, h, n) + c * out.stride[3], weight * total[e]);
    }
    if (!of_key) {
      dot = block_sum(dot, scratch);
      if (threadIdx.x == 0) args.found.dots[(b * grid.tiles() + tile) * per_side + share] = dot;
    }
  }
  finish_head(args.found, last);
}

// ---- score maps ------------------------------------------------------------------------------------------------------------

struct MapProductArgs {
  PairGrid grid;
  PairBuffers buffers;
  View<4> maps, grad_maps;
  bool write;
  DeviceHead head;
  HeadSums found;  // of each pair
};

// dL/dS_h,ij = w_h G_ij of one pair of tiles, both orders, and its part of dL/dw_h = sum G_ij S_h,ij. What lies outside every pair has
// been set to 0.
__global__ void __launch_bounds__(kPairThreads, 2) map_product_kernel(const __grid_constant__ MapProductArgs args) {
  SharedArena arena;
  SharedArray<float> scratch = arena.take<float>(kPairThreads / 32);
  SharedArray<int> last = arena.take<int>(1);
  const PairGrid& grid = args.grid;
  const int64_t tile = blockIdx.x, heads = args.maps.size[1], other = neighbour_of(grid, tile, middle_of(grid) + int(blockIdx.y));
  const bool mirrored = blockIdx.y > 0;
  for (int64_t b = blockIdx.z; b < grid.batch; b += gridDim.z) {
    const int64_t pair = grid.pair(b, tile, int(blockIdx.y));
    for (int64_t h = 0; h < heads; ++h) {
      float dot = 0;
      const float weight = weight_of(args.head, h);
      if (other >= 0) {
        const TilePlace place(grid, tile), other_place(grid, other);
        for (int at = threadIdx.x; at < kPairScores; at += blockDim.x) {
          const int i = at / kTilePixels, j = at % kTilePixels;
          if (!place.inside(grid, i) || !other_place.inside(grid, j)) continue;
          const float gradient = static_cast<const float*>(args.buffers.values)[pair * kPairScores + at];
          const int64_t n = place.pixel(grid, i), m = other_place.pixel(grid, j);
          const View<4>&maps = args.maps, &out = args.grad_maps;
          if (gradient != 0) {
            float score = load_element(maps.data, maps.dtype, offset_of(maps, b, h, n) + m * maps.stride[3]);
            if (mirrored) score += load_element(maps.data, maps.dtype, offset_of(maps, b, h, m) + n * maps.stride[3]);
            dot = fmaf(gradient, score, dot);
          }
          if (!args.write) continue;
          store_element(out.data, out.dtype, offset_of(out, b, h, n) + m * out.stride[3], weight * gradient);
          if (mirrored) store_element(out.data, out.dtype, offset_of(out, b, h, m) + n * out.stride[3], weight * gradient);
        }
      }
      dot = block_sum(dot, scratch);
      if (threadIdx.x == 0) args.found.dots[pair * heads + h] = dot;
    }
  }
  finish_head(args.found, last);
}

// ---- launching -------------------------------------------------------------------------------------------------------------

struct Pieces {
  PairBuffers buffers;
  float* dots;
  int64_t bytes;
};
static Pieces pieces_of(const PairGrid& grid, int64_t dots, void* workspace) {
  baseline::Arena arena(workspace);
  Pieces pieces;
  pieces.buffers.values = arena.take<float>(grid.pairs() * kPairScores);
  pieces.buffers.scale = arena.take<float>(grid.pairs()), pieces.buffers.sums = arena.take<float>(grid.pairs());
  pieces.dots = arena.take<float>(dots), pieces.buffers.counter = arena.take<unsigned>(1);
  pieces.bytes = arena.used;
  return pieces;
}

static Pieces pieces_of(const AttentionArgs& args, void* workspace) {
  const PairGrid grid(args.query.size[0], args.height, args.width, args.radius);
  const int64_t chunks = blocks_for(args.query.size[3], kProductChannels);
  return pieces_of(grid, grid.batch * grid.tiles() * args.query.size[1] * chunks, workspace);
}

int64_t attention_backward_cuda_workspace(const AttentionArgs& args, int) { return pieces_of(args, nullptr).bytes; }
int64_t affinity_from_maps_backward_cuda_workspace(const MapsArgs& args) {
  const PairGrid grid(args.maps.size[0], args.height, args.width, args.radius);
  return pieces_of(grid, grid.pairs() * args.maps.size[1], nullptr).bytes;
}

static int64_t finish_bytes() { return SharedArena::bytes<float>(kPairThreads / 32) + SharedArena::bytes<int>(1); }

template <class T, bool kTensor>
static Status launch_product(const ProductArgs& args, void* stream) {
  LaunchShape shape = args.grid.shape(finish_bytes() + ProductStep<T, kTensor>::shared_bytes());
  const int64_t shares = args.query.size[1] * args.chunks * (args.write[1] ? 2 : 1);
  if (shares > 65535) return Status::unsupported;
  shape.grid.y = unsigned(shares);
  return launch(product_kernel<T, kTensor>, shape, stream, args);
}

Status attention_backward_cuda(const AttentionArgs& args, const DeviceHead& head, const DeviceSlopes& slopes, const DeviceGradients& out,
                               void* workspace, int device, void* stream) {
  DeviceGuard guard(device);
  Pieces pieces = pieces_of(args, workspace);
  ProductArgs product = {};
  product.grid = PairGrid(args.query.size[0], args.height, args.width, args.radius);
  product.buffers = pieces.buffers;
  product.query = args.query, product.key = args.key, product.grad_query = out.query, product.grad_key = out.key;
  product.write[0] = out.query.data != nullptr, product.write[1] = out.key.data != nullptr;
  product.head = head, product.chunks = int(blocks_for(args.query.size[3], kProductChannels));
  // A window's gradient may be of any size, so that path keeps G in float.
  const bool tensor = slopes.labels.data != nullptr && args.query.dtype != DType::f32 && have_tensor_cores();
  pieces.buffers.tensor = tensor;
  product.wide = whole_vectors(args.query) && whole_vectors(args.key) && (tensor || args.query.dtype == DType::f32);
  product.found = {pieces.dots, product.grid.batch * product.grid.tiles(), int(args.query.size[1]), product.chunks,
                   pieces.buffers.sums, product.grid.pairs(), pieces.buffers.counter, out.head};
  AFA_TRY(pair_gradients(args, head, slopes, pieces.buffers, stream));
  if (!tensor) return launch_product<float, false>(product, stream);
  if (args.query.dtype == DType::f16) return launch_product<__half, true>(product, stream);
  return launch_product<__nv_bfloat16, true>(product, stream);
}

Status affinity_from_maps_backward_cuda(const MapsArgs& args, const DeviceHead& head, const DeviceSlopes& slopes,
                                        const DeviceGradients& out, void* workspace, int device, void* stream) {
  DeviceGuard guard(device);
  const PairGrid grid(args.maps.size[0], args.height, args.width, args.radius);
  const Pieces pieces = pieces_of(grid, grid.pairs() * args.maps.size[1], workspace);
  AFA_TRY(pair_gradients(args, head, slopes, pieces.buffers, stream));
  const HeadSums found = {pieces.dots, grid.pairs(), int(args.maps.size[1]), 1, pieces.buffers.sums, grid.pairs(),
                          pieces.buffers.counter, out.head};
  const MapProductArgs product = {grid, pieces.buffers, args.maps, out.query, out.query.data != nullptr, head, found};
  return launch(map_product_kernel, grid.shape(finish_bytes()), stream, product);
}

}  // namespace afa
