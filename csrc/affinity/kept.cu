// Affinity on a GPU, backward of the fused loss from what its forward has kept: G, the gradients of the scores, without the scores.
//
//   G_ij = 2 (dL/dA_ij) s'(z_ij),   dL/dA = -grad / (2 N+) for pairs with the same label, grad / (2 N-) for others
// s' is the sigmoid's derivative. pair_kernel (affinity.cu) has written it for every pair that it met, with the class in the sign
// (negative: the same label; positive: different ones; 0: the pair does not count), in float32 for float32 queries, else in float16
// times 2^17 (gradients.cuh). So neither queries, keys nor labels are read here.
// Data flow of kept_gradient_kernel: a block has one pair of tiles, [64][64], and a thread 16 of its numbers, in pieces of 16 bytes;
// they become G in registers, are summed and, for float16, scaled by the block, and go to the workspace as they lay, for
// product_kernel (backward.cu), whose counter the first block sets to 0.
// Floor: what is kept read once and G written once, 8 KB each for a pair of tiles in half precision, 16 KB in float32. Bound: memory,
// or the caches where the forward has just left it there.
// Occupancy: kept_gradient_kernel 256 x 4 (threads x blocks a multiprocessor, by registers).
// Wide loads: kept_gradient_kernel<*>.
#include "affinity/gradients.cuh"

namespace afa {

struct KeptArgs {
  PairGrid grid;
  const void* kept;
  DeviceSlopes slopes;
  PairBuffers buffers;
};

// 16 bytes' worth of numbers times `factor` to T.
template <class T, int kCount>
__device__ inline void store_piece(T* out, const float* values, float factor) {
  constexpr int kVector = 16 / int(sizeof(T));
#pragma unroll
  for (int first = 0; first < kCount; first += kVector) {
    T packed[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) packed[e] = from_float<T>(values[first + e] * factor);
    uint4 words;
    memcpy(&words, packed, 16);
    *reinterpret_cast<uint4*>(out + first) = words;
  }
}

template <class Kept, class T>
__global__ void __launch_bounds__(kPairThreads, 4) kept_gradient_kernel(const __grid_constant__ KeptArgs args) {
  constexpr int kVector = 16 / int(sizeof(Kept)), kPieces = 16 / kVector;
  constexpr float kUnit = sizeof(Kept) == 2 ? 1 / kKeptScale : 1.0f;
  SharedArena arena;
  SharedArray<float> scratch = arena.take<float>(kPairThreads / 32);
  const int64_t tile = blockIdx.x;
  const int neighbour = int(blockIdx.y);
  const bool there = neighbour_of(args.grid, tile, middle_of(args.grid) + neighbour) >= 0;
  if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) *args.buffers.counter = 0;
  const LossSlopes slopes = loss_slopes(args.slopes);
  const float same = -2.0f * slopes.same, different = 2.0f * slopes.different;
  for (int64_t b = blockIdx.z; b < args.grid.batch; b += gridDim.z) {
    const int64_t pair = args.grid.pair(b, tile, neighbour);
    if (!there) {
      if (threadIdx.x == 0) args.buffers.sums[pair] = 0;
      continue;
    }
    const Kept* kept = static_cast<const Kept*>(args.kept) + args.grid.met_pair(b, tile, neighbour) * kPairScores;
    const uint4* from = reinterpret_cast<const uint4*>(kept) + threadIdx.x;
    uint4 words[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) words[k] = __ldg(from + k * kPairThreads);
    float values[16];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      Kept packed[kVector];
      memcpy(packed, &words[k], 16);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float derivative = to_float(packed[e]) * kUnit;
        // 0 stays 0 whatever the slopes are, NaN stays NaN.
        values[k * kVector + e] = derivative == 0 ? 0.0f : derivative * (derivative < 0 ? same : different);
      }
    }
    const float factor = keep_sums<T>(args.buffers, pair, neighbour > 0, values, scratch);
    T* to = static_cast<T*>(args.buffers.values) + pair * kPairScores + threadIdx.x * kVector;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) store_piece<T, kVector>(to + k * kPairThreads * kVector, values + k * kVector, factor);
  }
}

// ---- launching -----------------------------------------------------------------------------------------------------------

bool can_keep(const AttentionArgs& args, const View<4>& kept) {
  const PairGrid grid(args.query.size[0], args.height, args.width, args.radius);
  const DType dtype = args.query.dtype == DType::f32 ? DType::f32 : DType::f16;
  return kept.dtype == dtype && contiguous_bytes(kept) == grid.batch * grid.met() * kPairScores * element_bytes(dtype) && wide_rows(kept);
}

template <class Kept, class T>
static Status launch_kept(const KeptArgs& args, void* stream) {
  return launch(kept_gradient_kernel<Kept, T>, args.grid.shape(SharedArena::bytes<float>(kPairThreads / 32)), stream, args);
}

Status kept_gradients(const AttentionArgs& args, const DeviceSlopes& slopes, const PairBuffers& buffers, void* stream) {
  AFA_TRY(fits(args));
  if (!can_keep(args, slopes.kept)) return Status::bad_argument;
  const KeptArgs kept = {PairGrid(args.query.size[0], args.height, args.width, args.radius), slopes.kept.data, slopes, buffers};
  if (slopes.kept.dtype == DType::f32) return launch_kept<float, float>(kept, stream);
  if (!buffers.tensor) return launch_kept<__half, float>(kept, stream);
  if (args.query.dtype == DType::f16) return launch_kept<__half, __half>(kept, stream);
  return launch_kept<__half, __nv_bfloat16>(kept, stream);
}

}  // namespace afa
