// G, the gradients of the scores, times keys and queries: what product_kernel (backward.cu) sums over a tile's neighbours, and how.
//
// An item is 64 channels of one head, of one side: keys, for the queries' gradient, or queries, for the keys'. A block has four, which
// share the G that is read: 64 x 64 of each neighbour. A step is the neighbour's pixels, or 16 of them in float32; the next one's G and
// values arrive in shared memory while one is multiplied.
#pragma once

#include "affinity/affinity.cuh"
#include "common/async_copy.cuh"

namespace afa {

constexpr int kItems = 4, kItemChannels = 64, kItemThreads = kPairThreads / kItems;

struct ProductArgs {
  PairGrid grid;
  PairBuffers buffers;
  View<4> query, key;
  View<4> grad_query, grad_key;
  bool wide_out[2];        // rows may be written 16 bytes at a time
  bool write[2];           // the queries' gradient, the keys'
  DeviceHead head;
  float* dots;             // [batch][tiles][heads][chunks]
  int chunks, sides;       // of kItemChannels in a head; 1 if the keys' gradient is not wanted
  int items;
};

struct Item {
  bool there, of_key;  // of_key: the keys' gradient
  int head, channel, share;
  __device__ Item(const ProductArgs& args, int number) {
    share = number / args.sides, of_key = number % args.sides != 0, there = number < args.items;
    head = there ? share / args.chunks : 0, channel = share % args.chunks * kItemChannels;
  }
};

// Where an item's values are: those of image b, at its first channel; `channels` is 0 if there is no such item.
struct ItemSource {
  const void* values;
  int channels, of_key;
  __device__ ItemSource(const ProductArgs& args, int64_t b, int number) {
    const Item item(args, number);
    const View<4>& view = item.of_key ? args.query : args.key;
    channels = item.there ? min(int(view.size[3]) - item.channel, kItemChannels) : 0, of_key = item.of_key;
    const int64_t at = b * view.stride[0] + item.head * view.stride[1] + item.channel * view.stride[3];
    values = static_cast<const char*>(view.data) + at * (view.dtype == DType::f32 ? 4 : 2);
  }
};

// ---- numbers ---------------------------------------------------------------------------------------------------------------

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

// ---- neighbours ------------------------------------------------------------------------------------------------------------

// The neighbours of a tile one after the other, those above and to the left, itself, those to the right and below.
struct Neighbours {
  const PairGrid& grid;
  int64_t b;
  int tile, tile_y, tile_x, first_x, last_x, last_y, y, x;
  __device__ Neighbours(const PairGrid& of, int64_t image, int number) : grid(of), b(image), tile(number) {
    tile_y = tile / grid.tiles_x, tile_x = tile % grid.tiles_x;
    first_x = max(tile_x - grid.reach, 0), last_x = min(tile_x + grid.reach, grid.tiles_x - 1);
    y = max(tile_y - grid.reach, 0), last_y = min(tile_y + grid.reach, grid.tiles_y - 1), x = first_x;
  }
  __device__ bool done() const { return y > last_y; }
  __device__ void turn() {
    if (++x > last_x) x = first_x, ++y;
  }
  // A neighbour above or to the left holds the pair, the other way round.
  __device__ bool mirrored() const { return y < tile_y || (y == tile_y && x < tile_x); }
  __device__ int64_t pair() const {
    const int place = (y - tile_y) * (2 * grid.reach + 1) + x - tile_x;
    return place < 0 ? grid.pair(b, int64_t(y) * grid.tiles_x + x, -place) : grid.pair(b, tile, place);
  }
};

// ---- values ----------------------------------------------------------------------------------------------------------------

// kRows pixels of the four items' channels, [item][pixel][channel] in parts of 16 bytes, to shared memory. A thread brings the same
// part of some pixels of each item.
template <class T, int kRows, bool kWide>
struct ValueReader {
  static constexpr int kVector = 16 / int(sizeof(T)), kParts = kItemChannels / kVector, kLines = kPairThreads / kParts;
  static constexpr int kOwn = kRows * kParts / kPairThreads, kItem = kRows * kItemChannels;
  // Half precision's parts are permuted, so that those of 8 pixels lie in banks of their own.
  __device__ static __forceinline__ int at(int line, int part) {
    return line * kItemChannels + (sizeof(T) == 2 ? part ^ line % kParts : part) * kVector;
  }

