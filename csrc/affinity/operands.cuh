// The four operands of a pair of tiles on their way to shared memory: queries and keys of the tile, queries and keys of its neighbour.
//
// A step is 64 bytes of channels of one head, of 64 pixels each: 16 KB, a stage of a ring in which the next steps' arrive while one is
// multiplied. The 16-byte parts of a pixel are permuted, so that those of 8 pixels lie in banks of their own.
#pragma once

#include "affinity/affinity.cuh"
#include "common/async_copy.cuh"

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
  void* kept;            // [pairs met][64][64], the derivatives that it keeps; or null
  float4* shares;        // [pairs]: sums over same and different, counts as bits
  unsigned* counter;
  DeviceSlopes slopes;   // Goal::gradient
  PairBuffers buffers;
  int side;              // of the window as the tensor has it
};

// A stage in elements of T: [operand][pixel][part].
template <class T>
struct StageLayout {
  static constexpr int kVector = 16 / int(sizeof(T)), kParts = 4;
  static constexpr int kChannels = kParts * kVector, kOperand = kTilePixels * kChannels, kStage = 4 * kOperand;
  __device__ static __forceinline__ int at(int pixel, int part) { return pixel * kChannels + (part ^ (pixel / 2 % kParts)) * kVector; }
};

// What a thread brings: one part of one pixel of each operand.
template <class T>
struct OperandReader {
  typedef StageLayout<T> Layout;
  const PairArgs& args;
  const char* from[2];      // queries, keys: where the chunk that is asked for next begins
  int64_t image, pixels[2];
  int lines[4];             // the thread's part from there, in pieces of 16 bytes: `wide` says that they fit
  int part, chunks, steps, chunk = 0, head = 0;
  bool present[2], twice;   // twice: the neighbour is the tile itself, and its operands need no copies of their own
  SharedArray<T> to;

  __device__ OperandReader(const PairArgs& pairs, int64_t b, int64_t tile, int64_t other, bool share, SharedArray<T> shared)
      : args(pairs), image(b), part(threadIdx.x % 4) {
    const int pixel = threadIdx.x / 4;
    const TilePlace places[2] = {TilePlace(args.grid, tile), TilePlace(args.grid, other)};
    chunks = (int(args.query.size[3]) + Layout::kChannels - 1) / Layout::kChannels, steps = int(args.query.size[1]) * chunks;
    twice = share && tile == other;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const View<4>& view = k % 2 ? args.key : args.query;
      present[k / 2] = places[k / 2].inside(args.grid, pixel), pixels[k / 2] = places[k / 2].pixel(args.grid, pixel);
      lines[k] = present[k / 2] ? int(pixels[k / 2] * (view.stride[2] / Layout::kVector)) + part : 0;
      if (k < 2) from[k] = static_cast<const char*>(view.data) + b * view.stride[0] * int64_t(sizeof(T));
    }
    to = shared + Layout::at(pixel, part);
  }

  // The step after the last one that was asked for, rows in pieces of 16 bytes.
  __device__ __forceinline__ void ask(int stage) {
    const bool within = chunk * Layout::kChannels + part * Layout::kVector < int(args.query.size[3]);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < 2 || !twice)
        copy_async_16(to + (stage * Layout::kStage + k * Layout::kOperand), from[k % 2] + int64_t(lines[k]) * 16,
                      within && present[k / 2] ? 16 : 0);
    const bool last = ++chunk == chunks;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const View<4>& view = k ? args.key : args.query;
      from[k] += last ? view.stride[1] * int64_t(sizeof(T)) - (chunks - 1) * 16 * Layout::kParts : 16 * Layout::kParts;
    }
    if (last) chunk = 0;
  }

  // The same for any rows, element by element.
  __device__ __forceinline__ void bring() {
#pragma unroll 1
    for (int at = 0; at < 4 * Layout::kVector; ++at) {
      const int k = at / Layout::kVector, c = chunk * Layout::kChannels + part * Layout::kVector + at % Layout::kVector;
      const View<4>& view = k % 2 ? args.key : args.query;
      const int64_t line = offset_of(view, image, head, k < 2 ? pixels[0] : pixels[1]);
      to[k * Layout::kOperand + at % Layout::kVector] = load_narrow<T>(view, line, k < 2 ? present[0] : present[1], c);
    }
    if (++chunk == chunks) chunk = 0, ++head;
  }
};

// A head's weight, read while the head before it is multiplied.
struct HeadWeight {
  const DeviceHead& head;
  int count, next = 0;
  float now;
  __device__ HeadWeight(const DeviceHead& of, int64_t heads) : head(of), count(int(heads)) { turn(); }
  __device__ __forceinline__ void turn() {
    if (next < count) now = weight_of(head, next++);
  }
};

// Calls ready(stage) for what the thread itself has brought of a step, multiply(stage) for what all have, and done() after each head.
template <int kStages, class T, class Ready, class Multiply, class Done>
__device__ __forceinline__ void walk_steps(OperandReader<T>& operands, bool wide, Ready ready, Multiply multiply, Done done) {
  int chunk = 0;
  __syncthreads();
  if (!wide) {
#pragma unroll 1
    for (int step = 0; step < operands.steps; ++step) {
      operands.bring();
      ready(0);
      __syncthreads();
      multiply(0);
      if (++chunk == operands.chunks) chunk = 0, done();
      __syncthreads();
    }
    return;
  }
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < operands.steps) operands.ask(stage);
    commit_copies();
  }
  int stage = 0, free = kStages - 1;  // that of the last step, which all are done with at the barrier
#pragma unroll 1
  for (int step = 0; step < operands.steps; ++step) {
    wait_copies<kStages - 2>();
    ready(stage);
    __syncthreads();
    if (step + kStages - 1 < operands.steps) operands.ask(free);
    commit_copies();
    multiply(stage);
    if (++chunk == operands.chunks) chunk = 0, done();
    free = stage, stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  __syncthreads();
}

}  // namespace afa
