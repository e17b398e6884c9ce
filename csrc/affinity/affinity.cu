// Affinity and its loss on a GPU: the scores of pairs of tiles (affinity.cuh) and what becomes of them.
//
// Data flow of pair_kernel: a block sums the 64 x 64 scores of one pair of tiles, both orders at once (q_i k_j and k_i q_j), over all
// heads, in registers; steps of up to 128 bytes of channels of the four operands arrive in shared memory ahead of it (operands.cuh).
// Half precision goes through tensor cores, head by head, so that the head's weight meets the float32 sum and not the operands;
// float32 through fused multiply-adds, never TF32. Then, in registers: the sigmoid, and either the window's taps of both orders, or the
// pair's share of the loss, or the gradient of the scores, from the loss or from a window's gradient. Shares of the loss are summed in a
// fixed order by the block that comes last, in the same launch: the same bits every run. A loss whose gradient will be asked for also
// keeps the sigmoid's derivatives, from which its backward goes on (kept.cu). Labels are read as the caller has them, checked and made
// -1 where ignored on their way to shared memory, and the head's weights are read in their own type: the loss is one launch and a memset
// of its counter.
// Floor: 2 * N * (2r+1)^2 * heads * d operations; at r = 8 the tiles hold twice as many pairs as the band. Bytes: queries and keys,
// each tile read for every pair that it is in, (2 reach + 1)^2 of them away from the edge, from L2.
// Occupancy: pair_kernel 256 x 2 (threads x blocks a multiprocessor, by registers).
// Wide loads: pair_kernel<SimtScores, *>, pair_kernel<TensorScores<__half>, *>, pair_kernel<TensorScores<__nv_bfloat16>, *>.
#include "affinity/gradients.cuh"
#include "affinity/scores.cuh"

