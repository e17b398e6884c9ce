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
constexpr int kMostShifted = 4;  // channels whose neighbours fit beside their sums
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
  int32_t* shift;                      // [taps]: columns to the right
  int32_t* run;                        // [taps]: taps from this one on that are shifted out of the same vectors, or 0
  int32_t* present;                    // channels of the image at hand

  Layout(const DiffusionArgs& args, int threads, void* workspace) {
    height = args.masks.size[2], width = args.masks.size[3], taps = args.taps, channels = args.masks.size[1];
    reach_y = reach_x = 0;
    for (int64_t t = 0; t < taps; ++t) {
      reach_y = std::max<int64_t>(reach_y, std::abs(limit(args.offsets[2 * t], height)));
      reach_x = std::max<int64_t>(reach_x, std::abs(limit(args.offsets[2 * t + 1], width)));
    }
    margin = std::max<int64_t>(round_up(reach_x, 16), 16);
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
    shift = arena.take<int32_t>(taps);
    run = arena.take<int32_t>(taps);
    present = arena.take<int32_t>(channels);
    bytes = arena.used;
  }

  // Puts the weights into strips of columns, [row / strip][H][strip / kWeightBlock][taps][kWeightBlock]: a pass over rows of a
  // strip reads them one behind the other.
  void place_strips(int64_t strip) const {
    for (int64_t x = 0; x < row; x += kWeightBlock) {
      const int64_t begin = x / strip * strip, columns = std::min(strip, row - begin);
      block_start[x / kWeightBlock] = taps * (begin * height + x - begin), block_step[x / kWeightBlock] = taps * columns;
    }
  }
  // Where the taps read, with so many channels present.
  void place_taps(const int32_t* offsets, int64_t present_channels) const {
    for (int64_t t = 0; t < taps; ++t) {
      shift[t] = int32_t(limit(offsets[2 * t + 1], width));
      tap_steps[t] = limit(offsets[2 * t], height) * present_channels * mask_row + margin + shift[t];
    }
    for (int64_t t = taps - 1; t >= 0; --t) {
      const bool near = std::abs(shift[t]) <= kLanes, same = t + 1 < taps && offsets[2 * t] == offsets[2 * t + 2];
      run[t] = near ? 1 + (same ? run[t + 1] : 0) : 0;
    }
  }
  // [taps][kWeightBlock], column x being the first of its block.
  float* weights_at(int64_t y, int64_t x) const {
    return weights + block_start[x / kWeightBlock] + y * block_step[x / kWeightBlock];
  }
};

constexpr int kVectors = 2;  // of columns at once

// Adds one tap to the sums of kChannels channels. A load across cache lines takes twice as long as another.
template <int kChannels>
static inline void add_tap(const float* weights, const float* from, int64_t mask_row, vfloat (&sum)[kChannels][kVectors]) {
  vfloat weight[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kLanes);
#pragma GCC unroll 8
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[c][v] += weight[v] * load(from + c * mask_row + v * kLanes);
}

#if defined(__AVX512F__)
// Row s: lanes s, s + 1, ... of two vectors side by side.
struct Shifts {
  alignas(64) int32_t lane[kLanes + 1][kLanes];
  constexpr Shifts() : lane() {
    for (int s = 0; s <= kLanes; ++s)
      for (int i = 0; i < kLanes; ++i) lane[s][i] = s + i;
  }
};
static constexpr Shifts kShifts;

// Adds `count` taps of the same row, each within kLanes columns: the row's vectors are loaded once, whole, and shifted in
// registers. `row` points at channel 0 and the first of the columns.
template <int kChannels>
static inline void add_run(const float* weights, const int32_t* shift, int64_t count, const float* row, int64_t mask_row,
                           vfloat (&sum)[kChannels][kVectors]) {
  vfloat near[kChannels][kVectors + 2];
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors + 2; ++v) near[c][v] = load(row + c * mask_row + (v - 1) * kLanes);
  for (int64_t t = 0; t < count; ++t, weights += kWeightBlock) {
    vfloat weight[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kLanes);
    auto add = [&](auto shifted) {
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[c][v] += weight[v] * shifted(c, v);
    };
    const int32_t to = shift[t];
    if (to == 0) {
      add([&](int c, int v) { return near[c][v + 1]; });
      continue;
    }
    const __m512i lane = _mm512_load_si512(kShifts.lane[to < 0 ? to + kLanes : to]);
    auto joined = [&](vfloat a, vfloat b) { return (vfloat)_mm512_permutex2var_ps((__m512)a, lane, (__m512)b); };
    if (to < 0)
      add([&](int c, int v) { return joined(near[c][v], near[c][v + 1]); });
    else
      add([&](int c, int v) { return joined(near[c][v + 1], near[c][v + 2]); });
  }
}
#endif

