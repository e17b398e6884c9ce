// What the CPU files of the affinity share: the band of a grid cut into tiles, the product that fills them, the sigmoid.
//
// A tile is a run of query pixels in one image row against one row of key pixels, dy = 0..r below; its columns are the keys
// that any of the queries reaches. Rows above are the mirror images of these, since z_ij = z_ji.
#pragma once

#include <algorithm>
#include <utility>

#include "affinity.h"
#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace afa {
namespace AFA_ISA {

// Queries x 2 vectors of keys: the sums of a tile fill the registers (32 with AVX-512, else 16).
#if defined(__AVX512F__)
constexpr int kTileQueries = 12;
#else
constexpr int kTileQueries = 6;
#endif
constexpr int64_t kChannelChunk = 256;  // channels of a product before moving to the next tile, so that rows stay in L2

static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Hands out pieces of a workspace; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* here = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return here;
  }
};

// Elements x.. of one line of a tensor, from and to float.
static inline View<4> line_of(const View<4>& view, int64_t x, int64_t count) {
  View<4> line = view;
  line.data = static_cast<char*>(view.data) + x * view.stride[3] * (view.dtype == DType::f32 ? 4 : 2);
  line.size[3] = count;
  return line;
}

struct Tile {
  int64_t y, dy, x, queries;  // queries (y, x..x+queries-1)
  int64_t first, keys;        // keys (y+dy, first..first+keys-1)
  int64_t stride;             // of a query's scores
  float* scores;              // [queries][stride]
  // The keys of query q that make a pair not yet seen: columns [begin, end) of its scores.
  int64_t begin(int64_t q, int64_t radius) const {
    return std::max(dy == 0 ? x + q : x + q - radius, int64_t(0)) - first;
  }
  int64_t end(int64_t q, int64_t radius, int64_t width) const { return std::min(x + q + radius + 1, width) - first; }
};

struct Tiling {
  int64_t height, width, radius, side, queries, count, stride;

  Tiling(int64_t h, int64_t w, int64_t r) : height(h), width(w), radius(std::min(r, std::max(h, w))), side(2 * r + 1) {
    count = (w + kTileQueries - 1) / kTileQueries;
    queries = (w + count - 1) / count;  // equal tiles: those of a short one would leave registers idle
    stride = round_up(std::min(w, queries + 2 * radius), 2 * kLanes);
  }
  int64_t rows_below() const { return std::min(radius + 1, height); }
  int64_t floats() const { return count * rows_below() * queries * stride; }
  Tile tile(int64_t t, int64_t y, int64_t dy, float* row) const {
    Tile at;
    at.y = y, at.dy = dy, at.x = t * queries, at.queries = std::min(queries, width - at.x);
    at.first = std::max(dy == 0 ? at.x : at.x - radius, int64_t(0));
    at.keys = std::min(at.x + at.queries + radius, width) - at.first;
    at.stride = stride, at.scores = row + (t * rows_below() + dy) * queries * stride;
    return at;
  }
};

// For every image row: `fill` computes the raw scores of its tiles, then `finish` takes them one by one.
template <class Fill, class Finish>
static void for_each_tile(const Tiling& tiling, float* buffers, int threads, const Fill& fill, const Finish& finish) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t y = 0; y < tiling.height; ++y) {
    float* row = buffers + thread_number() * tiling.floats();
    std::fill(row, row + tiling.floats(), 0.0f);
    fill(y, row);
    for (int64_t t = 0; t < tiling.count; ++t)
      for (int64_t dy = 0; dy < tiling.rows_below() && y + dy < tiling.height; ++dy) finish(tiling.tile(t, y, dy, row));
  }
}

// --- queries and keys, and their product ---

// v of one image, channel-major: [h][2 * depth][row], v = [k, w q]; row is the padded width. u is v with its halves exchanged.
struct Channels {
  int64_t heads, each, depth, row, height, width;
  float *values, *lines;

  Channels(const AttentionArgs& args, Arena& arena, int threads)
      : heads(args.query.size[1]), each(args.query.size[3]), depth(heads * each), row(round_up(args.width, 16)),
        height(args.height), width(args.width) {
    values = arena.take<float>(height * 2 * depth * row + 2 * kLanes);  // a tile may read past the last key
    lines = arena.take<float>(threads * width * each);
  }
  const float* key(int64_t y, int64_t c) const { return values + (y * 2 * depth + c) * row; }
  const float* query(int64_t y, int64_t c) const { return key(y, c < depth ? c + depth : c - depth); }
};

