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
  int pieces[2];           // from a pixel's keys to the next one's, and its queries, in pieces of 16 bytes
  bool wide_out[2];        // rows may be written 16 bytes at a time
  bool write[2];           // the queries' gradient, the keys'
  DeviceHead head;
  float* dots;             // [batch][tiles][heads][chunks]
  int chunks, sides;       // of kItemChannels in a head; 1 if the keys' gradient is not wanted
  int items, shares;       // shares: those of one side
  unsigned groups;         // of kItems
};

// Tiles in the order in which blocks take them. Those in the middle have most neighbours, and what takes longest is not to begin last: from
// the middle outwards in a batch's last image, and the other way round in every second one before it, so that a multiprocessor that is
// given blocks of two images has long ones and short ones.
__device__ inline int middle_out(unsigned rank, unsigned count) {
  return int(rank % 2 != 0 ? count / 2 - (rank + 1) / 2 : count / 2 + rank / 2);
}
__device__ inline int tile_in_turn(const PairGrid& grid, int64_t b, int rank) {
  if ((grid.batch - 1 - b) % 2 != 0) rank = int(grid.tiles()) - 1 - rank;
  return middle_out(rank / grid.tiles_x, grid.tiles_y) * grid.tiles_x + middle_out(rank % grid.tiles_x, grid.tiles_x);
}

struct Item {
  bool there, of_key;  // of_key: the keys' gradient
  int head, channel, share;
  __device__ Item(const ProductArgs& args, int number) {
    share = args.sides == 2 ? number / 2 : number, of_key = args.sides == 2 && number % 2 != 0, there = number < args.items;
    head = there ? share / args.chunks : 0, channel = share % args.chunks * kItemChannels;
  }
};

