// A step of mean field on the CPU.
//
// Data flow: between two steps stand, for each kernel, the rows of the tiles, to which the last distribution was added. Vertices sum
// them and are blurred; then each tile fetches its rows again, and its points take their share of all kernels, add the unary, and are
// distributions by a softmax, which add themselves to the rows at once: a distribution never leaves the core's cache unless it is
// asked for.
// Floor, in bytes of an iteration: of a pixel its unary, 4 C, and 6 for each corner of each kernel; of rows and vertices see
// lattice_filter.cpp. At 500x375, 21 channels and both kernels: 28 MB from memory, 120 MB between a core's caches and the shared one,
// 6 ms at the 10 and 40 GB/s that one AVX2 core copies with. Bound: measured 20 ms, of which half is slicing and splatting, 27 vectors
// of a pixel read and as many read and written in a core's second cache, a quarter the blur, a sixth the softmax.
// Leaving out channels that are nowhere likely would gain nothing: of three inputs tried each of 21 still exceeded 1e-3 at some pixel
// after ten iterations.
#include <cmath>

#include "bilateral/lattice_filter.h"

namespace afa {
namespace AFA_ISA {

constexpr int64_t kMostClasses = 4096;
constexpr int64_t kMostKernels = 16;
constexpr float kNothing = -1e30f;  // a logit of channels that are none

static inline int64_t groups_of(const CrfStep& step) { return (step.unary.size[1] + kMostChannels - 1) / kMostChannels; }
static inline int64_t group_channels(const CrfStep& step, int64_t group) {
  return std::min(step.unary.size[1] - group * kMostChannels, kMostChannels);
}

static inline Tiles tiles_of(const CrfStep& step) { return Tiles(step.unary.size[2], step.unary.size[3], 0); }

struct CrfScratch {
  int64_t stride, block_floats, fetched_floats = 0, line_count;
  LatticeTables* tables;  // [groups][kernels]
  int64_t* fetched_at;    // [groups][kernels] where theirs are in `fetched`
  double* sums;           // [tiles][2]
  float *fetched, *block, *other, *lines;  // for each thread: a tile's rows, some logits, something like them, lines of planes

  CrfScratch(const CrfStep& step, int threads, Arena& arena) : stride(channel_row(step.unary.size[1])) {
    const Tiles tiles = tiles_of(step);
    tables = arena.take<LatticeTables>(groups_of(step) * step.count);
    fetched_at = arena.take<int64_t>(groups_of(step) * step.count);
    for (int64_t g = 0; g < groups_of(step); ++g)
      for (int64_t k = 0; k < step.count; ++k) {
        const TiledLattice& lattice = step.kernels[k].lattice;
        const LatticeTables taken(lattice, channel_row(group_channels(step, g)), arena);
        if (arena.base) tables[g * step.count + k] = taken, fetched_at[g * step.count + k] = fetched_floats;
        fetched_floats += round_up(lattice.most * taken.row, 16);
      }
    sums = arena.take<double>(tiles.count * 2);
    line_count = line_floats(stride, tiles);
    block_floats = std::max(kTileSide, tiles.wide) * stride;
    fetched = arena.take<float>(threads * fetched_floats);
    block = arena.take<float>(threads * block_floats);
    other = arena.take<float>(threads * block_floats);
    lines = arena.take<float>(threads * line_count);
  }
};

int64_t crf_base_floats(const CrfStep& step) { return step.unary.size[2] * step.unary.size[3] * channel_row(step.unary.size[1]); }
int64_t crf_bytes(const CrfStep& step, int threads) {
  Arena arena(nullptr);
  CrfScratch(step, threads, arena);
  return arena.used;
}

// logits += spread times the matrix, for one point.
static inline void spread_classes(const float* matrix, const float* spread, int64_t channels, int64_t stride, float* logits) {
  for (int64_t c = 0; c < stride; c += kLanes) {
    vfloat sum = load(logits + c);
    for (int64_t from = 0; from < channels; ++from) sum += spread[from] * load(matrix + from * round_up(channels, 16) + c);
    store(logits + c, sum);
  }
}

// In place; kVectors is 0 where their number is not known beforehand.
template <int kVectors>
static inline void softmax(float* rows, int64_t points, int64_t stride) {
  const int64_t width = kVectors ? kVectors * kLanes : stride;
  for (float* row = rows; row < rows + points * stride; row += stride) {
    vfloat highest = load(row), sum = {};
    for (int64_t c = kLanes; c < width; c += kLanes) highest = max_of(highest, load(row + c));
    highest = across(highest, [](vfloat a, vfloat b) { return max_of(a, b); });
    for (int64_t c = 0; c < width; c += kLanes) {
      const vfloat value = exp_of(load(row + c) - highest);
      store(row + c, value);
      sum += value;
    }
    const vfloat inverse = 1.0f / across(sum, [](vfloat a, vfloat b) { return a + b; });
    for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) * inverse);
  }
}
static inline void softmax(float* rows, int64_t points, int64_t stride) {
  if (stride > kMostChannels) return softmax<0>(rows, points, stride);
  with_vectors(stride, [&](auto vectors) { softmax<decltype(vectors)::value>(rows, points, stride); });
}

