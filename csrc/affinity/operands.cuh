// The four operands of a pair of tiles on their way to shared memory: queries and keys of the tile, queries and keys of its neighbour.
//
// A step is 128 bytes of channels of one head in half precision and 64 in float32, of 64 pixels each: 32 or 16 KB, a stage of a ring in
// which the next steps' arrive while one is multiplied. The 16-byte parts of a pixel are permuted, so that those of 8 pixels lie in
// banks of their own.
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
  int64_t next_head[2];  // bytes from the last chunk of a head to the first of the next
  int chunks, steps;     // of a head's channels, of all heads
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
  static constexpr int kVector = 16 / int(sizeof(T)), kParts = sizeof(T) == 2 ? 8 : 4;
  static constexpr int kChannels = kParts * kVector, kOperand = kTilePixels * kChannels, kStage = 4 * kOperand;
  // Half precision: bits 3..5 of an element's place are its part, changed by the pixel alone, so that parts p and p ^ q of a pixel lie
  // 8 q apart by exclusive or.
  __device__ static __forceinline__ int at(int pixel, int part) {
    return pixel * kChannels + (part ^ int(unsigned(pixel) / (sizeof(T) == 2 ? 1 : 2) % kParts)) * kVector;
  }
};

// What a thread brings: one part of some pixels of each operand.
template <class T>
struct OperandReader {
  typedef StageLayout<T> Layout;
  static constexpr int kOwn = kTilePixels * Layout::kParts / kPairThreads, kLines = kPairThreads / Layout::kParts;
  const PairArgs& args;
  const char* from[2];      // queries, keys: where the chunk that is asked for next begins
  int lines[4][kOwn];       // the thread's part from there, in pieces of 16 bytes: `wide` says that they fit
  int image, tiles[2];
  int part, chunk = 0, head = 0;
  bool present[2][kOwn], twice;  // twice: the neighbour is the tile itself, whose operands are there already; zeros in their place
  SharedArray<T> to;

  __device__ OperandReader(const PairArgs& pairs, int64_t b, int64_t tile, int64_t other, bool share, SharedArray<T> shared)
      : args(pairs), image(int(b)), tiles{int(tile), int(other)}, part(threadIdx.x % Layout::kParts) {
    const int pixel = threadIdx.x / Layout::kParts;
    twice = share && tile == other;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const View<4>& view = k % 2 ? args.key : args.query;
      const TilePlace place(args.grid, tiles[k / 2]);
#pragma unroll
      for (int p = 0; p < kOwn; ++p) {
        const int own = pixel + p * kLines;
        present[k / 2][p] = place.inside(args.grid, own) && !(k >= 2 && twice);
        lines[k][p] = present[k / 2][p] ? int(place.pixel(args.grid, own) * (view.stride[2] / Layout::kVector)) + part : 0;
      }
      if (k < 2) from[k] = static_cast<const char*>(view.data) + b * view.stride[0] * int64_t(sizeof(T));
    }
    to = shared + Layout::at(pixel, part);
  }

  // Operand k, 0 to 3 in order, of the step after the last one that was asked for, rows in pieces of 16 bytes; zeros where there is no
  // step `more`.
  __device__ __forceinline__ void ask(int stage, int k, bool more) {
    const bool within = more && chunk * Layout::kChannels + part * Layout::kVector < int(args.query.size[3]);
#pragma unroll
    for (int p = 0; p < kOwn; ++p)
      copy_async_16(to + (stage * Layout::kStage + k * Layout::kOperand + p * kLines * Layout::kChannels),
                    from[k % 2] + int64_t(lines[k][p]) * 16, within && present[k / 2][p] ? 16 : 0);
    if (k < 3) return;
    const bool last = ++chunk == args.chunks;
    from[0] += last ? args.next_head[0] : 16 * Layout::kParts, from[1] += last ? args.next_head[1] : 16 * Layout::kParts;
    if (last) chunk = 0;
    commit_copies();
  }

  // The same for any rows, element by element.
  __device__ __forceinline__ void bring() {
#pragma unroll 1
    for (int at = 0; at < 4 * kOwn * Layout::kVector; ++at) {
      const int k = at / (kOwn * Layout::kVector), p = at / Layout::kVector % kOwn;
      const int c = chunk * Layout::kChannels + part * Layout::kVector + at % Layout::kVector;
      const int own = int(threadIdx.x) / Layout::kParts + p * kLines;
      const TilePlace place(args.grid, k < 2 ? tiles[0] : tiles[1]);
      const View<4>& view = k % 2 ? args.key : args.query;
      const bool there = place.inside(args.grid, own);
      const int64_t line = there ? offset_of(view, image, head, place.pixel(args.grid, own)) : 0;
      to[k * Layout::kOperand + p * kLines * Layout::kChannels + at % Layout::kVector] = load_narrow<T>(view, line, there, c);
    }
    if (++chunk == args.chunks) chunk = 0, ++head;
  }
};

// What readers of T count with.
template <class T>
void count_steps(PairArgs* args) {
  typedef StageLayout<T> Layout;
  args->chunks = int(blocks_for(args->query.size[3], Layout::kChannels)), args->steps = int(args->query.size[1]) * args->chunks;
  for (int k = 0; k < 2; ++k) {
    const View<4>& view = k ? args->key : args->query;
    args->next_head[k] = view.stride[1] * int64_t(sizeof(T)) - (args->chunks - 1) * 16 * Layout::kParts;
  }
}

// The heads' weights, one after the other: in shared memory, as many at a time as there are threads. All threads turn together.
struct HeadWeights {
  const DeviceHead& head;
  SharedArray<float> held;
  int count;
  unsigned next = 0;
  float now = 0;
  __device__ HeadWeights(const DeviceHead& of, int64_t heads, SharedArray<float> shared) : head(of), held(shared), count(int(heads)) {
    turn();
  }
  __device__ __forceinline__ void turn() {
    if (next % kPairThreads == 0) {
      __syncthreads();
      const int own = int(next + threadIdx.x);
      if (own < count) held[threadIdx.x] = weight_of(head, own);
      __syncthreads();
    }
    now = held[next++ % kPairThreads];
  }
};

// Calls ready(stage, last) for what the thread itself has brought of a step, the last one of a head or not; multiply(stage, first, ask) for
// what all have, the first of a head or not, which calls ask(k) for each operand of a later step; and done() after each head.
template <int kStages, class T, class Ready, class Multiply, class Done>
__device__ __forceinline__ void walk_steps(const PairArgs& args, OperandReader<T>& operands, Ready ready, Multiply multiply, Done done) {
  int chunk = 0;
  __syncthreads();
  if (!args.wide) {
#pragma unroll 1
    for (int step = 0; step < args.steps; ++step) {
      operands.bring();
      ready(0, chunk + 1 == args.chunks);
      __syncthreads();
      multiply(0, chunk == 0, [](int) {});
      if (++chunk == args.chunks) chunk = 0, done();
      __syncthreads();
    }
    return;
  }
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
#pragma unroll
    for (int k = 0; k < 4; ++k) operands.ask(stage, k, stage < args.steps);
  }
  int stage = 0, free = kStages - 1;  // that of the last step, which all are done with at the barrier
#pragma unroll 1
  for (int step = 0; step < args.steps; ++step) {
    wait_copies<kStages - 2>();
    ready(stage, chunk + 1 == args.chunks);
    __syncthreads();
    const bool more = step + kStages - 1 < args.steps;
    multiply(stage, chunk == 0, [&](int k) { operands.ask(free, k, more); });
    if (++chunk == args.chunks) chunk = 0, done();
    free = stage, stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace afa
