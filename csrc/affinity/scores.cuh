// The scores of one pair of tiles, both orders at once, over all heads: what pair_kernel (affinity.cu) sums up and how.
//
// A chunk of channels of the four operands is in shared memory while the next is on its way to registers; a thread ends up with 16 of
// the pair's scores, placed by ResultPlace (affinity.cuh).
#pragma once

#include "affinity/affinity.cuh"

namespace afa {

enum class Goal : int { window, loss, gradient, window_gradient };

struct PairArgs {
  PairGrid grid;
  View<4> query, key;    // or maps in query
  bool tensor;           // half precision goes through tensor cores
  bool wide;             // rows of query and key may be read 16 bytes at a time
  DeviceHead head;
  DeviceLabels labels;
  View<4> window;        // Goal::window; its gradient for Goal::window_gradient
  PairResults results;   // Goal::loss
  float4* shares;        // [pairs]: sums over same and different, counts as bits
  unsigned* counter;
  DeviceSlopes slopes;   // Goal::gradient
  PairBuffers buffers;
  int side;              // of the window as the tensor has it
};

// ---- scores --------------------------------------------------------------------------------------------------------------

// What a thread brings of the four operands: queries and keys of the tile, queries and keys of its neighbour. A step is one chunk of
// kChannels channels of one head; four threads share those of a pixel.
template <int kChannels>
struct OperandReader {
  const PairArgs& args;
  int64_t b;
  int pixel, channel;  // of the tile and its neighbour; the first of the thread's in a chunk
  int chunks, steps;
  bool wide;  // beside args, as a flag in a register: it is asked for in every step
  bool present, other_present;
  int64_t n, other_n;
  uint4 ahead[4];

  __device__ OperandReader(const PairArgs& pairs, int64_t image, int64_t tile, int64_t other)
      : args(pairs), b(image), pixel(threadIdx.x / 4), channel(threadIdx.x % 4 * (kChannels / 4)) {
    const TilePlace place(args.grid, tile), other_place(args.grid, other);
    chunks = (int(args.query.size[3]) + kChannels - 1) / kChannels, steps = int(args.query.size[1]) * chunks;
    wide = args.wide;
    present = place.inside(args.grid, pixel), other_present = other_place.inside(args.grid, pixel);
    n = place.pixel(args.grid, pixel), other_n = other_place.pixel(args.grid, pixel);
  }
  // On their way to registers, if rows may be read 16 bytes at a time.
  __device__ __forceinline__ void fetch(int step) {
    const int64_t h = step / chunks;
    const int first = step % chunks * kChannels + channel;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const View<4>& view = k % 2 ? args.key : args.query;
      if (wide) ahead[k] = load_wide(view, offset_of(view, b, h, k < 2 ? n : other_n), k < 2 ? present : other_present, first);
    }
  }
  // If not: channel i of the thread's, of operand k.
  template <class T>
  __device__ __forceinline__ T read(int step, int k, int i) const {
    const View<4>& view = k % 2 ? args.key : args.query;
    const int64_t line = offset_of(view, b, step / chunks, k < 2 ? n : other_n);
    return load_narrow<T>(view, line, k < 2 ? present : other_present, step % chunks * kChannels + channel + i);
  }
};

// Scores in float32 by fused multiply-adds, operands of any type. Channels are multiplied by their head's weight on the way in.
struct SimtScores {
  static constexpr bool kTensor = false;
  static constexpr int kChannels = 16, kPitch = kTilePixels + 4;  // shared, twice: [operand][channel][pixel]
  static constexpr int kBuffer = 4 * kChannels * kPitch;
  static int64_t shared_bytes() { return SharedArena::bytes<float>(2 * kBuffer); }

