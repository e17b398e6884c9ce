// The passes of the lattice filter over rows of channels: those of a tile, by one thread; those of all vertices, within a parallel region.
// And the pixels of a tile between planes and rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bilateral/bilateral.h"
#include "bilateral/lattice_tiles.h"
#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

constexpr int64_t kMostChannels = 32;  // at once: a group

// Floats of a row of channels.
static inline int64_t channel_row(int64_t channels) { return round_up(channels, kLanes); }

// kVectors of them, or one float where it is 0.
template <int kVectors>
struct Row {
  typedef std::conditional_t<kVectors == 0, float, vfloat> Value;
  static constexpr int count = kVectors ? kVectors : 1, lanes = kVectors ? kLanes : 1, floats = count * lanes;
  static Value get(const float* from, int v) {
    Value value;
    __builtin_memcpy(&value, from + v * lanes, sizeof value);
    return value;
  }
  static void put(float* to, int v, Value value) { __builtin_memcpy(to + v * lanes, &value, sizeof value); }
};

static inline void prefetch(const float* row, int64_t floats) {
  for (int64_t at = 0; at < floats; at += 16) __builtin_prefetch(row + at);
}
constexpr int64_t kAhead = 24;  // rows

// Calls function(std::integral_constant<int, vectors of a row>), 0 for a single float.
template <class Function>
static inline void with_vectors(int64_t row, const Function& function) {
  switch (row / kLanes) {
    case 0: return function(std::integral_constant<int, 0>());
    case 1: return function(std::integral_constant<int, 1>());
    case 2: return function(std::integral_constant<int, 2>());
#if !defined(__AVX512F__)
    case 3: return function(std::integral_constant<int, 3>());
    case 4: return function(std::integral_constant<int, 4>());
#if !defined(__AVX2__)
    case 5: return function(std::integral_constant<int, 5>());
    case 6: return function(std::integral_constant<int, 6>());
    case 7: return function(std::integral_constant<int, 7>());
    default: return function(std::integral_constant<int, 8>());
#endif
#endif
  }
}

// --- planes and rows ---

static inline int64_t line_floats(int64_t row, const Tiles& tiles) { return row * round_up(tiles.wide, kLanes); }

// Channels first.. of a tile, times `scale`, as a row of `row` floats for each point, `stride` apart; those behind the last channel are
// `rest`; of a row of one float that is all there is, and `scale` does not count. `lines` is scratch, line_floats(row, tiles) of it.
static inline void side_by_side(const View<4>& from, const Tile& tile, int64_t first, int64_t channels, float scale, float rest,
                                float* lines, float* to, int64_t stride, int64_t row) {
  View<4> part = from;
  part.data = static_cast<char*>(from.data) + tile.x * from.stride[3] * element_bytes(from.dtype), part.size[3] = tile.width;
  const int64_t line = round_up(tile.width, kLanes);
  if (row == 1) {
    for (int64_t y = 0; y < tile.height; ++y) load_row(part, 0, first, tile.y + y, to + y * tile.width);
    return;
  }
  std::fill(lines + channels * line, lines + row * line, rest);
  for (int64_t y = 0; y < tile.height; ++y, to += tile.width * stride) {
    for (int64_t c = 0; c < channels; ++c) load_row(part, 0, first + c, tile.y + y, lines + c * line);
    for (int64_t c = 0; c < row; c += kLanes)
      for (int64_t x = 0; x < tile.width; x += kLanes) {
        vfloat square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(lines + (c + i) * line + x);
        if (scale != 1.0f)
          for (int i = 0; i < kLanes; ++i) square[i] = c + i < channels ? square[i] * scale : square[i];
        transpose(square);
        const int64_t count = std::min<int64_t>(kLanes, tile.width - x);
        for (int64_t i = 0; i < count; ++i) store(to + (x + i) * stride + c, square[i]);
      }
  }
}
static inline void apart(const View<4>& to, const Tile& tile, int64_t first, int64_t channels, float* lines, const float* from,
                         int64_t stride, int64_t row) {
  View<4> part = to;
  part.data = static_cast<char*>(to.data) + tile.x * to.stride[3] * element_bytes(to.dtype), part.size[3] = tile.width;
  const int64_t line = round_up(tile.width, kLanes);
  if (row == 1) {
    for (int64_t y = 0; y < tile.height; ++y) store_row(part, 0, first, tile.y + y, from + y * tile.width);
    return;
  }
  for (int64_t y = 0; y < tile.height; ++y, from += tile.width * stride) {
    for (int64_t c = 0; c < row; c += kLanes)
      for (int64_t x = 0; x < tile.width; x += kLanes) {
        vfloat square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) square[i] = load(from + std::min(x + i, tile.width - 1) * stride + c);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(lines + (c + i) * line + x, square[i]);
      }
    for (int64_t c = 0; c < channels; ++c) store_row(part, 0, first + c, tile.y + y, lines + c * line);
  }
}