// What each thread has for itself.
struct Own {
  float *fetched, *block, *other, *lines;
  Own(const CrfScratch& scratch, int64_t thread)
      : fetched(scratch.fetched + thread * scratch.fetched_floats),
        block(scratch.block + thread * scratch.block_floats),
        other(scratch.other + thread * scratch.block_floats),
        lines(scratch.lines + thread * scratch.line_count) {}
};

// Calls function(kernel, its tables, where its part of `fetched` is, first channel) for each kernel and group.
template <class Function>
static inline void for_groups(const CrfStep& step, const CrfScratch& scratch, int64_t k, float* fetched, const Function& function) {
  for (int64_t g = 0; g < groups_of(step); ++g)
    function(scratch.tables[g * step.count + k], fetched + scratch.fetched_at[g * step.count + k], g * kMostChannels);
}

// What points get of a kernel, times `scale`, on top of `base`, which may be null.
static void take_share(const CrfStep& step, const CrfScratch& scratch, const Tile& points, int64_t k, float scale, const float* base,
                       float* to, float* fetched) {
  const CrfKernel& kernel = step.kernels[k];
  for_groups(step, scratch, k, fetched, [&](const LatticeTables& tables, const float* rows, int64_t c) {
    with_vectors(tables.row, [&](auto vectors) {
      slice<decltype(vectors)::value>(kernel.lattice, points, rows, scale * alpha(kernel.lattice), kernel.after, base ? base + c : nullptr,
                                      to + c, scratch.stride);
    });
  });
}

// Some points of tile t, from blurred vertices, or the unary, to its rows.
static void points_step(const CrfStep& step, const CrfScratch& scratch, int64_t t, const Tile& part, const Own& own, double* sums) {
  const int64_t channels = step.unary.size[1], stride = scratch.stride, points = part.points();
  float* base = step.base + part.first * stride;
  const float* logits = base;
  if (step.starts) side_by_side(step.unary, part, 0, channels, -1.0f, kNothing, own.lines, base, stride, stride);
  for (int64_t k = 0; k < (step.starts ? 0 : step.count); ++k) {
    if (const float* matrix = step.kernels[k].matrix) {
      take_share(step, scratch, part, k, 1.0f, nullptr, own.other, own.fetched);
      if (logits != own.block) std::copy_n(logits, points * stride, own.block);
      for (int64_t p = 0; p < points; ++p) spread_classes(matrix, own.other + p * stride, channels, stride, own.block + p * stride);
    } else {
      take_share(step, scratch, part, k, step.kernels[k].scale, logits, own.block, own.fetched);
    }
    logits = own.block;
  }
  if (logits != own.block) std::copy_n(logits, points * stride, own.block);
  if (step.before.data) {
    side_by_side(step.before, part, 0, channels, 1.0f, 0.0f, own.lines, own.other, stride, stride);
    for (int64_t p = 0; p < points; ++p)
      for (int64_t c = 0; c < channels; ++c) {
        const float q = own.other[p * stride + c];
        sums[1] += q * (std::log(q > 1e-20f ? q : 1e-20f) - own.block[p * stride + c]);
      }
  }
  softmax(own.block, points, stride);
  if (step.before.data)
    for (int64_t p = 0; p < points; ++p)
      for (int64_t c = 0; c < channels; ++c) sums[0] += std::fabs(own.block[p * stride + c] - own.other[p * stride + c]);
  if (step.out.data) apart(step.out, part, 0, channels, own.lines, own.block, stride, stride);
  for (int64_t k = 0; k < (step.goes_on ? step.count : 0); ++k)
    for_groups(step, scratch, k, own.fetched, [&](const LatticeTables& tables, const float*, int64_t c) {
      const CrfKernel& kernel = step.kernels[k];
      with_vectors(tables.row, [&](auto vectors) {
        splat<decltype(vectors)::value>(kernel.lattice, part, kernel.before, own.block + c, scratch.stride,
                                        tables.rows + kernel.lattice.first[t] * tables.row);
      });
    });
}