namespace afa {

// ---- what becomes of them ------------------------------------------------------------------------------------------------

// One score of a pair: whether it is within the radius, and where it belongs.
struct ScorePlace {
  bool near;
  int64_t pixel, other;
  int tap, back;  // channel of the window, and of the mirror image
};
template <bool kTensor>
__device__ __forceinline__ ScorePlace score_place(const PairArgs& args, const TilePlace& place, const TilePlace& other, unsigned thread, int e) {
  const PairGrid& grid = args.grid;
  const int i = ResultPlace<kTensor>::row(thread, e), j = ResultPlace<kTensor>::column(thread, e);
  const int dy = other.row(j) - place.row(i), dx = other.column(j) - place.column(i), centre = args.side / 2;
  ScorePlace at;
  at.near = abs(dy) <= grid.radius && abs(dx) <= grid.radius && place.inside(grid, i) && other.inside(grid, j);
  at.pixel = place.pixel(grid, i), at.other = other.pixel(grid, j);
  at.tap = (centre + dy) * args.side + centre + dx, at.back = (centre - dy) * args.side + centre - dx;
  return at;
}
// What its labels say; they are -1 outside the image.
struct ScoreLabels {
  bool same, different;
};
template <bool kTensor>
__device__ __forceinline__ ScoreLabels score_labels(const PairArgs& args, const TilePlace& place, const TilePlace& other,
                                                    SharedArray<int> labels, unsigned thread, int e) {
  const int i = ResultPlace<kTensor>::row(thread, e), j = ResultPlace<kTensor>::column(thread, e), radius = args.grid.radius;
  const bool near = abs(other.row(j) - place.row(i)) <= radius && abs(other.column(j) - place.column(i)) <= radius;
  const int own = labels[i], theirs = labels[kTilePixels + j];
  const bool counts = near && (own | theirs) >= 0;
  return {counts && own == theirs, counts && own != theirs};
}

// The last block turns the shares, read in order, into the loss.
__device__ inline void finish_loss(const PairArgs& args, SharedArena& arena) {
  SharedArray<double> sums = arena.take<double>(kPairThreads / 32);
  SharedArray<int> last = arena.take<int>(1);
  if (!comes_last(args.counter, last)) return;
  double same = 0, different = 0, same_count = 0, different_count = 0;
  const int64_t pairs = args.grid.batch * args.grid.tiles() * args.grid.neighbours;
  for (int64_t pair = threadIdx.x; pair < pairs; pair += kPairThreads) {
    const float4 share = __ldcg(args.shares + pair);
    same += share.x, different += share.y;
    same_count += __float_as_int(share.z), different_count += __float_as_int(share.w);
  }
  same = block_sum(same, sums, kPairThreads / 32), different = block_sum(different, sums, kPairThreads / 32);
  same_count = block_sum(same_count, sums, kPairThreads / 32), different_count = block_sum(different_count, sums, kPairThreads / 32);
  if (threadIdx.x == 0) write_loss(args.results, same, different, same_count, different_count);
}

__device__ inline void keep_share(const PairArgs& args, int64_t pair, bool mirrored, float same, float different, int same_count,
                                  int different_count, SharedArray<float> scratch) {
  constexpr int kWarps = kPairThreads / 32;
  int counts = same_count | different_count << 16;  // of at most 4096
  for (int distance = 16; distance > 0; distance /= 2) {
    same += __shfl_xor_sync(0xffffffffu, same, distance), different += __shfl_xor_sync(0xffffffffu, different, distance);
    counts += __shfl_xor_sync(0xffffffffu, counts, distance);
  }
  if (threadIdx.x % 32 == 0) {
    const int warp = threadIdx.x / 32;
    scratch[warp] = same, scratch[kWarps + warp] = different, scratch[2 * kWarps + warp] = __int_as_float(counts);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  same = different = 0, counts = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    same += scratch[warp], different += scratch[kWarps + warp];
    counts += __float_as_int(scratch[2 * kWarps + warp]);
  }
  const int weight = mirrored ? 2 : 1;  // a pair of two tiles stands for both orders
  args.shares[pair] = make_float4(weight * same, weight * different, __int_as_float(weight * (counts & 0xffff)),
                                  __int_as_float(weight * (counts >> 16)));
}

// The derivatives that a loss keeps of one pair of tiles, of scores where kTensor has them.
template <bool kTensor>
__device__ inline void keep_derivatives(const PairArgs& args, int64_t met_pair, const float (&values)[16], unsigned thread) {
  const int64_t first = met_pair * kPairScores;
  if (kTensor || args.query.dtype != DType::f32)
    store_results<__half, kTensor>(static_cast<__half*>(args.kept) + first, values, kKeptScale, thread);
  else
    store_results<float, kTensor>(static_cast<float*>(args.kept) + first, values, 1, thread);
}

// The type of G, which tensor cores multiply next. A window's gradient may be of any size, so that path keeps it in float.
template <class Scores, Goal kGoal>
struct GradientType {
  typedef float type;
};
template <class T>
struct GradientType<TensorScores<T>, Goal::gradient> {
  typedef T type;
};

__device__ inline float at_tap(const View<4>& view, int64_t b, int tap, int64_t pixel, int width) {
  return load_element(view.data, view.dtype, offset_of(view, b, tap, pixel / width) + pixel % width * view.stride[3]);
}

// One pair of tiles of image b.
template <class Scores, Goal kGoal>
__device__ inline void finish_pair(const PairArgs& args, int64_t b, const float (&scores)[16], SharedArray<int> labels,
                                   SharedArray<float> scratch) {
  constexpr bool kTensor = Scores::kTensor;
  const int tile = block_x_here(), neighbour = block_y_here();
  const bool mirrored = neighbour > 0;
  const int64_t pair = args.grid.pair(b, tile, neighbour);
  const TilePlace place(args.grid, tile), other_place(args.grid, neighbour_of(args.grid, tile, middle_of(args.grid) + neighbour));
  const unsigned thread = unsigned(computed_here(int(threadIdx.x)));
  const float bias = bias_of(args.head);
  if constexpr (kGoal == Goal::window) {
    const View<4>& out = args.window;
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const ScorePlace at = score_place<kTensor>(args, place, other_place, thread, e);
      if (!at.near) continue;
      // From e = exp(-|z|) both 1/(1+e) and e/(1+e) come without cancellation.
      const float z = scores[e] + bias, decay = __expf(-fabsf(z)), inverse = reciprocal(1.0f + decay);
      const float affinity = z < 0 ? decay * inverse : inverse;
      const int64_t image = b * out.stride[0];
      store_element(out.data, out.dtype, image + at.tap * out.stride[1] + at.pixel, affinity);
      if (mirrored) store_element(out.data, out.dtype, image + at.back * out.stride[1] + at.other, affinity);
    }
  } else if constexpr (kGoal == Goal::window_gradient) {
    float values[16];
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const ScorePlace at = score_place<kTensor>(args, place, other_place, unsigned(computed_here(int(thread))), e);
      values[e] = 0;
      if (!at.near) continue;
      const float decay = __expf(-fabsf(scores[e] + bias)), inverse = reciprocal(1.0f + decay);
      const float grad = at_tap(args.window, b, at.tap, at.pixel, args.grid.width) +
                         at_tap(args.window, b, at.back, at.other, args.grid.width);
      values[e] = decay * inverse * inverse * grad;
    }
    keep_gradients<float, kTensor>(args.buffers, pair, mirrored, values, thread, scratch);
  } else {
    float values[16], same = 0, different = 0;
    int same_count = 0, different_count = 0;
    const LossSlopes slopes = kGoal == Goal::gradient ? loss_slopes(args.slopes) : LossSlopes();
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const ScoreLabels at = score_labels<kTensor>(args, place, other_place, labels, thread, e);
      const float z = scores[e] + bias, decay = __expf(-fabsf(z)), inverse = reciprocal(1.0f + decay), rest = decay * inverse;
      const float derivative = rest * inverse;
      if (kGoal == Goal::loss) {
        same += at.same ? (z >= 0 ? rest : inverse) : 0.0f;
        different += at.different ? (z >= 0 ? inverse : rest) : 0.0f;
        same_count += at.same, different_count += at.different;
        values[e] = at.same ? -derivative : at.different ? derivative : 0.0f;
      } else {
        const float slope = 2.0f * (at.same ? slopes.same : slopes.different) * derivative;
        values[e] = at.same || at.different ? slope : 0.0f;
      }
    }
    if constexpr (kGoal == Goal::loss) {
      if (args.kept) keep_derivatives<kTensor>(args, args.grid.met_pair(b, tile, neighbour), values, thread);
      keep_share(args, pair, mirrored, same, different, same_count, different_count, scratch);
    } else {
      keep_gradients<typename GradientType<Scores, kGoal>::type, kTensor>(args.buffers, pair, mirrored, values, thread, scratch);
    }
  }
}

