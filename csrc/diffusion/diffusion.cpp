// Diffusion on the CPU.
//
// Data flow, one image at a time, every thread owning a fixed band of rows: the weights go to float32 as [H][T][row], so one
// pixel row's taps lie together (T * W * 4 bytes, in L1/L2); the masks go to [H][C][margin + row], whose horizontal margins
// hold the border, while the vertical border is a matter of pointing a tap at row 0 or H-1. An iteration then is, for each
// pixel row, one fused multiply-add per tap, channel and pixel with the sums in registers; iterations alternate two buffers
// with a barrier between. Sums run over taps in order and never across threads: the same bits for any thread count.
// Floor: T*C*H*W fused multiply-adds and T*H*W*4 bytes of weights per iteration. Bound: L2 and L3 bandwidth for few channels,
// the two loads per cycle for many.
#include "diffusion/diffusion.h"

#include <algorithm>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

#if defined(__AVX512F__)
constexpr int kChannelBlock = 8;  // 8 channels x 2 vectors of sums fit in 32 registers
#else
constexpr int kChannelBlock = 4;
#endif
constexpr int kColumnTile = 128;  // columns done for all channels before moving on, so their weights stay in L1

// Lengths, and places in the workspace.
struct Layout {
  int64_t height, width, taps, channels, margin, row, mask_row, bytes;
  float *weights, *first, *second;  // [H][taps][row]; the masks that alternate, [H][present channels][mask_row]
  float *zeros, *accumulators;      // [channels][mask_row], for each thread another
  const float** tap_rows;           // [threads][taps]
  int32_t* present;                 // channels of the image at hand

  Layout(const DiffusionArgs& args, int threads, void* workspace) {
    height = args.masks.size[2], width = args.masks.size[3], taps = args.taps, channels = args.masks.size[1];
    int64_t reach = 0;
    for (int64_t t = 0; t < taps; ++t) reach = std::max<int64_t>(reach, std::abs(int64_t(args.offsets[2 * t + 1])));
    margin = round_up(std::min(reach, width), 16);
    row = round_up(width, 32);
    mask_row = margin + row + margin;
    Arena arena(workspace);
    weights = arena.take<float>(height * taps * row);
    first = arena.take<float>(height * channels * mask_row);
    second = arena.take<float>(height * channels * mask_row);
    zeros = arena.take<float>(channels * mask_row);
    accumulators = arena.take<float>(threads * channels * mask_row);
    tap_rows = arena.take<const float*>(threads * taps);
    present = arena.take<int32_t>(channels);
    bytes = arena.used;
  }
};

// An offset past the image's edge reaches the same pixel as one that just leaves it.
static inline int64_t limit(int64_t offset, int64_t size) { return std::clamp(offset, -size, size); }

// Writes the horizontal border of one row: its first and last pixel repeated, or zeros.
static void fill_margins(float* pixels, const Layout& at, Border border) {
  const float left = border == Border::replicate ? pixels[0] : 0.0f;
  const float right = border == Border::replicate ? pixels[at.width - 1] : 0.0f;
  for (int64_t x = -at.margin; x < 0; ++x) pixels[x] = left;
  for (int64_t x = at.width; x < at.row + at.margin; ++x) pixels[x] = right;
}