// A few rows of pixels at a time, whose logits then stay in the nearest cache.
static void tile_step(const CrfStep& step, const CrfScratch& scratch, int64_t t, const Tile& tile, const Own& own) {
  for (int64_t k = 0; k < step.count; ++k)
    for_groups(step, scratch, k, own.fetched, [&](const LatticeTables& tables, float* fetched, int64_t) {
      const TiledLattice& lattice = step.kernels[k].lattice;
      if (!step.starts)
        with_vectors(tables.row, [&](auto vectors) { fetch<decltype(vectors)::value>(lattice, t, tables.vertices, fetched); });
      if (step.goes_on) std::fill(tables.rows + lattice.first[t] * tables.row, tables.rows + lattice.first[t + 1] * tables.row, 0.0f);
    });
  double sums[2] = {};
  const int64_t rows = std::max<int64_t>(1, kTileSide / tile.width);
  for (int64_t y = 0; y < tile.height; y += rows) points_step(step, scratch, t, tile.part(y, rows), own, sums);
  scratch.sums[2 * t] = sums[0], scratch.sums[2 * t + 1] = sums[1];
}

Status crf_step(const CrfStep& step, void* workspace, int threads) {
  if (is_empty(step.unary) || step.unary.size[1] > kMostClasses || step.count > kMostKernels || !step.base ||
      (step.before.data && !step.sums))
    return Status::bad_argument;
  for (int64_t k = 0; k < step.count; ++k)
    if (step.kernels[k].lattice.height != step.unary.size[2] || step.kernels[k].lattice.width != step.unary.size[3] ||
        step.kernels[k].lattice.dims > kMostDimsOfTile)
      return Status::bad_argument;
  Arena arena(workspace);
  const CrfScratch scratch(step, threads, arena);
  const Tiles tiles = tiles_of(step);
  const TiledLattice* lattices[kMostKernels];
  for (int64_t k = 0; k < step.count; ++k) lattices[k] = &step.kernels[k].lattice;
#pragma omp parallel num_threads(threads)
  {
    const Own own(scratch, thread_number());
    for (int64_t g = 0; g < (step.starts ? 0 : groups_of(step)); ++g)
      blur_all(lattices, scratch.tables + g * step.count, step.count, false);
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < tiles.count; ++t) tile_step(step, scratch, t, tiles[t], own);
  }
  if (step.before.data) {
    step.sums[0] = step.sums[1] = 0;
    for (int64_t t = 0; t < 2 * tiles.count; ++t) step.sums[t % 2] += scratch.sums[t];
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t crf_base_floats(const CrfStep& step))
AFA_DECLARE_PER_ISA(int64_t crf_bytes(const CrfStep& step, int threads))
AFA_DECLARE_PER_ISA(Status crf_step(const CrfStep& step, void* workspace, int threads))

int64_t dense_crf_cpu_base(const CrfStep& step) { AFA_DISPATCH(crf_base_floats, step) }
int64_t dense_crf_cpu_workspace(const CrfStep& step, int threads) { AFA_DISPATCH(crf_bytes, step, threads) }
Status dense_crf_cpu(const CrfStep& step, void* workspace, int threads) { AFA_DISPATCH(crf_step, step, workspace, threads) }
#endif

}  // namespace afa