template <class Scores, Goal kGoal>
__device__ inline void walk_pairs(const PairArgs& args) {
  SharedArena arena;
  SharedArray<int> labels = arena.take<int>(2 * kTilePixels);
  SharedArray<float> scratch = arena.take<float>(3 * kPairThreads / 32);
  const int64_t tile = blockIdx.x;
  const int neighbour = int(blockIdx.y);
  const int64_t other = neighbour_of(args.grid, tile, middle_of(args.grid) + neighbour);
  const bool first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0;
  if ((kGoal == Goal::gradient || kGoal == Goal::window_gradient) && first) *args.buffers.counter = 0;
  for (int64_t b = blockIdx.z; b < args.grid.batch; b += gridDim.z) {
    if (other < 0) {
      const int64_t pair = args.grid.pair(b, tile, block_y_here());
      if (kGoal == Goal::loss && threadIdx.x == 0) args.shares[pair] = make_float4(0, 0, __int_as_float(0), __int_as_float(0));
      if ((kGoal == Goal::gradient || kGoal == Goal::window_gradient) && threadIdx.x == 0) args.buffers.sums[pair] = 0;
      continue;
    }
    if (kGoal == Goal::loss || kGoal == Goal::gradient) {
      __syncthreads();
      if (threadIdx.x < 2 * kTilePixels) {
        const TilePlace place(args.grid, threadIdx.x < kTilePixels ? tile : other);
        const int i = threadIdx.x % kTilePixels;
        labels[threadIdx.x] = place.inside(args.grid, i) ? label_at<true>(args.labels, b, place.row(i), place.column(i)) : -1;
      }
      __syncthreads();
    }
    SharedArena operands = arena;
    float scores[16] = {};
    Scores::sum(args, b, tile, other, operands, scores);
    finish_pair<Scores, kGoal>(args, b, scores, labels, scratch);
  }
  if (kGoal == Goal::loss) finish_loss(args, arena);
}