// --- a tile ---

// A tile's rows, zero before, += its points' channels times their weights and `factor` [H][W], which may be null.
template <int kVectors>
static inline void splat(const TiledLattice& lattice, const Tile& tile, const float* factor, const float* from, int64_t stride, float* to) {
  typedef Row<kVectors> R;
  const int64_t corners = lattice.dims + 1;
  const uint16_t* corner = lattice.corner + tile.first * corners;
  const float* weight = lattice.weight + tile.first * corners;
  for (int64_t y = 0; y < tile.height; ++y)
    for (int64_t x = 0; x < tile.width; ++x, from += stride, corner += corners, weight += corners) {
      const float own = factor ? factor[(tile.y + y) * lattice.width + tile.x + x] : 1.0f;
      typename R::Value value[R::count];
#pragma GCC unroll 8
      for (int v = 0; v < R::count; ++v) value[v] = R::get(from, v) * own;
      for (int64_t r = 0; r < corners; ++r) {
        float* row = to + corner[r] * R::floats;
#pragma GCC unroll 8
        for (int v = 0; v < R::count; ++v) R::put(row, v, R::get(row, v) + weight[r] * value[v]);
      }
    }
}

// Points' channels = base + scale * factor * what they get of the tile's rows; base, of the same stride, and factor may be null.
template <int kVectors>
static inline void slice(const TiledLattice& lattice, const Tile& tile, const float* rows, float scale, const float* factor,
                         const float* base, float* to, int64_t stride) {
  typedef Row<kVectors> R;
  const int64_t corners = lattice.dims + 1;
  const uint16_t* corner = lattice.corner + tile.first * corners;
  const float* weight = lattice.weight + tile.first * corners;
  int64_t at = 0;
  for (int64_t y = 0; y < tile.height; ++y)
    for (int64_t x = 0; x < tile.width; ++x, at += stride, corner += corners, weight += corners) {
      const float own = factor ? scale * factor[(tile.y + y) * lattice.width + tile.x + x] : scale;
      typename R::Value sum[R::count] = {};
      for (int64_t r = 0; r < corners; ++r) {
        const float* row = rows + corner[r] * R::floats;
#pragma GCC unroll 8
        for (int v = 0; v < R::count; ++v) sum[v] += weight[r] * R::get(row, v);
      }
#pragma GCC unroll 8
      for (int v = 0; v < R::count; ++v)
        R::put(to + at, v, base ? R::get(base + at, v) + own * sum[v] : own * sum[v]);
    }
}

// The rows of a tile out of the table of vertices.
template <int kVectors>
static inline void fetch(const TiledLattice& lattice, int64_t t, const float* table, float* to) {
  typedef Row<kVectors> R;
  constexpr int64_t row = R::floats;
  for (int64_t i = lattice.first[t]; i < lattice.first[t + 1]; ++i, to += row) {
    prefetch(table + lattice.vertex[std::min<int64_t>(i + kAhead, lattice.rows - 1)] * row, row);
#pragma GCC unroll 8
    for (int v = 0; v < R::count; ++v) R::put(to, v, R::get(table + lattice.vertex[i] * row, v));
  }
}

