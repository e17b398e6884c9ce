// What the CPU files of the affinity share: the band of a grid cut into tiles, the product that fills them, the sigmoid.
//
// Rows of pixels are taken in pairs, their pixels interleaved: x, and below it x again, then x+1. A tile is a run of query columns of
// one pair of rows against one pair of rows of key pixels, itself or below it; its lanes are the keys that any of the queries
// reaches. A vector then spans half as many columns as it has lanes, which fits the band more tightly than a vector along a row.
// Pairs that point up are the mirror images of those that point down, since z_ij = z_ji.
#pragma once

#include <algorithm>
#include <utility>

#include "affinity/affinity.h"
#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

// Query columns (of 2 rows) x vectors of keys: the sums of a tile fill the registers (32 with AVX-512, else 16).
#if defined(__AVX512F__)
constexpr int kTileColumns = 4, kTileVectors = 3;
#else
constexpr int kTileColumns = 3, kTileVectors = 2;
#endif
constexpr int64_t kChannelChunk = 256;  // channels of a product before moving to the next tile, so that rows stay in L2

// Elements x.. of one line of a tensor, from and to float.
static inline View<4> line_of(const View<4>& view, int64_t x, int64_t count) {
  View<4> line = view;
  line.data = static_cast<char*>(view.data) + x * view.stride[3] * element_bytes(view.dtype);
  line.size[3] = count;
  return line;
}

struct BandTile {
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
  BandTile tile(int64_t t, int64_t y, int64_t below_it, float* row) const {
    BandTile at;
    at.y = y, at.below = below_it, at.x = t * columns, at.columns = std::min(columns, width - at.x);
    at.first = std::max(at.x - radius, int64_t(0)), at.keys = std::min(at.x + at.columns + radius, width) - at.first;
    at.stride = stride, at.scores = row + (t * below() + below_it) * 2 * columns * stride;
    return at;
  }
  // The pairs of query i with the keys of row `parity`: each pair of pixels in one direction only, the pixel with itself included.
  Line line(const BandTile& tile, int64_t i, int64_t parity) const {
    Line at;
    at.y = 2 * tile.y + i % 2, at.x = tile.x + i / 2, at.key_y = 2 * (tile.y + tile.below) + parity;
    const int64_t dy = at.key_y - at.y;
    at.begin = std::max(dy == 0 ? at.x : at.x - radius, int64_t(0)), at.end = std::min(at.x + radius + 1, width);
    if (dy < 0 || dy > radius || at.y >= height || at.key_y >= height) at.end = at.begin;
    at.scores = tile.scores + i * tile.stride + parity - 2 * tile.first;
    return at;
  }
  template <class Visit>
  void lines(const BandTile& tile, const Visit& visit) const {
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
      : heads(args.query.size[1]), each(args.query.size[3]), depth(heads * each), row(round_up(2 * args.width + 2, 16)),
        height(args.height), width(args.width) {
    const int64_t slack = kTileVectors * kLanes;  // a tile may read past the last key
    values = arena.take<float>((height + 1) / 2 * 2 * depth * row + slack);
    lines = arena.take<float>(threads * 4 * each);
  }
  float* key(int64_t y, int64_t c) const { return values + (y * 2 * depth + c) * row; }
  float* query(int64_t y, int64_t c) const { return key(y, c < depth ? c + depth : c - depth); }
};

typedef float vfour __attribute__((vector_size(16)));

// 4 channels of 4 pixels, [pixel][channel] -> [channel][pixel].
static inline void transpose_four(const float* const* pixels, int64_t channel, float scale, float* to, int64_t row) {
  vfour in[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&in[i], pixels[i] + channel, 16);
  const vfour low01 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5), high01 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
  const vfour low23 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5), high23 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  const vfour out[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                        __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) {
    const vfour scaled = out[i] * scale;
    __builtin_memcpy(to + i * row, &scaled, 16);
  }
}