template <class Scores, Goal kGoal>
__global__ void __launch_bounds__(kPairThreads, 2) pair_kernel(const __grid_constant__ PairArgs args) {
  walk_pairs<Scores, kGoal>(args);
}

// ---- launching -----------------------------------------------------------------------------------------------------------

template <class Scores, Goal kGoal>
static Status launch_pairs(const PairArgs& args, void* stream) {
  const int64_t finish = SharedArena::bytes<double>(kPairThreads / 32) + SharedArena::bytes<int>(1), sum = Scores::shared_bytes();
  const int64_t fixed = SharedArena::bytes<int>(2 * kTilePixels) + SharedArena::bytes<float>(3 * kPairThreads / 32);
  LaunchShape shape = args.grid.shape(fixed + (sum > finish ? sum : finish));
  // As many pairs as multiprocessors or fewer: more than half of the shared memory for each, or two would share one and leave another idle.
  const DeviceLimits device = device_limits();
  if (args.grid.batch * args.grid.met() <= device.multiprocessors && shape.shared_bytes < device.shared_bytes / 2)
    shape.shared_bytes = device.shared_bytes / 2 + 1024;
  return launch(pair_kernel<Scores, kGoal>, shape, stream, args);
}

template <Goal kGoal>
static Status launch_products(const PairArgs& args, void* stream) {
  if (!args.tensor) return launch_pairs<SimtScores, kGoal>(args, stream);
  if (args.query.dtype == DType::f16) return launch_pairs<TensorScores<__half>, kGoal>(args, stream);
  return launch_pairs<TensorScores<__nv_bfloat16>, kGoal>(args, stream);
}

Status fits(const AttentionArgs& args) {
  if (!same_size(args.query, args.key) || is_empty(args.query)) return Status::bad_argument;
  const bool agree = args.query.size[2] == args.height * args.width && args.radius >= 0 && args.query.dtype == args.key.dtype;
  if (!agree) return Status::bad_argument;
  // Rows, columns, channels and taps are counted in 32 bits.
  const bool small = args.height < (1 << 30) && args.width < (1 << 30) && args.query.size[1] < (1 << 20) && args.query.size[3] < (1 << 20);
  const PairGrid grid(args.query.size[0], args.height, args.width, args.radius);
  return small && args.radius < (1 << 14) && grid.launchable() ? Status::ok : Status::unsupported;
}

static PairArgs pair_args(const AttentionArgs& args, const DeviceHead& head, bool tensor) {
  PairArgs pairs = {};
  pairs.grid = PairGrid(args.query.size[0], args.height, args.width, args.radius);
  pairs.query = args.query, pairs.key = args.key, pairs.head = head, pairs.side = int(2 * args.radius + 1);
  pairs.tensor = tensor && args.query.dtype != DType::f32;
  // Without tensor cores half precision is widened on its way in, one element at a time.
  pairs.wide = near_vectors(args.query) && near_vectors(args.key) && (pairs.tensor || args.query.dtype == DType::f32);
  if (pairs.tensor)
    count_steps<__half>(&pairs);
  else
    count_steps<float>(&pairs);
  return pairs;
}

