// Affinity on a GPU, backward: G, the gradients of the scores of every pair of tiles, times queries and keys.
//
// G comes from kept_gradient_kernel (kept.cu), of the derivatives that the fused loss has kept; or from pair_kernel (affinity.cu), which
// computes the scores again: a sigmoid that has been rounded no longer tells its slope. It lives in the workspace for the length of this
// pass alone. Then, since z = u v^T + bias,
//   dL/dq_h = w_h G k_h,   dL/dk_h = w_h G q_h,   dL/dw_h = sum q_h . (G k_h),   dL/dbias = 1/2 sum G .
// Data flow of product_kernel (products.cuh): a block owns a tile of 64 pixels and four items, 64 channels of one head of the queries'
// gradient or the keys'; it walks over the tile's neighbours, whose G (mirrored for those above and to the left) and values arrive in
// shared memory while the last ones are multiplied, and sums in registers. Tiles with most neighbours are taken first. Gradients are
// written by way of shared memory, 16 bytes at a time. The block that comes last adds up what all found for the head, in order: two
// launches, the first of which sets the counter of the second to 0. A query or key that is no finite number counts as 0 there, lest 0 times
// it reach pixels outside its window, or, where its label is ignored, any: the pairs that it does count in have a G that is NaN, or 0 at
// the sigmoid's ends. Since any such value shows in the sums, the block looks at those, and only then does all over again with zeros in
// its place.
// Floor: 4 * N * (2r+1)^2 * heads * d operations; at r = 8 the tiles hold twice as many pairs as the band.
// Occupancy: product_kernel 256 x 2, map_product_kernel 256 x 2 (threads x blocks a multiprocessor, by registers).
// Wide loads: product_kernel<__half, true, true>, product_kernel<__nv_bfloat16, true, true>, product_kernel<float, false, true>.
#include "affinity/products.cuh"
#include "common/arena.h"

namespace afa {

constexpr int kStagedSums = kPairThreads / 32 * 16 * (kItemChannels + 8);  // floats, on their way to a gradient

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

// kLines rows of one item's 64 sums in shared memory, `pitch` apart, to the gradient, by one warp; pixel_of(line) is the pixel of the
// tile. Returns the thread's part of the head's dot product, of the queries alone.
template <class T, int kLines, bool kWide, class PixelOf>
__device__ inline float write_rows(const ProductArgs& args, const Item& item, int64_t b, const TilePlace& place, SharedArray<float> rows,
                                   int pitch, float scale, PixelOf pixel_of) {
  constexpr int kVector = 16 / int(sizeof(T)), kParts = kItemChannels / kVector;
  const View<4>&query = args.query, &out = item.of_key ? args.grad_key : args.grad_query;
  const int lane = computed_here(int(threadIdx.x)) % 32, depth = int(query.size[3]);
  const float weight = weight_of(args.head, item.head);
  float dot = 0;
  if (kWide && args.wide_out[item.of_key]) {
    constexpr int kStep = 32 / kParts, kTurns = kLines / kStep, kAhead = 4;
    const int part = lane % kParts * kVector, c = item.channel + part;
    const T* own_row = static_cast<const T*>(query.data) + offset_of(query, b, item.head, 0) + c;
    T* to = static_cast<T*>(out.data) + offset_of(out, b, item.head, 0) + c;
#pragma unroll 1
    for (int turn = 0; turn < kTurns; turn += kAhead) {
      uint4 words[kAhead];
      int64_t pixel[kAhead];
      bool there[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int i = pixel_of(lane / kParts + (turn + a) * kStep);
        there[a] = c < depth && place.inside(args.grid, i), pixel[a] = place.pixel(args.grid, i);
        words[a] = make_uint4(0, 0, 0, 0);
        if (!item.of_key && there[a]) words[a] = __ldg(reinterpret_cast<const uint4*>(own_row + pixel[a] * query.stride[2]));
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int line = lane / kParts + (turn + a) * kStep;
        float values[kVector];
#pragma unroll
        for (int e = 0; e < kVector; e += 4) {
          const float4 four = *reinterpret_cast<const float4*>(&rows[line * pitch + part + e]);
          values[e] = four.x * scale, values[e + 1] = four.y * scale, values[e + 2] = four.z * scale, values[e + 3] = four.w * scale;
        }
        T packed[kVector];
        if (!item.of_key) {
          words[a] = finite_or_zero<T>(words[a]);
          memcpy(packed, &words[a], 16);
#pragma unroll
          for (int e = 0; e < kVector; ++e) dot = fmaf(to_float(packed[e]), values[e], dot);
        }
        if (!there[a] || !args.write[item.of_key]) continue;
#pragma unroll
        for (int e = 0; e < kVector; ++e) packed[e] = from_float<T>(weight * values[e]);
        memcpy(&words[a], packed, 16);
        *reinterpret_cast<uint4*>(to + pixel[a] * out.stride[2]) = words[a];
      }
    }
    return dot;
  }
#pragma unroll 1
  for (int at = lane; at < kLines * kItemChannels; at += 32) {
    const int line = at / kItemChannels, i = pixel_of(line), c = item.channel + at % kItemChannels;
    if (!place.inside(args.grid, i) || c >= depth) continue;
    const int64_t n = place.pixel(args.grid, i);
    const float value = rows[line * pitch + at % kItemChannels] * scale;
    if (!item.of_key) {
      const float own = load_element(query.data, query.dtype, offset_of(query, b, item.head, n) + c * query.stride[3]);
      dot = fmaf(is_finite(own) ? own : 0.0f, value, dot);
    }
    if (args.write[item.of_key])
      store_element(out.data, out.dtype, offset_of(out, b, item.head, n) + c * out.stride[3], weight * value);
  }
  return dot;
}

// A thread's sums by way of shared memory, 16 rows of a warp at a time: those of sums 0..31, then those of 32..63.
template <class T, bool kTensor, bool kWide>
__device__ inline float write_sums(const ProductArgs& args, const Item& item, int64_t b, const TilePlace& place, SharedArray<float> rows,
                                   const float (&sums)[64], float scale) {
  typedef Product<T, kTensor, kWide> Sums;
  constexpr int kPitch = kItemChannels + 8;
  const unsigned thread = unsigned(computed_here(int(threadIdx.x)));
  const int warp = thread / 32;
  const SharedArray<float> own = rows + warp * 16 * kPitch;
  float dot = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    auto pixel_of = [=](int line) { return kTensor ? warp % 2 * 32 + half * 16 + line : half * 32 + warp % 2 * 16 + line; };
    __syncwarp();
#pragma unroll
    for (int e = 32 * half; e < 32 * half + 32; e += 2)
      *reinterpret_cast<float2*>(&own[Sums::row(thread, e) % 16 * kPitch + Sums::column(thread, e)]) = make_float2(sums[e], sums[e + 1]);
    __syncwarp();
    if (item.there) dot += write_rows<T, 16, kWide>(args, item, b, place, own, kPitch, scale, pixel_of);
  }
  return dot;
}