// `kChannels` channels of kVectors vectors of columns, weights [taps][kWeightBlock]: sums in registers. `ahead` are as many weights
// that will be wanted next.
template <int kChannels, bool kShifted>
static inline void gather_columns(const float* weights, const float* ahead, const float* const* tap, const Layout& at, float* out,
                                  int64_t x) {
  vfloat sum[kChannels][kVectors] = {};
  const int64_t mask_row = at.mask_row;
  for (int64_t t = 0; t < at.taps; ++t) {
#if defined(__AVX512F__)
    if (const int64_t count = kShifted ? at.run[t] : 0) {
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(ahead + (t + i) * kWeightBlock, 0, 2);
      const float* row = tap[t] - at.shift[t] + x;
      if constexpr (kShifted) add_run<kChannels>(weights + t * kWeightBlock, at.shift + t, count, row, mask_row, sum);
      t += count - 1;
      continue;
    }
#endif
    __builtin_prefetch(ahead + t * kWeightBlock, 0, 2);
    add_tap<kChannels>(weights + t * kWeightBlock, tap[t] + x, mask_row, sum);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(out + c * mask_row + x + v * kLanes, sum[c][v]);
}

template <int kChannels, bool kShifted = false>
static void gather_block(const float* const* tap, const Layout& at, int64_t y, const float* ahead, float* out, int64_t begin,
                         int64_t end) {
  for (int64_t x = begin; x < end; x += kWeightBlock) {
    const float* weights = at.weights_at(y, x);
    for (int64_t i = 0; i < kWeightBlock; i += kVectors * kLanes)
      gather_columns<kChannels, kShifted>(weights + i, ahead ? ahead + (x - begin) * at.taps : weights, tap, at, out, x + i);
  }
}

typedef void (*GatherBlock)(const float* const*, const Layout&, int64_t, const float*, float*, int64_t, int64_t);
static const GatherBlock kGather[] = {nullptr,          gather_block<1>, gather_block<2>, gather_block<3>, gather_block<4>,
                                      gather_block<5>, gather_block<6>, gather_block<7>, gather_block<8>};
// For an image of so few channels; more of them in turn would bring the weights into L1 again for each few.
static const GatherBlock kGatherShifted[kMostShifted + 1] = {nullptr, gather_block<1>, gather_block<2, true>, gather_block<3, true>,
                                                             gather_block<4, true>};

// Columns [left, right), blocks of them, of row y of all channels. `tap[t]` points at channel 0 of the row and column that tap t
// reads for pixel 0.
static void gather_row(const float** tap, const Layout& at, int64_t channels, int64_t y, int64_t left, int64_t right,
                       const float* ahead, float* out) {
  for (int64_t begin = left; begin < right; begin += kColumnTile) {
    const int64_t end = std::min(begin + kColumnTile, right);
    for (int64_t c = 0; c < channels;) {
      // Equal blocks (7+7+7 rather than 8+8+5): the sums of a short block would leave registers idle.
      const int64_t blocks = (channels - c + kChannelBlock - 1) / kChannelBlock;
      const int64_t block = (channels - c + blocks - 1) / blocks;
      const float* next = ahead && c == 0 ? ahead + (begin - left) * at.taps : nullptr;
      (channels <= kMostShifted ? kGatherShifted : kGather)[block](tap, at, y, next, out + c * at.mask_row, begin, end);
      c += block;
      if (c == channels && begin + kColumnTile >= right) return;
      const int64_t step = c < channels ? block * at.mask_row : (block - channels) * at.mask_row;
      for (int64_t t = 0; t < at.taps; ++t) tap[t] += step;
    }
  }
}

}  // namespace AFA_ISA
}  // namespace afa