// `kChannels` channels of one row, columns [begin, end): sums in registers, `kVectors` vectors wide.
template <int kChannels, int kVectors>
static inline void gather_columns(const float* weights, const float* const* tap, const Layout& at, float* out, int64_t x) {
  vfloat sum[kChannels][kVectors] = {};
  for (int64_t t = 0; t < at.taps; ++t) {
    const float* from = tap[t] + x;
    vfloat weight[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + t * at.row + x + v * kLanes);
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
static void gather_block(const float* weights, const float* const* tap, const Layout& at, float* out, int64_t begin,
                         int64_t end) {
  for (int64_t x = begin; x < end; x += 2 * kLanes) gather_columns<kChannels, 2>(weights, tap, at, out, x);
}

typedef void (*GatherBlock)(const float*, const float* const*, const Layout&, float*, int64_t, int64_t);
static const GatherBlock kGather[] = {nullptr,          gather_block<1>, gather_block<2>, gather_block<3>, gather_block<4>,
                                      gather_block<5>, gather_block<6>, gather_block<7>, gather_block<8>};

// One row of all channels. `tap[t]` points at channel 0 of the row and column that tap t reads for pixel 0.
static void gather_row(const float* weights, const float** tap, const Layout& at, int64_t channels, float* out) {
  for (int64_t begin = 0; begin < at.width; begin += kColumnTile) {
    const int64_t end = std::min(begin + kColumnTile, at.row);
    for (int64_t c = 0; c < channels;) {
      // Equal blocks (7+7+7 rather than 8+8+5): the sums of a short block would leave registers idle.
      const int64_t blocks = (channels - c + kChannelBlock - 1) / kChannelBlock;
      const int64_t block = (channels - c + blocks - 1) / blocks;
      kGather[block](weights, tap, at, out + c * at.mask_row, begin, end);
      for (int64_t t = 0; t < at.taps; ++t) tap[t] += block * at.mask_row;
      c += block;
    }
    for (int64_t t = 0; t < at.taps; ++t) tap[t] -= channels * at.mask_row;
  }
}

// Adds what row `from_y` of the incoming gradient sends through tap (dx) into `sum`, a row with margins.
static void scatter_row(const float* weights, const float* from, int64_t dx, const Layout& at, int64_t channels, float* sum) {
  for (int64_t c = 0; c < channels; ++c) {
    const float* source = from + c * at.mask_row;
    float* target = sum + c * at.mask_row + dx;
    for (int64_t x = 0; x < at.width; x += kLanes)
      store(target + x, load(target + x) + load(weights + x) * load(source + x));
  }
}

// One row of the adjoint: every (row, tap) whose neighbour is row y, in a fixed order, then the margins folded back.
static void adjoint_row(const float* all_weights, const float* from, const DiffusionArgs& args, const Layout& at,
                        int64_t channels, int64_t y, float* sum, float* out) {
  const int64_t channel_rows = channels * at.mask_row;
  std::fill(sum, sum + channel_rows, 0.0f);
  float* pixels = sum + at.margin;
  for (int64_t t = 0; t < at.taps; ++t) {
    const int64_t dy = args.offsets[2 * t], dx = limit(args.offsets[2 * t + 1], at.width);
    int64_t low = y - dy, high = y - dy;
    if (args.border == Border::replicate) {
      if (y == 0) low = 0;
      if (y == at.height - 1) high = at.height - 1;
      if (y == 0 && at.height > 1) high = std::min(-dy, at.height - 1);
      if (y == at.height - 1 && at.height > 1) low = std::max(at.height - 1 - dy, int64_t(0));
    }
    for (int64_t source = std::max(low, int64_t(0)); source <= std::min(high, at.height - 1); ++source)
      scatter_row(all_weights + (source * at.taps + t) * at.row, from + source * channel_rows + at.margin, dx, at, channels,
                  pixels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    float* line = pixels + c * at.mask_row;
    if (args.border == Border::replicate) {
      for (int64_t x = -at.margin; x < 0; ++x) line[0] += line[x];
      for (int64_t x = at.width; x < at.width + at.margin; ++x) line[at.width - 1] += line[x];
    }
    std::copy(line, line + at.width, out + c * at.mask_row + at.margin);
  }
}

// One thread's part of one image, of which `channels` are present.
static void image_rows(const DiffusionArgs& args, const WeightSource& source, const Layout& at, int64_t b, int64_t channels) {
  const int64_t thread = thread_number(), team = team_size();
  const int64_t begin = at.height * thread / team, end = at.height * (thread + 1) / team;
  const int64_t channel_rows = channels * at.mask_row;
  const float** tap = at.tap_rows + thread * at.taps;
  float *from = at.first, *to = at.second;
  // The adjoint must not pick up columns past the width; the forward replicates into its margins.
  const Border margins = args.transpose ? Border::zero : args.border;
  auto pixels = [&](float* buffer, int64_t y, int64_t c) { return buffer + y * channel_rows + c * at.mask_row + at.margin; };

  if (source.prepare)
    for (int64_t y = begin; y < end; ++y) source.prepare(source.context, b, y);
  for (int64_t y = begin; y < end; ++y)
    for (int64_t c = 0; c < channels; ++c) {
      load_row(args.masks, b, at.present[c], y, pixels(from, y, c));
      fill_margins(pixels(from, y, c), at, margins);
    }
#pragma omp barrier
  for (int64_t y = begin; y < end && args.num_iter > 0; ++y)
    source.fill(source.context, b, y, at.row, at.weights + y * at.taps * at.row);
  if (args.transpose) {
#pragma omp barrier  // the adjoint reads other rows' weights
  }
  for (int64_t iteration = 0; iteration < args.num_iter; ++iteration) {
    for (int64_t y = begin; y < end; ++y) {
      if (args.transpose) {
        adjoint_row(at.weights, from, args, at, channels, y, at.accumulators + thread * at.channels * at.mask_row,
                    to + y * channel_rows);
      } else {
        for (int64_t t = 0; t < at.taps; ++t) {
          const int64_t wanted = y + args.offsets[2 * t], row = std::clamp(wanted, int64_t(0), at.height - 1);
          const float* base = row == wanted || args.border == Border::replicate ? from + row * channel_rows : at.zeros;
          tap[t] = base + at.margin + limit(args.offsets[2 * t + 1], at.width);
        }
        gather_row(at.weights + y * at.taps * at.row, tap, at, channels, to + y * channel_rows + at.margin);
      }
      for (int64_t c = 0; c < channels; ++c) fill_margins(pixels(to, y, c), at, margins);
    }
    std::swap(from, to);
#pragma omp barrier
  }
  for (int64_t y = begin; y < end; ++y)
    for (int64_t c = 0; c < channels; ++c) store_row(args.out, b, at.present[c], y, pixels(from, y, c));
}

Status diffuse_with(const DiffusionArgs& args, const WeightSource& source, void* workspace, int threads) {
  if (args.taps < 1 || args.num_iter < 0 || threads < 1) return Status::bad_argument;
  if (!same_size(args.masks, args.out) || is_empty(args.masks)) return Status::bad_argument;
  const Layout at(args, threads, workspace);
  std::fill(at.zeros, at.zeros + at.channels * at.mask_row, 0.0f);
  for (int64_t b = 0; b < args.masks.size[0]; ++b) {
    const int64_t channels = present_channels(args.class_mask, b, args.out, at.zeros, at.present);
    if (channels == 0) continue;
#pragma omp parallel num_threads(threads)
    image_rows(args, source, at, b, channels);
  }
  return Status::ok;
}

// Weights given as a tensor: copied row by row to [T][row] float32, whatever their type and strides.
static void fill_from_tensor(const void* context, int64_t b, int64_t y, int64_t row, float* weights) {
  const View<4>& view = *static_cast<const View<4>*>(context);
  for (int64_t t = 0; t < view.size[1]; ++t) {
    load_row(view, b, t, y, weights + t * row);
    std::fill(weights + t * row + view.size[3], weights + (t + 1) * row, 0.0f);
  }
}

int64_t diffuse_bytes(const DiffusionArgs& args, int threads) { return Layout(args, threads, nullptr).bytes; }

Status diffuse_tensor(const DiffusionArgs& args, void* workspace, int threads) {
  if (args.weights.size[1] != args.taps || !same_images(args.weights, args.masks)) return Status::bad_argument;
  return diffuse_with(args, WeightSource{nullptr, fill_from_tensor, &args.weights}, workspace, threads);
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
int64_t diffuse_cpu_workspace(const DiffusionArgs& args, int threads) { return baseline::diffuse_bytes(args, threads); }
Status diffuse_cpu(const DiffusionArgs& args, void* workspace, int threads) {
  AFA_DISPATCH(diffuse_tensor, args, workspace, threads)
}
#endif

}  // namespace afa