  const ProductArgs& args;
  SharedArray<ItemSource> items;
  __device__ ValueReader(const ProductArgs& product, SharedArray<ItemSource> sources) : args(product), items(sources) {}

  // The pixel of the neighbour on that line.
  __device__ __forceinline__ bool place(const Neighbours& of, int first_pixel, int line, int64_t* pixel) const {
    const int own = first_pixel + line;
    const int row = of.y * kTileSide + own / kTileSide, column = of.x * kTileSide + own % kTileSide;
    *pixel = int64_t(row) * args.grid.width + column;
    return row < args.grid.height && column < args.grid.width;
  }
  __device__ __forceinline__ void ask(const Neighbours& of, int first_pixel, SharedArray<T> to) const {
    if constexpr (!kWide) bring(of, first_pixel, to);
    const int thread = computed_here(int(threadIdx.x)), first = thread / kParts, part = thread % kParts;
#pragma unroll
    for (int k = 0; k < (kWide ? kOwn : 0); ++k) {
      const int line = first + k * kLines;
      int64_t pixel;
      const bool present = place(of, first_pixel, line, &pixel);
      const int64_t key = pixel * args.key.stride[2] + part * kVector, query = pixel * args.query.stride[2] + part * kVector;
#pragma unroll(sizeof(T) == 2 ? kItems : 1)
      for (int i = 0; i < kItems; ++i) {
        const ItemSource& item = items[i];
        const T* from = static_cast<const T*>(item.values) + (item.of_key ? query : key);
        copy_async_16(to + (i * kItem + at(line, part)), from, present && part * kVector < item.channels ? 16 : 0);
      }
    }
  }
  // The same for any rows, element by element.
  __device__ __forceinline__ void bring(const Neighbours& of, int first_pixel, SharedArray<T> to) const {
    const int thread = computed_here(int(threadIdx.x)), first = thread / kParts, part = thread % kParts;
#pragma unroll 1
    for (int number = 0; number < kOwn * kItems * kVector; ++number) {
      const int line = first + number / (kItems * kVector) * kLines, i = number / kVector % kItems, c = number % kVector;
      int64_t pixel;
      const bool present = place(of, first_pixel, line, &pixel);
      const ItemSource& item = items[i];
      const View<4>& view = item.of_key ? args.query : args.key;
      T value;
      memset(&value, 0, sizeof value);
      if (present && part * kVector + c < item.channels) {
        const int64_t from = pixel * view.stride[2] + (part * kVector + c) * view.stride[3];
        if constexpr (std::is_same<T, float>::value)
          value = load_element(item.values, view.dtype, from);
        else
          value = static_cast<const T*>(item.values)[from];
      }
      to[i * kItem + at(line, part) + c] = value;
    }
  }

  // What the thread itself has brought, without what is no finite number.
  __device__ __forceinline__ void clean(SharedArray<T> to) const {
    const int thread = computed_here(int(threadIdx.x)), first = thread / kParts, part = thread % kParts;
#pragma unroll 1
    for (int i = 0; i < kItems * kOwn; ++i) {
      uint4* own = reinterpret_cast<uint4*>(&to[i / kOwn * kItem + at(first + i % kOwn * kLines, part)]);
      *own = finite_or_zero<T>(*own);
    }
  }
};

// ---- sums ------------------------------------------------------------------------------------------------------------------

template <class T, bool kTensor, bool kWide>
struct Product;

// Without tensor cores, in float32. A stage has G as [pixel of the neighbour][pixel of the tile] and the values; a thread has 8 x 8
// sums, rows and channels 4 in one piece.
template <bool kWide>
struct Product<float, false, kWide> {
  static constexpr int kRows = 16, kPitch = kTilePixels + 4, kG = kRows * kPitch, kValues = kItems * kRows * kItemChannels;
  static constexpr int kStage = kG + kValues, kStages = 2, kSums = 64;
  typedef ValueReader<float, kRows, kWide> Reader;