static inline void pack_channels(const AttentionArgs& args, int64_t b, const Channels& to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t y = 0; y < to.height; ++y)
    for (int64_t c = 0; c < 2 * to.heads; ++c) {
      const bool is_key = c < to.heads;
      const int64_t head = is_key ? c : c - to.heads;
      const float scale = is_key ? 1.0f : args.head_weight[head];
      float* line = to.lines + thread_number() * to.width * to.each;
      for (int64_t x = 0; x < to.width; ++x)
        load_row(is_key ? args.key : args.query, b, head, y * to.width + x, line + x * to.each);
      for (int64_t e = 0; e < to.each; ++e) {
        float* channel = to.values + ((y * 2 + !is_key) * to.depth + head * to.each + e) * to.row;
        for (int64_t x = 0; x < to.width; ++x) channel[x] = line[x * to.each + e] * scale;
        std::fill(channel + to.width, channel + to.row, 0.0f);
      }
    }
}

template <int kQueries, int kVectors>
static void add_products(const float* query, const float* key, int64_t row, int64_t channels, float* scores, int64_t stride) {
  vfloat sum[kQueries][kVectors];
#pragma GCC unroll 12
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[q][v] = load(scores + q * stride + v * kLanes);
  for (int64_t c = 0; c < channels; ++c, query += row, key += row) {
    vfloat values[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) values[v] = load(key + v * kLanes);
#pragma GCC unroll 12
    for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[q][v] += query[q] * values[v];
  }
#pragma GCC unroll 12
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(scores + q * stride + v * kLanes, sum[q][v]);
}

typedef void (*AddProducts)(const float*, const float*, int64_t, int64_t, float*, int64_t);
template <int kVectors, int... kCounts>
static AddProducts products_for(int64_t queries, std::integer_sequence<int, kCounts...>) {
  static const AddProducts table[] = {add_products<kCounts + 1, kVectors>...};
  return table[queries - 1];
}

// The scores of image row y, tile after tile for each chunk of channels.
static inline void fill_products(const Channels& from, const Tiling& tiling, int64_t y, float* row) {
  const auto counts = std::make_integer_sequence<int, kTileQueries>();
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t c = half * from.depth; c < (half + 1) * from.depth; c += kChannelChunk) {
      const int64_t channels = std::min(kChannelChunk, (half + 1) * from.depth - c);
      for (int64_t t = 0; t < tiling.count; ++t)
        for (int64_t dy = 0; dy < tiling.rows_below() && y + dy < from.height; ++dy) {
          const Tile tile = tiling.tile(t, y, dy, row);
          for (int64_t k = 0; k < tile.keys; k += 2 * kLanes) {
            const AddProducts add =
                tile.keys - k > kLanes ? products_for<2>(tile.queries, counts) : products_for<1>(tile.queries, counts);
            add(from.query(y, c) + tile.x, from.key(y + dy, c) + tile.first + k, from.row, channels, tile.scores + k, tile.stride);
          }
        }
    }
}

// --- the sigmoid, in place over a tile ---

// Without cancellation at either end: both 1/(1+e) and e/(1+e) come from e = exp(-|z|).
static inline void sigmoid_in_place(const Tile& tile, float bias) {
  for (int64_t q = 0; q < tile.queries; ++q)
    for (int64_t k = 0; k < tile.keys; k += kLanes) {
      float* at = tile.scores + q * tile.stride + k;
      const vfloat z = load(at) + bias, e = exp_of(-abs_of(z)), inverse = 1.0f / (1.0f + e);
      store(at, z >= 0.0f ? inverse : e * inverse);
    }
}

// The derivative of the sigmoid instead of its value.
static inline void slope_in_place(const Tile& tile, float bias) {
  for (int64_t q = 0; q < tile.queries; ++q)
    for (int64_t k = 0; k < tile.keys; k += kLanes) {
      float* at = tile.scores + q * tile.stride + k;
      const vfloat e = exp_of(-abs_of(load(at) + bias)), inverse = 1.0f / (1.0f + e);
      store(at, e * inverse * inverse);
    }
}

}  // namespace AFA_ISA
}  // namespace afa