// --- all vertices ---

// A vertex is the sum of the tiles' rows that are of it, in the order of tiles.
template <int kVectors>
static inline void unite(const TiledLattice& lattice, const float* rows, float* to) {
  typedef Row<kVectors> R;
  constexpr int64_t row = R::floats;
#pragma omp for schedule(static) nowait
  for (int64_t m = 0; m < lattice.vertices; ++m) {
    typename R::Value sum[R::count] = {};
    for (int64_t e = lattice.start[m]; e < lattice.start[m + 1]; ++e) {
      prefetch(rows + lattice.row[std::min<int64_t>(e + kAhead, lattice.rows - 1)] * row, row);
#pragma GCC unroll 8
      for (int v = 0; v < R::count; ++v) sum[v] += R::get(rows + lattice.row[e] * row, v);
    }
#pragma GCC unroll 8
    for (int v = 0; v < R::count; ++v) R::put(to + m * row, v, sum[v]);
  }
}

// In place: every row is read once and written once, those of vertices without neighbours not at all. Each thread has the chains that
// begin in its part of the list.
template <int kVectors>
static inline void blur(const TiledLattice& lattice, int64_t axis, float* table) {
  typedef Row<kVectors> R;
  constexpr int64_t row = R::floats;
  static const float zeros[row] = {};
  const int32_t* chain = lattice.chain + axis * (lattice.vertices + 1);
  const int64_t count = lattice.chained[axis], team = team_size(), thread = thread_number();
  int64_t i = count * thread / team, end = count * (thread + 1) / team;
  while (chain[i] >= 0) ++i;
  while (chain[end] >= 0) ++end;
  typename R::Value last[R::count] = {};
  for (; i < end; ++i) {
    const int32_t next = chain[i + 1], soon = chain[std::min(i + kAhead, count)];
    prefetch(table + (soon ^ soon >> 31) * row, row);
    float* own = table + (chain[i] ^ chain[i] >> 31) * row;
    const bool begins = chain[i] < 0;
    const float* after = next < 0 ? zeros : table + next * row;
#pragma GCC unroll 8
    for (int v = 0; v < R::count; ++v) {
      const typename R::Value value = R::get(own, v);
      const typename R::Value sum = R::get(after, v) + (begins ? typename R::Value{} : last[v]);
      R::put(own, v, value + 0.5f * sum);
      last[v] = value;
    }
  }
}

static inline float alpha(const TiledLattice& lattice) { return 1.0f / (1.0f + 1.0f / float(int64_t(1) << lattice.dims)); }

// What a group of channels takes of a lattice.
struct LatticeTables {
  int64_t row;
  float *rows, *vertices;
  LatticeTables() = default;
  LatticeTables(const TiledLattice& lattice, int64_t floats, Arena& arena) : row(floats) {
    rows = arena.take<float>(lattice.rows * row);
    vertices = arena.take<float>(lattice.vertices * row);
  }
};

// From the tiles' rows to blurred vertices, of `count` lattices at once: the threads wait for one another d + 2 times.
static inline void blur_all(const TiledLattice* const* lattices, const LatticeTables* tables, int64_t count, bool transpose) {
  int64_t axes = 0;
  for (int64_t k = 0; k < count; ++k) axes = std::max(axes, lattices[k]->dims + 1);
  for (int64_t i = -1; i < axes; ++i) {
    for (int64_t k = 0; k < count; ++k) {
      const TiledLattice& lattice = *lattices[k];
      if (i > lattice.dims) continue;
      with_vectors(tables[k].row, [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        if (i < 0)
          unite<kVectors>(lattice, tables[k].rows, tables[k].vertices);
        else
          blur<kVectors>(lattice, transpose ? lattice.dims - i : i, tables[k].vertices);
      });
    }
#pragma omp barrier
  }
}

}  // namespace AFA_ISA
}  // namespace afa