  __device__ static __forceinline__ void keep(const OperandReader<kChannels>& from, int step, SharedArray<float> shared) {
    const float weight = weight_of(from.args.head, step / from.chunks);
    const SharedArray<float> to = shared + (step % 2 * kBuffer + from.channel * kPitch + from.pixel);
    if (from.wide) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float scale = k % 2 ? 1.0f : weight;
        to[k * kChannels * kPitch] = __uint_as_float(from.ahead[k].x) * scale;
        to[(k * kChannels + 1) * kPitch] = __uint_as_float(from.ahead[k].y) * scale;
        to[(k * kChannels + 2) * kPitch] = __uint_as_float(from.ahead[k].z) * scale;
        to[(k * kChannels + 3) * kPitch] = __uint_as_float(from.ahead[k].w) * scale;
      }
    } else {
#pragma unroll 1
      for (int at = 0; at < 16; ++at) {
        const int k = at / 4;
        to[(k * kChannels + at % 4) * kPitch] = from.read<float>(step, k, at % 4) * (k % 2 ? 1.0f : weight);
      }
    }
    __syncthreads();
  }

  // One chunk's products, q_i k_j and k_i q_j, of the thread's 4 x 4 pairs.
  __device__ static __forceinline__ void multiply(SharedArray<float> shared, int buffer, float (&total)[16]) {
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll 4
    for (int c = 0; c < kChannels; ++c) {
      auto four = [&](int k, int at) { return *reinterpret_cast<const float4*>(&shared[buffer + (k * kChannels + c) * kPitch + at]); };
#pragma unroll
      for (int order = 0; order < 2; ++order) add_outer(four(order, row), four(3 - order, column), total);
    }
  }

  __device__ static void sum(const PairArgs& args, int64_t b, int64_t tile, int64_t other, SharedArena& arena, float (&total)[16]) {
    SharedArray<float> shared = arena.take<float>(2 * kBuffer);
    OperandReader<kChannels> operands(args, b, tile, other);
    __syncthreads();
    operands.fetch(0);
    keep(operands, 0, shared);
    for (int step = 0; step < operands.steps; ++step) {
      if (step + 1 < operands.steps) operands.fetch(step + 1);
      multiply(shared, step % 2 * kBuffer, total);
      if (step + 1 < operands.steps) keep(operands, step + 1, shared);
    }
    __syncthreads();
  }
};

// Scores by tensor cores, for operands that are both of type T.
template <class T>
struct TensorScores {
  static constexpr bool kTensor = true;
  static constexpr int kChannels = 32, kPitch = kChannels + 8;  // shared, twice: [operand][pixel][channel]
  static constexpr int kBuffer = 4 * kTilePixels * kPitch;
  static int64_t shared_bytes() { return SharedArena::bytes<T>(2 * kBuffer); }

  __device__ static __forceinline__ void keep(const OperandReader<kChannels>& from, int step, SharedArray<T> shared) {
    const SharedArray<T> to = shared + (step % 2 * kBuffer + from.pixel * kPitch + from.channel);
    if (from.wide) {
#pragma unroll
      for (int k = 0; k < 4; ++k) *reinterpret_cast<uint4*>(&to[k * kTilePixels * kPitch]) = from.ahead[k];
    } else {
#pragma unroll 1
      for (int at = 0; at < 32; ++at) to[at / 8 * kTilePixels * kPitch + at % 8] = from.template read<T>(step, at / 8, at % 8);
    }
    __syncthreads();
  }

  // One chunk's products, q_i k_j and k_i q_j, of the warp's 16 x 32 pairs.
  __device__ static __forceinline__ void multiply(SharedArray<T> shared, int buffer, float (&sums)[4][4]) {
    const int warp = threadIdx.x / 32, row = warp % 4 * 16, column = warp / 4 * 32;
#pragma unroll
    for (int c = 0; c < kChannels; c += 16)
#pragma unroll
      for (int order = 0; order < 2; ++order) {
        unsigned left[4], right[4];
        load_matrices<false>(left, [&](int m, int r) {
          return &shared[buffer + (order * kTilePixels + row + m % 2 * 8 + r) * kPitch + c + m / 2 * 8];
        });
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_matrices<false>(right, [&](int m, int r) {
            return &shared[buffer + ((3 - order) * kTilePixels + column + half * 16 + m / 2 * 8 + r) * kPitch + c + m % 2 * 8];
          });
          multiply_fragments<T>(sums[2 * half], left, right);
          multiply_fragments<T>(sums[2 * half + 1], left, right + 2);
        }
      }
  }

  __device__ static void sum(const PairArgs& args, int64_t b, int64_t tile, int64_t other, SharedArena& arena, float (&total)[16]) {
    SharedArray<T> shared = arena.take<T>(2 * kBuffer);
    OperandReader<kChannels> operands(args, b, tile, other);
    __syncthreads();
    operands.fetch(0);
    keep(operands, 0, shared);
    float sums[4][4] = {};
    for (int step = 0; step < operands.steps; ++step) {
      if (step + 1 < operands.steps) operands.fetch(step + 1);
      multiply(shared, step % 2 * kBuffer, sums);
      if ((step + 1) % operands.chunks == 0) {
        const float weight = weight_of(args.head, step / operands.chunks);
#pragma unroll
        for (int e = 0; e < 16; ++e) total[e] = fmaf(weight, sums[e / 4][e % 4], total[e]), sums[e / 4][e % 4] = 0.0f;
      }
      if (step + 1 < operands.steps) keep(operands, step + 1, shared);
    }
    __syncthreads();
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
      const int i = ResultPlace<false>::row(e), j = ResultPlace<false>::column(e);
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