// One head of one pair of rows: two columns of pixels at a time, copied to float where they are not already.
static inline void pack_head(const View<4>& view, int64_t b, int64_t head, float scale, int64_t y, const Channels& to, float* channels,
                             float* lines) {
  const bool direct = view.dtype == DType::f32 && view.stride[3] == 1;
  for (int64_t x = 0; x < to.width; x += 2) {
    const float* pixels[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t row = 2 * y + i % 2, column = x + i / 2, n = row * to.width + column;
      float* copy = lines + i * to.each;
      pixels[i] = copy;
      if (row >= to.height || column >= to.width)
        std::fill(copy, copy + to.each, 0.0f);
      else if (direct)
        pixels[i] = static_cast<const float*>(view.data) + b * view.stride[0] + head * view.stride[1] + n * view.stride[2];
      else
        load_row(view, b, head, n, copy);
    }
    int64_t e = 0;
    for (; e + 4 <= to.each; e += 4) transpose_four(pixels, e, scale, channels + e * to.row + 2 * x, to.row);
    for (; e < to.each; ++e)
      for (int i = 0; i < 4; ++i) channels[e * to.row + 2 * x + i] = pixels[i][e] * scale;
  }
}

static inline void pack_channels(const AttentionArgs& args, int64_t b, const Channels& to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t y = 0; y < (to.height + 1) / 2; ++y)
    for (int64_t head = 0; head < to.heads; ++head) {
      float* lines = to.lines + thread_number() * 4 * to.each;
      pack_head(args.key, b, head, 1.0f, y, to, to.key(y, head * to.each), lines);
      pack_head(args.query, b, head, args.head_weight[head], y, to, to.query(y, head * to.each), lines);
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
          const BandTile tile = tiling.tile(t, y, below, row);
          for (int64_t lane = 0; lane < 2 * tile.keys; lane += kTileVectors * kLanes) {
            const int64_t vectors = std::min<int64_t>((2 * tile.keys - lane + kLanes - 1) / kLanes, kTileVectors);
            products_for(tile.columns, vectors)(from.query(y, c) + 2 * tile.x, from.key(y + below, c) + 2 * tile.first + lane, from.row,
                                                channels, tile.scores + lane, tile.stride);
          }
        }
    }
}

// --- score maps in their place ---

// sum_h w_h (S_ij + S_ji) of one tile; `line` takes a query's keys or a key's queries.
static inline void add_maps(const MapsArgs& args, int64_t b, const Tiling& tiling, const BandTile& tile, float* line) {
  for (int64_t rows = 0; rows < 4; ++rows) {
    const int64_t y = 2 * tile.y + rows % 2, key_y = 2 * (tile.y + tile.below) + rows / 2;
    if (y >= tiling.height || key_y >= tiling.height || key_y < y) continue;
    const int64_t from = y * tiling.width + tile.x, to = key_y * tiling.width + tile.first;
    float* scores = tile.scores + rows % 2 * tile.stride + rows / 2;
    for (int64_t head = 0; head < args.maps.size[1]; ++head) {
      for (int64_t q = 0; q < tile.columns; ++q) {
        load_row(line_of(args.maps, to, tile.keys), b, head, from + q, line);
        for (int64_t k = 0; k < tile.keys; ++k) scores[2 * q * tile.stride + 2 * k] += args.head_weight[head] * line[k];
      }
      for (int64_t k = 0; k < tile.keys; ++k) {
        load_row(line_of(args.maps, from, tile.columns), b, head, to + k, line);
        for (int64_t q = 0; q < tile.columns; ++q) scores[2 * q * tile.stride + 2 * k] += args.head_weight[head] * line[q];
      }
    }
  }
}

// The scores of one pair of rows; `lines` [threads][tiling.stride].
static inline void fill_maps(const MapsArgs& args, int64_t b, const Tiling& tiling, int64_t y, float* lines, float* row) {
  for (int64_t t = 0; t < tiling.count; ++t)
    for (int64_t below = 0; below < tiling.below() && y + below < tiling.pairs; ++below)
      add_maps(args, b, tiling, tiling.tile(t, y, below, row), lines + thread_number() * tiling.stride);
}