template <class T, bool kTensor, bool kWide>
__global__ void __launch_bounds__(kPairThreads, 2)
    product_kernel(const __grid_constant__ ProductArgs args, const __grid_constant__ HeadSums found) {
  typedef Product<T, kTensor, kWide> Sums;
  SharedArena arena;
  SharedArray<float> scratch = arena.take<float>(kPairThreads / 32);
  SharedArray<int> last = arena.take<int>(2), own_tile = last + 1;  // the tile is read again behind the sums: registers are short
  SharedArray<ItemSource> items = arena.take<ItemSource>(kItems);
  SharedArena stages = arena;
  SharedArray<T> shared = arena.take<T>(Sums::kStages * Sums::kStage);
  SharedArray<float> rows = stages.take<float>(kStagedSums);
  for (unsigned image = blockIdx.z; image < args.grid.batch; image += gridDim.z) {
    const int64_t b = image;
    const unsigned block = unsigned(computed_here(int(blockIdx.x)));
    const int tile = tile_in_turn(args.grid, b, int(block / args.groups));
    if (threadIdx.x == 0) own_tile[0] = tile;
    if (threadIdx.x < kItems) items[threadIdx.x] = ItemSource(args, b, int(block % args.groups) * kItems + int(threadIdx.x));
    float sums[Sums::kSums], unit;
    // Rarely twice: all over again, without the queries and keys that are no finite numbers.
#pragma unroll 1
    for (int clean = 0; clean < 2; ++clean) {
#pragma unroll
      for (int e = 0; e < Sums::kSums; ++e) sums[e] = 0;
      unit = Sums::sum(args, b, tile, items, clean != 0, shared, sums);
      bool odd = false;
#pragma unroll
      for (int e = 0; e < Sums::kSums; ++e) odd |= !is_finite(sums[e]);
      if (!__syncthreads_or(odd)) break;
    }
    const int thread = computed_here(int(threadIdx.x));
    const Item item = items[thread / kItemThreads].item;
    float dot = write_sums<T, kTensor, kWide>(args, item, b, TilePlace(args.grid, own_tile[0]), rows, sums, unit);
    for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
    if (thread % 32 == 0) scratch[thread / 32] = dot;
    const int place = own_tile[0];  // before the barrier: behind it the first thread goes on to the next image's
    __syncthreads();
    if (item.there && !item.of_key && thread % kItemThreads == 0)
      args.dots[(b * args.grid.tiles() + place) * args.shares + item.share] = scratch[thread / 32] + scratch[thread / 32 + 1];
  }
  finish_head(found, last);
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
  const int64_t chunks = blocks_for(args.query.size[3], kItemChannels);
  return pieces_of(grid, grid.batch * grid.tiles() * args.query.size[1] * chunks, workspace);
}

