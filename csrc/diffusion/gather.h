// One row of a diffusion step on the CPU: where rows lie, and the sum over taps for a stretch of columns.
#pragma once

#include <algorithm>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "diffusion/diffusion.h"

namespace afa {
namespace AFA_ISA {

#if defined(__AVX512F__)
constexpr int kChannelBlock = 8;  // 8 channels x 2 vectors of sums fit in 32 registers
#else
constexpr int kChannelBlock = 4;
#endif
constexpr int64_t kColumnTile = 128;  // columns done for all channels before moving on, so their weights stay in L1

// An offset past the image's edge reaches the same pixel as one that just leaves it.
static inline int64_t limit(int64_t offset, int64_t size) { return std::clamp(offset, -size, size); }

// Lengths, and places in the workspace.
struct Layout {
  int64_t height, width, taps, channels, reach_y, reach_x, margin, row, mask_row, bytes;
  float *weights, *first, *second;     // see weights_at; the masks that alternate, [H][present channels][mask_row]
  float *zeros, *accumulators;         // [channels][mask_row], for each thread another
  const float** tap_rows;              // [threads][taps]
  int64_t *block_start, *block_step;   // of each block of columns: its weights in row 0, and from a row to the next
  int64_t* tap_steps;                  // [taps]: from a pixel's channel 0 to what a tap reads there, if that is in the image
  int32_t* present;                    // channels of the image at hand

  Layout(const DiffusionArgs& args, int threads, void* workspace) {
    height = args.masks.size[2], width = args.masks.size[3], taps = args.taps, channels = args.masks.size[1];
    reach_y = reach_x = 0;
    for (int64_t t = 0; t < taps; ++t) {
      reach_y = std::max<int64_t>(reach_y, std::abs(limit(args.offsets[2 * t], height)));
      reach_x = std::max<int64_t>(reach_x, std::abs(limit(args.offsets[2 * t + 1], width)));
    }
    margin = round_up(reach_x, 16);
    row = round_up(width, kWeightBlock);
    mask_row = margin + row + margin;
    Arena arena(workspace);
    weights = arena.take<float>(height * taps * row);
    first = arena.take<float>(height * channels * mask_row);
    second = arena.take<float>(height * channels * mask_row);
    zeros = arena.take<float>(channels * mask_row);
    accumulators = arena.take<float>(threads * channels * mask_row);
    tap_rows = arena.take<const float*>(threads * taps);
    block_start = arena.take<int64_t>(row / kWeightBlock);
    block_step = arena.take<int64_t>(row / kWeightBlock);
    tap_steps = arena.take<int64_t>(taps);
    present = arena.take<int32_t>(channels);
    bytes = arena.used;
  }

  // Puts the weights into strips of columns, [row / strip][H][strip / kWeightBlock][taps][kWeightBlock]: a pass over rows of a strip reads them
  // one behind the other.
  void place_strips(int64_t strip) const {
    for (int64_t x = 0; x < row; x += kWeightBlock) {
      const int64_t begin = x / strip * strip, columns = std::min(strip, row - begin);
      block_start[x / kWeightBlock] = taps * (begin * height + x - begin), block_step[x / kWeightBlock] = taps * columns;
    }
  }
  // [taps][kWeightBlock], column x being the first of its block.
  float* weights_at(int64_t y, int64_t x) const { return weights + block_start[x / kWeightBlock] + y * block_step[x / kWeightBlock]; }
};

// `kChannels` channels, `kVectors` vectors of columns, weights [taps][kWeightBlock]: sums in registers.
template <int kChannels, int kVectors>
static inline void gather_columns(const float* weights, const float* const* tap, const Layout& at, float* out, int64_t x) {
  vfloat sum[kChannels][kVectors] = {};
  for (int64_t t = 0; t < at.taps; ++t) {
    const float* from = tap[t] + x;
    vfloat weight[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + t * kWeightBlock + v * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[c][v] += weight[v] * load(from + c * at.mask_row + v * kLanes);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(out + c * at.mask_row + x + v * kLanes, sum[c][v]);
}

template <int kChannels>
static void gather_block(const float* const* tap, const Layout& at, int64_t y, float* out, int64_t begin, int64_t end) {
  for (int64_t x = begin; x < end; x += kWeightBlock) {
    const float* weights = at.weights_at(y, x);
    for (int64_t i = 0; i < kWeightBlock; i += 2 * kLanes) gather_columns<kChannels, 2>(weights + i, tap, at, out, x + i);
  }
}

typedef void (*GatherBlock)(const float* const*, const Layout&, int64_t, float*, int64_t, int64_t);
static const GatherBlock kGather[] = {nullptr,          gather_block<1>, gather_block<2>, gather_block<3>, gather_block<4>,
                                      gather_block<5>, gather_block<6>, gather_block<7>, gather_block<8>};

// Columns [left, right), blocks of them, of row y of all channels. `tap[t]` points at channel 0 of the row and column that tap t
// reads for pixel 0.
static void gather_row(const float** tap, const Layout& at, int64_t channels, int64_t y, int64_t left, int64_t right, float* out) {
  for (int64_t begin = left; begin < right; begin += kColumnTile) {
    const int64_t end = std::min(begin + kColumnTile, right);
    for (int64_t c = 0; c < channels;) {
      // Equal blocks (7+7+7 rather than 8+8+5): the sums of a short block would leave registers idle.
      const int64_t blocks = (channels - c + kChannelBlock - 1) / kChannelBlock;
      const int64_t block = (channels - c + blocks - 1) / blocks;
      kGather[block](tap, at, y, out + c * at.mask_row, begin, end);
      c += block;
      if (c == channels && begin + kColumnTile >= right) return;
      const int64_t step = c < channels ? block * at.mask_row : (block - channels) * at.mask_row;
      for (int64_t t = 0; t < at.taps; ++t) tap[t] += step;
    }
  }
}

}  // namespace AFA_ISA
}  // namespace afa
