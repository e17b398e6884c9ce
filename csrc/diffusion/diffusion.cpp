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

#include "common/simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace afa {
namespace AFA_ISA {

#if defined(__AVX512F__)
constexpr int kChannelBlock = 8;  // 8 channels x 2 vectors of sums fit in 32 registers
#else
constexpr int kChannelBlock = 4;
#endif
constexpr int kColumnTile = 128;  // columns done for all channels before moving on, so their weights stay in L1

// Lengths and places in the workspace. Offsets count floats.
struct Layout {
  int64_t height, width, taps, channels, margin, row, mask_row;
  int64_t weights, first, second, zeros, accumulator, tap_rows, channel_list, total;

  Layout(const DiffusionArgs& args, int threads) {
    height = args.masks.size[2], width = args.masks.size[3], taps = args.taps, channels = args.masks.size[1];
    int64_t reach = 0;
    for (int64_t t = 0; t < taps; ++t) reach = std::max<int64_t>(reach, std::abs(int64_t(args.offsets[2 * t + 1])));
    margin = round_up(std::min(reach, width), 16);
    row = round_up(width, 32);
    mask_row = margin + row + margin;
    int64_t at = 0;
    auto take = [&at](int64_t count) {
      int64_t here = at;
      at += round_up(count, 16);
      return here;
    };
    weights = take(height * taps * row);
    first = take(height * channels * mask_row);
    second = take(height * channels * mask_row);
    zeros = take(channels * mask_row);
    accumulator = take(int64_t(threads) * channels * mask_row);
    tap_rows = take(int64_t(threads) * taps * 2);  // pointers
    channel_list = take(channels);                 // int32
    total = at;
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

// One thread's part of one image: rows [begin, end).
static void image_rows(const DiffusionArgs& args, const WeightSource& source, const Layout& at, float* work, int64_t b,
                       const int32_t* channel_of, int64_t channels, int64_t begin, int64_t end, int thread,
                       const float** tap) {
  const int64_t channel_rows = channels * at.mask_row;
  float *from = work + at.first, *to = work + at.second;
  const float* zeros = work + at.zeros;
  // The adjoint must not pick up columns past the width; the forward replicates into its margins.
  const Border margins = args.transpose ? Border::zero : args.border;
  auto pixels = [&](float* buffer, int64_t y, int64_t c) { return buffer + y * channel_rows + c * at.mask_row + at.margin; };

  if (source.prepare)
    for (int64_t y = begin; y < end; ++y) source.prepare(source.context, b, y);
  for (int64_t y = begin; y < end; ++y)
    for (int64_t c = 0; c < channels; ++c) {
      load_row(args.masks, b, channel_of[c], y, pixels(from, y, c));
      fill_margins(pixels(from, y, c), at, margins);
    }
#pragma omp barrier
  for (int64_t y = begin; y < end && args.num_iter > 0; ++y)
    source.fill(source.context, b, y, at.row, work + at.weights + y * at.taps * at.row);
  if (args.transpose) {
#pragma omp barrier  // the adjoint reads other rows' weights
  }
  for (int64_t iteration = 0; iteration < args.num_iter; ++iteration) {
    for (int64_t y = begin; y < end; ++y) {
      if (args.transpose) {
        adjoint_row(work + at.weights, from, args, at, channels, y, work + at.accumulator + thread * at.channels * at.mask_row,
                    to + y * channel_rows);
      } else {
        for (int64_t t = 0; t < at.taps; ++t) {
          const int64_t wanted = y + args.offsets[2 * t], row = std::clamp(wanted, int64_t(0), at.height - 1);
          const float* base = row == wanted || args.border == Border::replicate ? from + row * channel_rows : zeros;
          tap[t] = base + at.margin + limit(args.offsets[2 * t + 1], at.width);
        }
        gather_row(work + at.weights + y * at.taps * at.row, tap, at, channels, to + y * channel_rows + at.margin);
      }
      for (int64_t c = 0; c < channels; ++c) fill_margins(pixels(to, y, c), at, margins);
    }
    std::swap(from, to);
#pragma omp barrier
  }
  for (int64_t y = begin; y < end; ++y)
    for (int64_t c = 0; c < channels; ++c) store_row(args.out, b, channel_of[c], y, pixels(from, y, c));
}

Status diffuse_with(const DiffusionArgs& args, const WeightSource& source, void* workspace, int threads) {
  if (args.taps < 1 || args.num_iter < 0 || threads < 1) return Status::bad_argument;
  for (int i = 0; i < 4; ++i)
    if (args.masks.size[i] != args.out.size[i] || args.masks.size[i] < 1) return Status::bad_argument;
  const Layout at(args, threads);
  float* work = static_cast<float*>(workspace);
  std::fill(work + at.zeros, work + at.zeros + at.channels * at.mask_row, 0.0f);
  int32_t* channel_of = reinterpret_cast<int32_t*>(work + at.channel_list);
  const float** taps = reinterpret_cast<const float**>(work + at.tap_rows);
  for (int64_t b = 0; b < args.masks.size[0]; ++b) {
    int64_t present = 0;
    for (int64_t c = 0; c < at.channels; ++c) {
      if (!args.class_mask || args.class_mask[b * at.channels + c])
        channel_of[present++] = int32_t(c);
      else
        for (int64_t y = 0; y < at.height; ++y) store_row(args.out, b, c, y, work + at.zeros);
    }
    if (present == 0) continue;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
      const int thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
      const int thread = 0, team = 1;
#endif
      image_rows(args, source, at, work, b, channel_of, present, at.height * thread / team,
                 at.height * (thread + 1) / team, thread, taps + thread * at.taps);
    }
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

int64_t diffuse_bytes(const DiffusionArgs& args, int threads) { return Layout(args, threads).total * 4; }

Status diffuse_tensor(const DiffusionArgs& args, void* workspace, int threads) {
  if (args.weights.size[1] != args.taps) return Status::bad_argument;
  for (int i : {0, 2, 3})
    if (args.weights.size[i] != args.masks.size[i]) return Status::bad_argument;
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