// --- the sigmoid, and lanes that are pairs ---

// A of z, 1 - A, which is A of -z, and A (1 - A), without cancellation at either end: all come from e = exp(-|z|).
struct Sigmoids {
  vfloat value, negated, slope;
  explicit Sigmoids(vfloat z) {
    const vfloat e = exp_of(-abs_of(z)), inverse = 1.0f / (1.0f + e), other = e * inverse;
    value = z >= 0.0f ? inverse : other, negated = z >= 0.0f ? other : inverse, slope = other * inverse;
  }
};

// What a loss keeps of one image for its backward, [N][r + 1][2r + 1]: the sigmoid's derivative of each pair that points down, or along
// its row to the right, negative where the labels agree, 0 where the pair does not count.
struct Derivatives {
  int64_t width, radius, side;
  float* values;
  Derivatives(const Tiling& tiling, float* of_image)
      : width(tiling.width), radius(tiling.radius), side(2 * tiling.radius + 1), values(of_image) {}
  static int64_t size(const Tiling& tiling) { return tiling.height * tiling.width * (tiling.radius + 1) * (2 * tiling.radius + 1); }
  // Those of one pixel with the row dy below it, its own column at 0.
  float* row(int64_t y, int64_t x, int64_t dy) const { return values + ((y * width + x) * (radius + 1) + dy) * side + radius; }
};

// Labels of one image as the lanes of the tiles have them, [pairs of rows][row], negative where there is no pixel.
struct LaneLabels {
  int64_t row;
  int32_t* values;
  LaneLabels(const Tiling& tiling, Arena& arena) : row(2 * tiling.width + tiling.stride) {
    values = arena.take<int32_t>(tiling.pairs * row);
  }
  void load(const int32_t* labels, const Tiling& tiling) const {
    std::fill(values, values + tiling.pairs * row, -1);
    for (int64_t y = 0; y < tiling.height; ++y)
      for (int64_t x = 0; x < tiling.width; ++x) values[y / 2 * row + 2 * x + y % 2] = labels[y * tiling.width + x];
  }
};

// Calls visit(lane, equal, different) for the vectors of lanes in which query i has pairs: masks of those with its own label and of
// those with another.
template <class Visit>
static inline void labelled_lanes(const BandTile& tile, const Tiling& tiling, const LaneLabels& labels, int64_t i, const Visit& visit) {
  const int32_t own = labels.values[tile.y * labels.row + 2 * tile.x + i];
  const Line lines[2] = {tiling.line(tile, i, 0), tiling.line(tile, i, 1)};
  vint lane, low, high;
  int64_t begin = 2 * tile.keys, end = 0;
  for (int64_t parity = 0; parity < 2; ++parity) {
    if (lines[parity].begin >= lines[parity].end) continue;
    begin = std::min(begin, 2 * (lines[parity].begin - tile.first)), end = std::max(end, 2 * (lines[parity].end - tile.first));
  }
  if (own < 0 || begin >= end) return;
  for (int l = 0; l < kLanes; ++l) {
    lane[l] = l;
    low[l] = int32_t(2 * (lines[l % 2].begin - tile.first)), high[l] = int32_t(2 * (lines[l % 2].end - tile.first));
  }
  const int32_t* others = labels.values + (tile.y + tile.below) * labels.row + 2 * tile.first;
  for (int64_t l = begin / kLanes * kLanes; l < end; l += kLanes) {
    vint other;
    __builtin_memcpy(&other, others + l, sizeof other);
    const vint at = lane + int32_t(l);
    const vint counts = (at >= low) & (at < high) & (other >= 0), equal = counts & (other == own);
    visit(l, equal, counts & ~equal);
  }
}

}  // namespace AFA_ISA
}  // namespace afa
