// What the CPU files of the affinity share: the band of a grid cut into tiles, the product that fills them, the sigmoid.
//
// Rows of pixels are taken in pairs, their pixels interleaved: x, and below it x again, then x+1. A tile is a run of query columns of
// one pair of rows against one pair of rows of key pixels, itself or below it; its lanes are the keys that any of the queries
// reaches. A vector then spans half as many columns as it has lanes, which fits the band more tightly than a vector along a row.
// Pairs that point up are the mirror images of those that point down, since z_ij = z_ji.
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

// Query columns (of 2 rows) x vectors of keys: the sums of a tile fill the registers (32 with AVX-512, else 16).
#if defined(__AVX512F__)
constexpr int kTileColumns = 4, kTileVectors = 3;
#else
constexpr int kTileColumns = 3, kTileVectors = 2;
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
  int64_t y, below;         // the pairs of rows: queries in rows 2y, 2y+1, keys in rows 2(y+below), 2(y+below)+1
  int64_t x, columns;       // queries in columns x..x+columns-1
  int64_t first, keys;      // keys in columns first..first+keys-1
  int64_t stride;           // of a query's scores
  float* scores;            // [2 * columns][stride]: query (2y + i % 2, x + i / 2), key (2(y+below) + l % 2, first + l / 2)
};

// The pairs of one query with one row of keys: keys at columns [begin, end), the score of column k at scores[2 * k].
struct Line {
  int64_t y, x, key_y, begin, end;
  const float* scores;
};

struct Tiling {
  int64_t height, width, radius, side, pairs, columns, count, stride;

  Tiling(int64_t h, int64_t w, int64_t r) : height(h), width(w), radius(std::min(r, std::max(h, w))), side(2 * r + 1) {
    pairs = (h + 1) / 2;
    count = (w + kTileColumns - 1) / kTileColumns;
    columns = (w + count - 1) / count;  // equal tiles: those of a short one would leave registers idle
    stride = round_up(2 * std::min(w, columns + 2 * radius), kLanes);
  }
  int64_t below() const { return std::min((radius + 1) / 2 + 1, pairs); }
  int64_t floats() const { return count * below() * 2 * columns * stride; }
  Tile tile(int64_t t, int64_t y, int64_t below_it, float* row) const {
    Tile at;
    at.y = y, at.below = below_it, at.x = t * columns, at.columns = std::min(columns, width - at.x);
    at.first = std::max(at.x - radius, int64_t(0)), at.keys = std::min(at.x + at.columns + radius, width) - at.first;
    at.stride = stride, at.scores = row + (t * below() + below_it) * 2 * columns * stride;
    return at;
  }
  // The pairs of query i with the keys of row `parity`: each pair of pixels in one direction only, the pixel with itself included.
  Line line(const Tile& tile, int64_t i, int64_t parity) const {
    Line at;
    at.y = 2 * tile.y + i % 2, at.x = tile.x + i / 2, at.key_y = 2 * (tile.y + tile.below) + parity;
    const int64_t dy = at.key_y - at.y;
    at.begin = std::max(dy == 0 ? at.x : at.x - radius, int64_t(0)), at.end = std::min(at.x + radius + 1, width);
    if (dy < 0 || dy > radius || at.y >= height || at.key_y >= height) at.end = at.begin;
    at.scores = tile.scores + i * tile.stride + parity - 2 * tile.first;
    return at;
  }
  template <class Visit>
  void lines(const Tile& tile, const Visit& visit) const {
    for (int64_t i = 0; i < 2 * tile.columns; ++i)
      for (int64_t parity = 0; parity < 2; ++parity) {
        const Line at = line(tile, i, parity);
        if (at.begin < at.end) visit(at);
      }
  }
};

// For every pair of image rows: `fill` computes the raw scores of its tiles, then `finish` takes them one by one.
template <class Fill, class Finish>
static void for_each_tile(const Tiling& tiling, float* buffers, int threads, const Fill& fill, const Finish& finish) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t y = 0; y < tiling.pairs; ++y) {
    float* row = buffers + thread_number() * tiling.floats();
    std::fill(row, row + tiling.floats(), 0.0f);
    fill(y, row);
    for (int64_t t = 0; t < tiling.count; ++t)
      for (int64_t below = 0; below < tiling.below() && y + below < tiling.pairs; ++below)
        finish(tiling.tile(t, y, below, row));
  }
}

// --- queries and keys, and their product ---

// v of one image, channel-major: [pairs of rows][2 * depth][row], v = [k, w q]. u is v with its halves exchanged.
struct Channels {
  int64_t heads, each, depth, row, height, width;
  float *values, *lines;

  Channels(const AttentionArgs& args, Arena& arena, int threads)
      : heads(args.query.size[1]), each(args.query.size[3]), depth(heads * each), row(round_up(2 * args.width, 16)),
        height(args.height), width(args.width) {
    const int64_t slack = kTileVectors * kLanes;  // a tile may read past the last key
    values = arena.take<float>((height + 1) / 2 * 2 * depth * row + slack);
    lines = arena.take<float>(threads * 2 * width * each);
  }
  float* key(int64_t y, int64_t c) const { return values + (y * 2 * depth + c) * row; }
  float* query(int64_t y, int64_t c) const { return key(y, c < depth ? c + depth : c - depth); }
};