static Status clear_window(const View<4>& out, void* stream) {
  const int64_t bytes = contiguous_bytes(out);
  if (bytes < 0) return Status::bad_argument;
  return cuda_failed(cudaMemsetAsync(out.data, 0, size_t(bytes), static_cast<cudaStream_t>(stream)));
}

Status window_affinity_cuda(const AttentionArgs& args, const DeviceHead& head, const View<4>& out, int device, void* stream) {
  AFA_TRY(fits(args));
  DeviceGuard guard(device);
  AFA_TRY(clear_window(out, stream));  // taps that leave the image
  PairArgs pairs = pair_args(args, head, have_tensor_cores());
  pairs.window = out;
  return launch_products<Goal::window>(pairs, stream);
}

static PairArgs maps_args(const MapsArgs& args, const DeviceHead& head) {
  PairArgs pairs = {};
  pairs.grid = PairGrid(args.maps.size[0], args.height, args.width, args.radius);
  pairs.query = args.maps, pairs.head = head, pairs.side = int(2 * args.radius + 1);
  return pairs;
}

Status affinity_from_maps_cuda(const MapsArgs& args, const DeviceHead& head, const View<4>& out, int device, void* stream) {
  const int64_t pixels = args.height * args.width;
  if (args.maps.size[2] != pixels || args.maps.size[3] != pixels || args.radius < 0) return Status::bad_argument;
  DeviceGuard guard(device);
  PairArgs pairs = maps_args(args, head);
  if (!pairs.grid.launchable() || args.radius >= (1 << 14)) return Status::unsupported;
  AFA_TRY(clear_window(out, stream));
  pairs.window = out;
  return launch_pairs<MapScores, Goal::window>(pairs, stream);
}

// The counter of finished blocks, then the shares.
int64_t attention_cuda_workspace(const AttentionArgs& args) {
  return 64 + int64_t(sizeof(float4)) * PairGrid(args.query.size[0], args.height, args.width, args.radius).pairs();
}

Status attention_affinity_loss_cuda(const AttentionArgs& args, const DeviceHead& head, const DeviceLabels& labels,
                                    const PairResults& results, const View<4>& kept, void* workspace, int device, void* stream) {
  AFA_TRY(fits(args));
  if (kept.data && !can_keep(args, kept)) return Status::bad_argument;
  DeviceGuard guard(device);
  PairArgs pairs = pair_args(args, head, have_tensor_cores());
  pairs.labels = labels, pairs.results = results, pairs.kept = kept.data;
  pairs.counter = static_cast<unsigned*>(workspace);
  pairs.shares = reinterpret_cast<float4*>(static_cast<char*>(workspace) + 64);
  AFA_TRY(cuda_failed(cudaMemsetAsync(workspace, 0, 64, static_cast<cudaStream_t>(stream))));
  return launch_products<Goal::loss>(pairs, stream);
}

Status pair_gradients(const AttentionArgs& args, const DeviceHead& head, const DeviceSlopes& slopes, const PairBuffers& buffers,
                      void* stream) {
  AFA_TRY(fits(args));
  PairArgs pairs = pair_args(args, head, have_tensor_cores());
  pairs.labels = slopes.labels, pairs.slopes = slopes, pairs.window = slopes.grad_window, pairs.buffers = buffers;
  return slopes.labels.data ? launch_products<Goal::gradient>(pairs, stream) : launch_products<Goal::window_gradient>(pairs, stream);
}
Status pair_gradients(const MapsArgs& args, const DeviceHead& head, const DeviceSlopes& slopes, const PairBuffers& buffers, void* stream) {
  PairArgs pairs = maps_args(args, head);
  if (!pairs.grid.launchable() || args.radius >= (1 << 14)) return Status::unsupported;
  pairs.window = slopes.grad_window, pairs.buffers = buffers;
  return launch_pairs<MapScores, Goal::window_gradient>(pairs, stream);
}

}  // namespace afa