int64_t attention_backward_cuda_workspace(const AttentionArgs& args, int) { return pieces_of(args, nullptr).bytes; }
int64_t affinity_from_maps_backward_cuda_workspace(const MapsArgs& args) {
  const PairGrid grid(args.maps.size[0], args.height, args.width, args.radius);
  return pieces_of(grid, grid.pairs() * args.maps.size[1], nullptr).bytes;
}

static int64_t finish_bytes() { return SharedArena::bytes<float>(kPairThreads / 32) + SharedArena::bytes<int>(1); }

template <class T, bool kTensor>
static Status launch_product(const ProductArgs& args, const HeadSums& found, bool wide, void* stream) {
  typedef Product<T, kTensor, true> Sums;
  const int64_t stages = SharedArena::bytes<T>(Sums::kStages * Sums::kStage), rows = SharedArena::bytes<float>(kStagedSums);
  LaunchShape shape = args.grid.shape(finish_bytes() + SharedArena::bytes<ItemSource>(kItems) + (stages > rows ? stages : rows));
  const int64_t blocks = args.grid.tiles() * args.groups;
  if (blocks > 0x7fffffff) return Status::unsupported;
  shape.grid = dim3(unsigned(blocks), 1, shape.grid.z);
  return launch(wide ? product_kernel<T, kTensor, true> : product_kernel<T, kTensor, false>, shape, stream, args, found);
}

Status attention_backward_cuda(const AttentionArgs& args, const DeviceHead& head, const DeviceSlopes& slopes, const DeviceGradients& out,
                               void* workspace, int device, void* stream) {
  DeviceGuard guard(device);
  Pieces pieces = pieces_of(args, workspace);
  // A window's gradient may be of any size, so that path keeps G in float.
  const bool tensor = slopes.labels.data != nullptr && args.query.dtype != DType::f32 && have_tensor_cores();
  pieces.buffers.tensor = tensor;
  ProductArgs product = {};
  product.grid = PairGrid(args.query.size[0], args.height, args.width, args.radius);
  product.buffers = pieces.buffers;
  product.query = args.query, product.key = args.key, product.grad_query = out.query, product.grad_key = out.key;
  product.write[0] = out.query.data != nullptr, product.write[1] = out.key.data != nullptr;
  const bool wide = near_vectors(args.query) && near_vectors(args.key) && (tensor || args.query.dtype == DType::f32);
  for (int side = 0; side < 2; ++side) {
    const View<4>&of = side ? args.query : args.key, &to = side ? out.key : out.query;
    product.pieces[side] = int(of.stride[2] / vector_elements(of));
    product.wide_out[side] = to.data == nullptr || (to.dtype == args.query.dtype && whole_vectors(to));
  }
  product.head = head, product.dots = pieces.dots, product.chunks = int(blocks_for(args.query.size[3], kItemChannels));
  product.sides = product.write[1] ? 2 : 1;
  const int64_t items = args.query.size[1] * product.chunks * product.sides;
  if (items > (1 << 30)) return Status::unsupported;
  product.items = int(items), product.shares = int(items / product.sides);
  product.groups = unsigned(blocks_for(items, kItems));
  const HeadSums found = {pieces.dots, product.grid.batch * product.grid.tiles(), int(args.query.size[1]), product.chunks,
                          pieces.buffers.sums, product.grid.pairs(), pieces.buffers.counter, out.head};
  AFA_TRY(slopes.kept.data ? kept_gradients(args, slopes, pieces.buffers, stream)
                           : pair_gradients(args, head, slopes, pieces.buffers, stream));
  if (!tensor) return launch_product<float, false>(product, found, wide, stream);
  if (args.query.dtype == DType::f16) return launch_product<__half, true>(product, found, wide, stream);
  return launch_product<__nv_bfloat16, true>(product, found, wide, stream);
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