static inline void pack_channels(const AttentionArgs& args, int64_t b, const Channels& to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t y = 0; y < to.height; y += 2)
    for (int64_t c = 0; c < 2 * to.heads; ++c) {
      const bool is_key = c < to.heads;
      const int64_t head = is_key ? c : c - to.heads, size = to.width * to.each;
      const float scale = is_key ? 1.0f : args.head_weight[head];
      float *upper = to.lines + thread_number() * 2 * size, *lower = upper + size;
      std::fill(lower, lower + size, 0.0f);
      for (int64_t x = 0; x < to.width; ++x) {
        load_row(is_key ? args.key : args.query, b, head, y * to.width + x, upper + x * to.each);
        if (y + 1 < to.height)
          load_row(is_key ? args.key : args.query, b, head, (y + 1) * to.width + x, lower + x * to.each);
      }
      for (int64_t e = 0; e < to.each; ++e) {
        float* channel = to.key(y / 2, c * to.each + e);
        for (int64_t x = 0; x < to.width; ++x) {
          channel[2 * x] = upper[x * to.each + e] * scale;
          channel[2 * x + 1] = lower[x * to.each + e] * scale;
        }
        std::fill(channel + 2 * to.width, channel + to.row, 0.0f);
      }
    }
}

template <int kQueries, int kVectors>
static void add_products(const float* query, const float* key, int64_t row, int64_t channels, float* scores, int64_t stride) {
  vfloat sum[kQueries][kVectors];
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[q][v] = load(scores + q * stride + v * kLanes);
  for (int64_t c = 0; c < channels; ++c, query += row, key += row) {
    vfloat values[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) values[v] = load(key + v * kLanes);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[q][v] += query[q] * values[v];
  }
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(scores + q * stride + v * kLanes, sum[q][v]);
}

typedef void (*AddProducts)(const float*, const float*, int64_t, int64_t, float*, int64_t);
template <int kVectors, int... kCounts>
static AddProducts products_for(int64_t columns, std::integer_sequence<int, kCounts...>) {
  static const AddProducts table[] = {add_products<2 * (kCounts + 1), kVectors>...};
  return table[columns - 1];
}
static inline AddProducts products_for(int64_t columns, int64_t vectors) {
  const auto counts = std::make_integer_sequence<int, kTileColumns>();
  if (vectors == 1) return products_for<1>(columns, counts);
  return vectors == 2 ? products_for<2>(columns, counts) : products_for<kTileVectors>(columns, counts);
}

// The scores of one pair of rows, tile after tile for each chunk of channels.
static inline void fill_products(const Channels& from, const Tiling& tiling, int64_t y, float* row) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t c = half * from.depth; c < (half + 1) * from.depth; c += kChannelChunk) {
      const int64_t channels = std::min(kChannelChunk, (half + 1) * from.depth - c);
      for (int64_t t = 0; t < tiling.count; ++t)
        for (int64_t below = 0; below < tiling.below() && y + below < tiling.pairs; ++below) {
          const Tile tile = tiling.tile(t, y, below, row);
          for (int64_t lane = 0; lane < 2 * tile.keys; lane += kTileVectors * kLanes) {
            const int64_t vectors = std::min<int64_t>((2 * tile.keys - lane + kLanes - 1) / kLanes, kTileVectors);
            products_for(tile.columns, vectors)(from.query(y, c) + 2 * tile.x, from.key(y + below, c) + 2 * tile.first + lane, from.row,
                                                channels, tile.scores + lane, tile.stride);
          }
        }
    }
}

// --- the sigmoid, in place over a tile ---

// Without cancellation at either end: both 1/(1+e) and e/(1+e) come from e = exp(-|z|).
static inline void sigmoid_in_place(const Tile& tile, float bias) {
  for (int64_t q = 0; q < 2 * tile.columns; ++q)
    for (int64_t k = 0; k < 2 * tile.keys; k += kLanes) {
      float* at = tile.scores + q * tile.stride + k;
      const vfloat z = load(at) + bias, e = exp_of(-abs_of(z)), inverse = 1.0f / (1.0f + e);
      store(at, z >= 0.0f ? inverse : e * inverse);
    }
}

// The derivative of the sigmoid instead of its value.
static inline void slope_in_place(const Tile& tile, float bias) {
  for (int64_t q = 0; q < 2 * tile.columns; ++q)
    for (int64_t k = 0; k < 2 * tile.keys; k += kLanes) {
      float* at = tile.scores + q * tile.stride + k;
      const vfloat e = exp_of(-abs_of(load(at) + bias)), inverse = 1.0f / (1.0f + e);
      store(at, e * inverse * inverse);
    }
}

}  // namespace AFA_ISA
}  // namespace afa
