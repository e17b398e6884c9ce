// The passes of the lattice filter over rows of channels, within a parallel region; and pixels between planes and such rows.
#pragma once

#include <algorithm>

#include "bilateral/bilateral.h"
#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

constexpr int64_t kMostChannels = 32;  // at once

// Floats of a row of channels: a multiple of 8, at least a vector. The last vector of a row may overlap the one before it.
static inline int64_t channel_row(int64_t channels) { return std::max<int64_t>(round_up(channels, 8), kLanes); }

// Channels first.. of image row y, as rows of channels; `lines` [channels][W] is scratch.
static inline void side_by_side(const View<4>& from, int64_t b, int64_t first, int64_t channels, int64_t y, float* lines, float* to,
                                int64_t row) {
  const int64_t width = from.size[3];
  for (int64_t c = 0; c < channels; ++c) load_row(from, b, first + c, y, lines + c * width);
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t c = 0; c < channels; ++c) to[x * row + c] = lines[c * width + x];
    for (int64_t c = channels; c < row; ++c) to[x * row + c] = 0.0f;
  }
}
static inline void apart(const View<4>& to, int64_t b, int64_t first, int64_t channels, int64_t y, float* lines, const float* from,
                         int64_t row) {
  const int64_t width = to.size[3];
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = 0; c < channels; ++c) lines[c * width + x] = from[x * row + c];
  for (int64_t c = 0; c < channels; ++c) store_row(to, b, first + c, y, lines + c * width);
}

// kVectors vectors that cover a row; the last ends where the row does.
template <int kVectors>
struct Row {
  int64_t at[kVectors];
  explicit Row(int64_t row) {
    for (int v = 0; v < kVectors; ++v) at[v] = std::min<int64_t>(v * kLanes, row - kLanes);
  }
};

// Points with `stride` floats to each, of which `row` are filtered: out = base + scale * filter(in), base 0 where it is null.
struct Rows {
  const float *in, *base;
  float* out;
  int64_t stride, row;
  float scale;
};

constexpr int64_t kAhead = 12;  // rows
static inline void prefetch(const float* row) {
  __builtin_prefetch(row);
  __builtin_prefetch(row + 16);
}

template <int kVectors>
static void splat(const Lattice& lattice, const Rows& rows, float* to) {
  const Row<kVectors> lanes(rows.row);
  const int64_t last = lattice.points * (lattice.dims + 1) - 1;
#pragma omp for schedule(static)
  for (int64_t m = 0; m < lattice.vertices; ++m) {
    vfloat sum[kVectors] = {};
    for (int64_t e = lattice.start[m]; e < lattice.start[m + 1]; ++e) {
      const float* from = rows.in + lattice.point[e] * rows.stride;
      // As far ahead as memory is away; the list of the last vertex is followed by nothing.
      prefetch(rows.in + lattice.point[std::min(e + kAhead, last)] * rows.stride);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] += lattice.share[e] * load(from + lanes.at[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(to + m * rows.row + lanes.at[v], sum[v]);
  }
}

template <int kVectors>
static void blur(const Lattice& lattice, int64_t axis, int64_t row, const float* from, float* to) {
  const Row<kVectors> lanes(row);
  const int32_t* near = lattice.near + axis * lattice.vertices * 2;
#pragma omp for schedule(static)
  for (int64_t m = 0; m < lattice.vertices; ++m) {
    const float *one = from + near[2 * m] * row, *other = from + near[2 * m + 1] * row;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store(to + m * row + lanes.at[v],
            load(from + m * row + lanes.at[v]) + 0.5f * (load(one + lanes.at[v]) + load(other + lanes.at[v])));
  }
}

// sum += scale times what point i gets of its corners.
template <int kVectors>
static inline void add_corners(const Lattice& lattice, const float* from, int64_t row, const Row<kVectors>& lanes, int64_t i, float scale,
                               vfloat (&sum)[kVectors]) {
  const int64_t corners = lattice.dims + 1;
  for (int64_t r = 0; r < corners; ++r) {
    const float weight = lattice.weight[i * corners + r] * scale;
    const float* corner = from + lattice.index[i * corners + r] * row;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] += weight * load(corner + lanes.at[v]);
  }
}

template <int kVectors>
static void slice(const Lattice& lattice, const float* from, float scale, const Rows& rows) {
  const Row<kVectors> lanes(rows.row);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < lattice.points; ++i) {
    vfloat sum[kVectors] = {};
    add_corners<kVectors>(lattice, from, rows.row, lanes, i, scale, sum);
    if (rows.base)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] += load(rows.base + i * rows.stride + lanes.at[v]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(rows.out + i * rows.stride + lanes.at[v], sum[v]);
  }
}

// The values of all vertices, in one of the two tables, which have M + 1 rows each.
template <int kVectors>
static const float* blurred(const Lattice& lattice, const Rows& rows, bool transpose, float* first, float* second) {
  const int64_t corners = lattice.dims + 1;
  float* const tables[] = {first, second};
#pragma omp for schedule(static)
  for (int t = 0; t < 2; ++t)
    std::fill(tables[t] + lattice.vertices * rows.row, tables[t] + (lattice.vertices + 1) * rows.row, 0.0f);
  splat<kVectors>(lattice, rows, first);
  for (int64_t i = 0; i < corners; ++i) {
    blur<kVectors>(lattice, transpose ? corners - 1 - i : i, rows.row, first, second);
    std::swap(first, second);
  }
  return first;
}
static inline float alpha(const Lattice& lattice) { return 1.0f / (1.0f + 1.0f / float(int64_t(1) << lattice.dims)); }

template <int kVectors>
static void filter_vectors(const Lattice& lattice, const Rows& rows, bool transpose, float* first, float* second) {
  slice<kVectors>(lattice, blurred<kVectors>(lattice, rows, transpose, first, second), rows.scale * alpha(lattice), rows);
}

// rows.row = channel_row(at most kMostChannels). Called by all threads of a region; the tables have M + 1 rows each. in and out may
// be the same.
static inline void filter_rows(const Lattice& lattice, const Rows& rows, bool transpose, float* first, float* second) {
  switch ((rows.row + kLanes - 1) / kLanes) {
    case 1: return filter_vectors<1>(lattice, rows, transpose, first, second);
    case 2: return filter_vectors<2>(lattice, rows, transpose, first, second);
    case 3: return filter_vectors<3>(lattice, rows, transpose, first, second);
    case 4: return filter_vectors<4>(lattice, rows, transpose, first, second);
    case 6: return filter_vectors<6>(lattice, rows, transpose, first, second);
    default: return filter_vectors<8>(lattice, rows, transpose, first, second);
  }
}

}  // namespace AFA_ISA
}  // namespace afa