// What the block needs of an item: where its values are, those of image b at its first channel; `channels` is 0 if there is no such item.
struct ItemSource {
  const void* values;
  int channels, of_key;
  Item item;
  __device__ ItemSource(const ProductArgs& args, int64_t b, int number) : item(args, number) {
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

// The neighbours of a tile one after the other, those above and to the left, itself, those to the right and below: at (dy, dx) from it.
struct Neighbours {
  const PairGrid& grid;
  int tile_y, tile_x, dy, dx;
  __device__ Neighbours(const PairGrid& of, int tile) : grid(of), tile_y(tile / grid.tiles_x), tile_x(tile % grid.tiles_x) {
    dy = -min(grid.reach, tile_y), dx = -min(grid.reach, tile_x);
  }
  __device__ bool done() const { return dy > min(grid.reach, grid.tiles_y - 1 - tile_y); }
  __device__ void turn() {
    if (++dx > min(grid.reach, grid.tiles_x - 1 - tile_x)) dx = -min(grid.reach, tile_x), ++dy;
  }
  // The first pixel's row and column.
  __device__ int first_row() const { return (tile_y + dy) * kTileSide; }
  __device__ int first_column() const { return (tile_x + dx) * kTileSide; }
  __device__ int place() const { return dy * (2 * grid.reach + 1) + dx; }
  // A neighbour above or to the left holds the pair, the other way round.
  __device__ bool mirrored() const { return place() < 0; }
  // Among those of the image.
  __device__ int pair() const {
    const int holder = place() < 0 ? (tile_y + dy) * grid.tiles_x + tile_x + dx : tile_y * grid.tiles_x + tile_x;
    return holder * grid.neighbours + abs(place());
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
  static_assert(kLines % 8 == 0 && kOwn <= 2, "all lines of a thread are permuted alike");
  __device__ static __forceinline__ int at(int line, int part) {
    return line * kItemChannels + (sizeof(T) == 2 ? part ^ int(unsigned(line) % kParts) : part) * kVector;
  }

  const ProductArgs& args;
  SharedArray<ItemSource> items;
  int own, part;  // the thread's first place in an item, and its part of each line
  __device__ ValueReader(const ProductArgs& product, SharedArray<ItemSource> sources) : args(product), items(sources) {
    const unsigned thread = unsigned(computed_here(int(threadIdx.x)));
    part = int(thread % kParts), own = at(int(thread / kParts), part);
  }

  // The pixel on a line, counted from one of the neighbour's; -1 if it is outside the image.
  __device__ __forceinline__ int pixel_on(const Neighbours& of, unsigned line) const {
    const int row = of.first_row() + int(line / kTileSide), column = of.first_column() + int(line % kTileSide);
    return row < args.grid.height && column < args.grid.width ? row * args.grid.width + column : -1;
  }
  struct Pixels {
    int of[kOwn];
  };
  // Those that the thread brings next.
  __device__ __forceinline__ Pixels pixels(const Neighbours& of, int first_pixel) const {
    Pixels pixels;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) pixels.of[k] = pixel_on(of, unsigned(first_pixel) + unsigned(own) / kItemChannels + k * kLines);
    return pixels;
  }
  // Their channels of item i; of all items with the first, if rows cannot be read 16 bytes at a time.
  __device__ __forceinline__ void ask(int i, const Pixels& pixels, SharedArray<T> to) const {
    if constexpr (!kWide) {
      if (i == 0) bring(pixels, to);
    } else {
      const ItemSource& item = items[i];
      const char* values = static_cast<const char*>(item.values);
      const int pieces = item.of_key ? args.pieces[1] : args.pieces[0];
      const bool within = part * kVector < item.channels;
#pragma unroll
      for (int k = 0; k < kOwn; ++k)
        copy_async_16(to + (own + i * kItem + k * kLines * kItemChannels), values + int64_t(max(pixels.of[k], 0) * pieces + part) * 16,
                      within && pixels.of[k] >= 0 ? 16 : 0);
    }
  }
  // The same for any rows, element by element.
  __device__ __forceinline__ void bring(const Pixels& pixels, SharedArray<T> to) const {
    const unsigned thread = unsigned(computed_here(int(threadIdx.x)));
    const int part = int(thread % kParts), own = at(int(thread / kParts), part);
#pragma unroll 1
    for (int number = 0; number < kOwn * kItems * kVector; ++number) {
      const int k = number / (kItems * kVector), i = number / kVector % kItems, c = number % kVector;
      const int pixel = k == 0 ? pixels.of[0] : pixels.of[kOwn - 1];
      const ItemSource& item = items[i];
      const View<4>& view = item.of_key ? args.query : args.key;
      T value;
      memset(&value, 0, sizeof value);
      if (pixel >= 0 && part * kVector + c < item.channels) {
        const int64_t from = pixel * view.stride[2] + (part * kVector + c) * view.stride[3];
        if constexpr (std::is_same<T, float>::value)
          value = load_element(item.values, view.dtype, from);
        else
          value = static_cast<const T*>(item.values)[from];
      }
      to[own + i * kItem + k * kLines * kItemChannels + c] = value;
    }
  }

  // What the thread itself has brought, without what is no finite number.
  __device__ __forceinline__ void clean(SharedArray<T> to) const {
#pragma unroll 1
    for (int i = 0; i < kItems * kOwn; ++i) {
      uint4* piece = reinterpret_cast<uint4*>(&to[own + i / kOwn * kItem + i % kOwn * kLines * kItemChannels]);
      *piece = finite_or_zero<T>(*piece);
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

  static __device__ __forceinline__ float4 load_pair(const float* image, const Neighbours& of, int first) {
    const float* pairs = image + int64_t(of.pair()) * kPairScores;
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
    const float* image = static_cast<const float*>(args.buffers.values) + args.grid.pair(b, 0, 0) * kPairScores;
    Neighbours ahead(args.grid, computed_here(tile));
    int ahead_row = 0;
    auto turn = [&] {
      ahead_row += kRows;
      if (ahead_row == kTilePixels) ahead_row = 0, ahead.turn();
    };
    auto ask = [&](SharedArray<float> to) {
      const typename Reader::Pixels pixels = values.pixels(ahead, ahead_row);
#pragma unroll 1
      for (int i = 0; i < kItems; ++i) values.ask(i, pixels, to);
    };
    __syncthreads();
    ask(shared + kG);
    commit_copies();
    keep_pair(load_pair(image, ahead, 0), ahead.mirrored(), shared);
    turn();
    for (int stage = 0;; stage ^= 1) {
      const SharedArray<float> now = shared + stage * kStage, next = shared + (1 - stage) * kStage;
      wait_copies<0>();
      if (clean) values.clean(now + kG);
      __syncthreads();
      const bool more = !ahead.done(), mirrored = ahead.mirrored();
      float4 four = make_float4(0, 0, 0, 0);
      if (more) {
        ask(next + kG);
        four = load_pair(image, ahead, ahead_row);
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
  static_assert(kItems % 2 == 0 && 2 * kTilePixels / 16 >= kItems, "two items are asked for with 16 pixels");
  typedef ValueReader<T, kTilePixels, kWide> Reader;

  __device__ static int row(unsigned thread, int e) { return thread / 32 % 2 * 32 + e / 32 * 16 + thread % 32 / 4 + e % 4 / 2 * 8; }
  __device__ static int column(unsigned thread, int e) { return e / 4 % 8 * 8 + 2 * (thread % 4) + e % 2; }

  static __device__ __forceinline__ void ask_pair(const T* image, const Neighbours& of, const Reader& values, SharedArray<T> to) {
    const T* pairs = image + (int64_t(of.pair()) * kPairScores + threadIdx.x * Reader::kVector);
#pragma unroll
    for (int k = 0; k < 2; ++k) copy_async_16(to + (values.own + k * kPairScores / 2), pairs + k * kPairScores / 2, 16);
  }

  // Calls ask(i) for each item on the way.
  template <bool kMirrored, class Ask>
  static __device__ __forceinline__ void multiply(SharedArray<T> stage, float (&sums)[2][8][4], Ask ask) {
    const int warp = threadIdx.x / 32, row = warp % 2 * 32;
    const SharedArray<T> values = stage + (kG + warp / 2 * kPairScores);
    // Parts of a line are turned by its number alone, so another's place is an exclusive or away.
    constexpr int kTurn = Reader::kVector;
    auto multiply_16 = [&](int k) {
      const int down = k * 16 * kItemChannels;
      unsigned left[2][4], right[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kMirrored)
          load_matrices<true>(left[i], [&](int m, int r) {
            return &stage[(Reader::at(m / 2 * 8 + r, row / 8 + m % 2) ^ 2 * i * kTurn) + down];
          });
        else
          load_matrices<false>(left[i], [&](int m, int r) {
            return &stage[(Reader::at(row + m % 2 * 8 + r, m / 2) ^ 2 * k * kTurn) + i * 16 * kTilePixels];
          });
      }
      if (2 * k < kItems) ask(2 * k), ask(2 * k + 1);  // early: they are wanted in the very next step
#pragma unroll
      for (int c = 0; c < 8; c += 2) {
        load_matrices<true>(right, [&](int m, int r) { return &values[(Reader::at(m % 2 * 8 + r, m / 2) ^ c * kTurn) + down]; });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_fragments<T>(sums[i][c], left[i], right);
          multiply_fragments<T>(sums[i][c + 1], left[i], right + 2);
        }
      }
    };
    if constexpr (kWide) {
#pragma unroll
      for (int k = 0; k < kTilePixels / 16; ++k) multiply_16(k);
    } else {
#pragma unroll 1
      for (int k = 0; k < kTilePixels / 16; ++k) multiply_16(k);
    }
  }

  // Returns the unit of the sums.
  static __device__ __forceinline__ float sum(const ProductArgs& args, int64_t b, int tile, SharedArray<ItemSource> items, bool clean,
                                              SharedArray<T> shared, float (&total)[kSums]) {
    constexpr bool kScaled = std::is_same<T, __half>::value;
    const Reader values(args, items);
    const int64_t first_pair = args.grid.pair(b, 0, 0);
    const T* image = static_cast<const T*>(args.buffers.values) + first_pair * kPairScores;
    Neighbours ahead(args.grid, computed_here(tile));
    float sums[2][8][4] = {}, unit = 1;
    __syncthreads();
    typename Reader::Pixels pixels = values.pixels(ahead, 0);
    ask_pair(image, ahead, values, shared);
#pragma unroll 1
    for (int i = 0; i < kItems; ++i) values.ask(i, pixels, shared + kG);
    commit_copies();
    for (int stage = 0;; stage ^= 1) {
      const SharedArray<T> now = shared + stage * kStage;
      const bool mirrored = ahead.mirrored();
      const float scale = kScaled ? args.buffers.scale[first_pair + ahead.pair()] : 1.0f;
      wait_copies<0>();
      if (clean) values.clean(now + kG);
      __syncthreads();
      ahead.turn();
      const bool more = !ahead.done();
      const SharedArray<T> next = shared + (1 - stage) * kStage;
      if (more) {
        ask_pair(image, ahead, values, next);
        pixels = values.pixels(ahead, 0);
      }
      if (more && !kWide) values.ask(0, pixels, next + kG);
      auto ask = [&](int i) {
        if (more && kWide) values.ask(i, pixels, next + kG);
      };
      if (kScaled && scale != unit) {  // powers of two: nothing is rounded
        const float ratio = unit / scale;
#pragma unroll
        for (int e = 0; e < kSums; ++e) sums[e / 32][e / 4 % 8][e % 4] *= ratio;
        unit = scale;
      }
      if (mirrored)
        multiply<true>(now, sums, ask);
      else
        multiply<false>(now, sums, ask);
      commit_copies();
      if (!more) break;
    }
#pragma unroll
    for (int e = 0; e < kSums; ++e) total[e] = sums[e / 32][e / 4 % 8][e % 4];
    return unit;
  }
};

}  // namespace afa
