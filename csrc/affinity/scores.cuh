// The scores of one pair of tiles, both orders at once, over all heads: what pair_kernel (affinity.cu) sums up and how.
//
// Each thread has 16 of the pair's scores in the end, placed by ResultPlace (affinity.cuh). With tensor cores it sums these from the
// start, which leaves registers for the products ahead. Without, groups of warps share the work of a step, each for all 64 x 64 scores in
// large pieces, so that shared memory is read seldom: two groups for each order, with half of the step's channels; then what the groups
// have is summed, in their order.
#pragma once

#include "affinity/operands.cuh"

namespace afa {

// Scores in float32 by fused multiply-adds, operands of any type. Queries of the tile and keys of the tile, which stand on the left,
// are multiplied by their head's weight in shared memory, by the thread that has brought them.
struct SimtScores {
  static constexpr bool kTensor = false;
  static constexpr int kStages = 3, kGroups = 4, kGroupThreads = kPairThreads / kGroups;
  typedef StageLayout<float> Layout;
  static_assert(kStages * Layout::kStage >= kGroups * (kGroups - 1) * 16 * kGroupThreads, "the groups' sums lie where the stages did");
  static int64_t shared_bytes() { return SharedArena::bytes<float>(kStages * Layout::kStage) + SharedArena::bytes<float>(kPairThreads); }

  // One step's products, q_i k_j or k_i q_j, of the thread's 8 x 8 pairs.
  __device__ static __forceinline__ void multiply(SharedArray<float> stage, float (&total)[8][8]) {
    const unsigned thread = unsigned(computed_here(int(threadIdx.x)));
    const int group = int(thread) / kGroupThreads, order = group / 2;
    const int row = ResultPlace<false>::own_row(thread), column = ResultPlace<false>::own_column(thread);
    const SharedArray<float> left = stage + order * Layout::kOperand, right = stage + (3 - order) * Layout::kOperand;
#pragma unroll 1
    for (int p = 0; p < 2; ++p) {
      const int part = group % 2 * 2 + p;
#pragma unroll
      for (int half = 0; half < 8; half += 4) {
        float4 four[4];
#pragma unroll
        for (int a = 0; a < 4; ++a) four[a] = *reinterpret_cast<const float4*>(&left[Layout::at(row, part) + 8 * (half + a) * Layout::kChannels]);
#pragma unroll
        for (int b = 0; b < 8; ++b) {
          const float4 other = *reinterpret_cast<const float4*>(&right[Layout::at(column, part) + 8 * b * Layout::kChannels]);
#pragma unroll
          for (int a = 0; a < 4; ++a) {
            float& sum = total[half + a][b];
            sum = fmaf(four[a].x, other.x, sum), sum = fmaf(four[a].y, other.y, sum);
            sum = fmaf(four[a].z, other.z, sum), sum = fmaf(four[a].w, other.w, sum);
          }
        }
      }
    }
  }

  // Rows 2 g and 2 g + 1 of each thread's 8 are group g's to sum up.
  __device__ static __forceinline__ void exchange(SharedArray<float> shared, const float (&sums)[8][8], float (&total)[16]) {
    const int own_thread = computed_here(int(threadIdx.x)), group = own_thread / kGroupThreads, thread = own_thread % kGroupThreads;
    auto slot = [&](int from, int to, int e) {
      return ((to * (kGroups - 1) + from - (from > to)) * 16 + e) * kGroupThreads + thread;
    };
    float own[16] = {};
#pragma unroll
    for (int to = 0; to < kGroups; ++to)
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const float value = sums[2 * to + e / 8][e % 8];
        if (to == group)
          own[e] = value;
        else
          shared[slot(group, to, e)] = value;
      }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 16; ++e) total[e] = 0;
#pragma unroll
    for (int from = 0; from < kGroups; ++from)
#pragma unroll
      for (int e = 0; e < 16; ++e) total[e] += from == group ? own[e] : shared[slot(from, group, e)];
    __syncthreads();
  }

  __device__ static void sum(const PairArgs& args, int64_t b, int64_t tile, int64_t other, SharedArena& arena, float (&total)[16]) {
    SharedArray<float> shared = arena.take<float>(kStages * Layout::kStage);
    // Only what stands on the left is multiplied by the weight, so a tile that is its own neighbour is there twice.
    OperandReader<float> operands(args, b, tile, other, false, shared);
    HeadWeights weight(args.head, args.query.size[1], arena.take<float>(kPairThreads));
    float sums[8][8] = {};
    auto scale = [&](int stage, bool last) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float4* own = reinterpret_cast<float4*>(&operands.to[stage * Layout::kStage + k * Layout::kOperand]);
        const float4 four = *own;
        *own = make_float4(four.x * weight.now, four.y * weight.now, four.z * weight.now, four.w * weight.now);
      }
      if (last) weight.turn();
    };
    walk_steps<kStages>(args, operands, scale,
               [&](int stage, bool, auto ask) {
#pragma unroll
                 for (int k = 0; k < 4; ++k) ask(k);
                 multiply(shared + stage * Layout::kStage, sums);
               },
               [] {});
    exchange(shared, sums, total);
  }
};