  __device__ static int row(unsigned thread, int e) { return e / 32 * 32 + ResultPlace<false>::own_row(thread) * 4 + e / 8 % 4; }
  __device__ static int column(unsigned thread, int e) { return e / 4 % 2 * 32 + ResultPlace<false>::own_column(thread) * 4 + e % 4; }

  static __device__ __forceinline__ float4 load_pair(const ProductArgs& args, const Neighbours& of, int first) {
    const float* pairs = static_cast<const float*>(args.buffers.values) + of.pair() * kPairScores;
    const int thread = computed_here(int(threadIdx.x));
    const int at = of.mirrored() ? (first + thread / 16) * kTilePixels + thread % 16 * 4 : thread / 4 * kTilePixels + first + thread % 4 * 4;
    return __ldcg(reinterpret_cast<const float4*>(pairs + at));
  }
  static __device__ __forceinline__ void keep_pair(float4 four, bool mirrored, SharedArray<float> to) {
    const int thread = computed_here(int(threadIdx.x));
    if (mirrored) {
      *reinterpret_cast<float4*>(&to[thread / 16 * kPitch + thread % 16 * 4]) = four;
    } else {
      const SharedArray<float> own = to + (thread % 4 * 4 * kPitch + thread / 4);
      own[0] = four.x, own[kPitch] = four.y, own[2 * kPitch] = four.z, own[3 * kPitch] = four.w;
    }
  }

  static __device__ __forceinline__ void multiply(SharedArray<float> stage, float (&sums)[kSums]) {
    const unsigned thread = unsigned(computed_here(int(threadIdx.x)));
    const int left = 4 * ResultPlace<false>::own_row(thread), right = 4 * ResultPlace<false>::own_column(thread);
    const SharedArray<float> values = stage + (kG + int(thread) / kItemThreads * kRows * kItemChannels);
#pragma unroll 2
    for (int j = 0; j < kRows; ++j) {
      float l[8], r[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 a = *reinterpret_cast<const float4*>(&stage[j * kPitch + 32 * half + left]);
        const float4 b = *reinterpret_cast<const float4*>(&values[j * kItemChannels + 32 * half + right]);
        l[4 * half] = a.x, l[4 * half + 1] = a.y, l[4 * half + 2] = a.z, l[4 * half + 3] = a.w;
        r[4 * half] = b.x, r[4 * half + 1] = b.y, r[4 * half + 2] = b.z, r[4 * half + 3] = b.w;
      }
#pragma unroll
      for (int e = 0; e < kSums; ++e) sums[e] = fmaf(l[e / 8], r[e % 8], sums[e]);
    }
  }

  static __device__ __forceinline__ float sum(const ProductArgs& args, int64_t b, int tile, SharedArray<ItemSource> items, bool clean,
                                              SharedArray<float> shared, float (&sums)[kSums]) {
    const Reader values(args, items);
    Neighbours ahead(args.grid, b, tile);
    int ahead_row = 0;
    auto turn = [&] {
      ahead_row += kRows;
      if (ahead_row == kTilePixels) ahead_row = 0, ahead.turn();
    };
    __syncthreads();
    values.ask(ahead, 0, shared + kG);
    commit_copies();
    keep_pair(load_pair(args, ahead, 0), ahead.mirrored(), shared);
    turn();
    for (int stage = 0;; stage ^= 1) {
      const SharedArray<float> now = shared + stage * kStage, next = shared + (1 - stage) * kStage;
      wait_copies<0>();
      if (clean) values.clean(now + kG);
      __syncthreads();
      const bool more = !ahead.done(), mirrored = ahead.mirrored();
      float4 four = make_float4(0, 0, 0, 0);
      if (more) {
        values.ask(ahead, ahead_row, next + kG);
        four = load_pair(args, ahead, ahead_row);
      }
      commit_copies();
      multiply(now, sums);
      if (!more) break;
      keep_pair(four, mirrored, next);
      turn();
    }
    return 1;
  }
};

// With tensor cores. A stage has G as it lies in memory and the values; a warp has 32 x 64 sums, fragments of 16 x 8.
template <class T, bool kWide>
struct Product<T, true, kWide> {
  static constexpr int kG = kPairScores, kValues = kItems * kPairScores, kStage = kG + kValues, kStages = 2, kSums = 64;
  typedef ValueReader<T, kTilePixels, kWide> Reader;

  __device__ static int row(unsigned thread, int e) { return thread / 32 % 2 * 32 + e / 32 * 16 + thread % 32 / 4 + e % 4 / 2 * 8; }
  __device__ static int column(unsigned thread, int e) { return e / 4 % 8 * 8 + 2 * (thread % 4) + e % 2; }

  static __device__ __forceinline__ void ask_pair(const ProductArgs& args, const Neighbours& of, SharedArray<T> to) {
    const T* pairs = static_cast<const T*>(args.buffers.values) + of.pair() * kPairScores;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int line = threadIdx.x / 8 + k * 32, part = threadIdx.x % 8;
      copy_async_16(to + Reader::at(line, part), pairs + line * kTilePixels + part * 8, 16);
    }
  }

  static __device__ __forceinline__ void multiply(SharedArray<T> stage, bool mirrored, float (&sums)[2][8][4]) {
    const int warp = threadIdx.x / 32, row = warp % 2 * 32;
    const SharedArray<T> values = stage + (kG + warp / 2 * kPairScores);
#pragma unroll
    for (int j = 0; j < kTilePixels; j += 16) {
      unsigned left[2][4], right[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (mirrored)
          load_matrices<true>(left[i], [&](int m, int r) { return &stage[Reader::at(j + m / 2 * 8 + r, (row + i * 16) / 8 + m % 2)]; });
        else
          load_matrices<false>(left[i], [&](int m, int r) { return &stage[Reader::at(row + i * 16 + m % 2 * 8 + r, j / 8 + m / 2)]; });
      }
#pragma unroll
      for (int c = 0; c < 8; c += 2) {
        load_matrices<true>(right, [&](int m, int r) { return &values[Reader::at(j + m % 2 * 8 + r, c + m / 2)]; });
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply_fragments<T>(sums[i][c], left[i], right), multiply_fragments<T>(sums[i][c + 1], left[i], right + 2);
      }
    }
  }

  // Returns the unit of the sums.
  static __device__ __forceinline__ float sum(const ProductArgs& args, int64_t b, int tile, SharedArray<ItemSource> items, bool clean, SharedArray<T> shared,
                                              float (&total)[kSums]) {
    constexpr bool kScaled = std::is_same<T, __half>::value;
    const Reader values(args, items);
    Neighbours ahead(args.grid, b, tile);
    float sums[2][8][4] = {}, unit = 1;
    auto ask = [&](SharedArray<T> to) {
      ask_pair(args, ahead, to);
      values.ask(ahead, 0, to + kG);
    };
    __syncthreads();
    ask(shared);
    commit_copies();
    for (int stage = 0;; stage ^= 1) {
      const SharedArray<T> now = shared + stage * kStage;
      const bool mirrored = ahead.mirrored();
      const float scale = kScaled ? args.buffers.scale[ahead.pair()] : 1.0f;
      wait_copies<0>();
      if (clean) values.clean(now + kG);
      __syncthreads();
      ahead.turn();
      const bool more = !ahead.done();
      if (more) ask(shared + (1 - stage) * kStage);
      commit_copies();
      if (kScaled && scale != unit) {  // powers of two: nothing is rounded
        const float ratio = unit / scale;
#pragma unroll
        for (int e = 0; e < kSums; ++e) sums[e / 32][e / 4 % 8][e % 4] *= ratio;
        unit = scale;
      }
      multiply(now, mirrored, sums);
      if (!more) break;
    }
#pragma unroll
    for (int e = 0; e < kSums; ++e) total[e] = sums[e / 32][e / 4 % 8][e % 4];
    return unit;
  }
};

}  // namespace afa