// Scores by tensor cores, for operands that are both of type T. A warp has 32 x 16 pairs, placed by ResultPlace, both orders in the
// same sums.
template <class T>
struct TensorScores {
  static constexpr bool kTensor = true;
  static constexpr int kStages = 2;
  typedef StageLayout<T> Layout;
  static constexpr int kTurns = Layout::kParts / 2;  // of 16 channels in a step
  static int64_t shared_bytes() { return SharedArena::bytes<T>(kStages * Layout::kStage) + SharedArena::bytes<float>(kPairThreads); }

  // Where a lane's rows of the fragments lie in a stage, for each 16 channels: a tile's own queries, and its neighbour's keys. Kept, for
  // working them out anew would cost more than all products of a step.
  struct Rows {
    int left[kTurns], right[kTurns];
    __device__ Rows(bool twice) {
      const unsigned thread = threadIdx.x, first = thread & ~31u;
      const int m = int(thread % 32 / 8), r = int(thread % 8);
      const int row = ResultPlace<true>::row(first, 0) + m % 2 * 8 + r, column = ResultPlace<true>::column(first, 0) + m / 2 * 8 + r;
#pragma unroll
      for (int k = 0; k < kTurns; ++k) {
        const int turned = 2 * Layout::kVector * k;
        left[k] = computed_here(Layout::at(row, m / 2) ^ turned);
        right[k] = computed_here((Layout::at(column, m % 2) ^ turned) + (twice ? 1 : 3) * Layout::kOperand);
      }
    }
  };

  // One step's products, q_i k_j + k_i q_j, added to `sums` unless `first`. Meanwhile the next operands are asked for, one at a time: all
  // at once would have registers wait for the queue that takes their addresses.
  template <class Ask>
  __device__ static __forceinline__ void multiply(SharedArray<T> stage, const Rows& rows, bool first, float (&sums)[2][2][4], Ask ask) {
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const SharedArray<T> left = stage + rows.left[k], right = stage + rows.right[k];
#pragma unroll
      for (int order = 0; order < 2; ++order) {
        unsigned a[2][4], b[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) load_matrices_of<false>(a[i], &left[order * Layout::kOperand + i * 16 * Layout::kChannels]);
        load_matrices_of<false>(b, &right[-order * Layout::kOperand]);
        if (order == 0) ask(k);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = e / 2, j = e % 2;
          if (k == 0 && order == 0 && first)
            first_fragments<T>(sums[i][j], a[i], &b[2 * j]);
          else
            multiply_fragments<T>(sums[i][j], a[i], &b[2 * j]);
        }
      }
    }
  }

  __device__ static void sum(const PairArgs& args, int64_t b, int64_t tile, int64_t other, SharedArena& arena, float (&total)[16]) {
    SharedArray<T> shared = arena.take<T>(kStages * Layout::kStage);
    HeadWeights weight(args.head, args.query.size[1], arena.take<float>(kPairThreads));
    OperandReader<T> operands(args, b, tile, other, args.wide, shared);
    const Rows rows(operands.twice);
    float products[2][2][4];
    auto add = [&] {
#pragma unroll
      for (int e = 0; e < 16; ++e) total[e] = fmaf(weight.now, products[e / 8][e / 4 % 2][e % 4], total[e]);
      weight.turn();
    };
    walk_steps<kStages>(args, operands, [](int, bool) {},
                        [&](int stage, bool first, auto ask) { multiply(shared + stage * Layout::kStage, rows, first, products, ask); },
                        add);
  }
};

// Scores that are given, in the place of products.
struct MapScores {
  static constexpr bool kTensor = false;
  static int64_t shared_bytes() { return 0; }
  __device__ static void sum(const PairArgs& args, int64_t b, int64_t tile, int64_t other, SharedArena&, float (&total)[16]) {
    const TilePlace place(args.grid, tile), other_place(args.grid, other);
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int i = ResultPlace<false>::row(threadIdx.x, e), j = ResultPlace<false>::column(threadIdx.x, e);
      if (!place.inside(args.grid, i) || !other_place.inside(args.grid, j)) continue;
      const int64_t n = place.pixel(args.grid, i), m = other_place.pixel(args.grid, j);
      for (int64_t h = 0; h < args.query.size[1]; ++h) {
        const View<4>& maps = args.query;
        const float there = load_element(maps.data, maps.dtype, offset_of(maps, b, h, n) + m * maps.stride[3]);
        const float back = load_element(maps.data, maps.dtype, offset_of(maps, b, h, m) + n * maps.stride[3]);
        total[e] = fmaf(weight_of(args.head, h), there + back, total[e]);
      }
    }
  }
};

}  // namespace afa
