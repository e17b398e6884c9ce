// PAR and PAMR weights on the CPU; their diffusion is diffusion/diffusion.cpp's.
//
// Data flow: the image goes to float32 rows with replicated margins once; then, for each pixel row, two vectors of pixels at a time
// copy each colour's neighbours, which lie across cache lines, to a table of whole vectors, with their mean on the way, and walk that:
// squared deviation; then all colours' tables at once: kappa with its maximum; exponential with its sum. Two vectors, for each of these
// is a chain of sums. Deviations are taken from the
// first neighbour and then from the mean, so a constant neighbourhood has a standard deviation of exactly 0, as the formula's
// 1e-8 expects. A stretch in which a square overflows (pixels beyond 1e18) is done once more with shrunken pixels.
// Floor: 8*D exponentials and 3 * 8*D loads across lines per pixel. Bound: arithmetic, about 30 operations per weight.
#include "par/par.h"

#include <algorithm>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

constexpr int kVectors = 2, kStretch = kVectors * kLanes;  // pixels at once

struct ParRows {
  ParArgs args;
  const int32_t* offsets;   // [taps][2]
  const float* position;    // [taps]
  int64_t taps, height, width, colours, margin, image_row;
  float centres, count;     // values a deviation is taken of: PAMR has the centre among them, once for each dilation
  float* image;             // [H][colours][margin + row + margin]
  float* tables;            // of each thread: [colours][taps + 2][kStretch], see Colour
  const float** tap;        // of each thread: [taps], what a tap reads for column 0 of the row at hand
  int64_t bytes;

  ParRows(const ParArgs& par, const int32_t* tap_offsets, const float* tap_position, void* memory, int threads)
      : args(par), offsets(tap_offsets), position(tap_position), taps(8 * par.num_dilations), height(par.images.size[2]),
        width(par.images.size[3]), colours(par.images.size[1]),
        centres(par.variant == ParVariant::pamr ? float(par.num_dilations) : 0.0f), count(float(taps) + centres) {
    int64_t reach = 0;
    for (int64_t i = 0; i < par.num_dilations; ++i) reach = std::max<int64_t>(reach, par.dilations[i]);
    margin = round_up(std::min(reach, width), 16);
    image_row = margin + round_up(width, kWeightBlock) + margin;
    Arena arena(memory);
    image = arena.take<float>(height * colours * image_row);
    tables = arena.take<float>(threads * most_table_floats());
    tap = arena.take<const float*>(threads * taps);
    bytes = arena.used;
  }
  int64_t table_floats() const { return (taps + 2) * kStretch; }
  int64_t most_table_floats() const { return colours * (taps + 2) * kWeightBlock; }  // as many for every instruction set
  // Row y of colour c, at column 0; rows and columns outside are their nearest pixel.
  const float* at(int64_t y, int64_t c) const {
    return image + (std::clamp(y, int64_t(0), height - 1) * colours + c) * image_row + margin;
  }
};

static void prepare_row(const void* context, int64_t b, int64_t y) {
  const ParRows& rows = *static_cast<const ParRows*>(context);
  for (int64_t c = 0; c < rows.colours; ++c) {
    float* pixels = const_cast<float*>(rows.at(y, c));
    load_row(rows.args.images, b, c, y, pixels);
    std::fill(pixels - rows.margin, pixels, pixels[0]);
    std::fill(pixels + rows.width, pixels + rows.image_row - rows.margin, pixels[rows.width - 1]);
  }
}

// What a colour of a stretch of pixels comes to. In a thread's table its neighbours lie as whole vectors, [taps][kStretch], then the
// pixels themselves and, once known, 1 / (the divisor of their differences).
struct Colour {
  float* table;
  int64_t taps;
  float* neighbour(int64_t t, int v) const { return table + t * kStretch + v * kLanes; }
  float* centre(int v) const { return neighbour(taps, v); }
  float* inverse(int v) const { return neighbour(taps + 1, v); }
};

// Copies the neighbours, and sums up how far they, and PAMR's centres, are from the first one.
static inline void copy_and_sum(const ParRows& rows, const float* const* tap, int64_t from, const Colour& to, vfloat* sum) {
  vfloat origin[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    origin[v] = load(tap[0] + from + v * kLanes);
    sum[v] = (load(to.centre(v)) - origin[v]) * rows.centres;
  }
  for (int64_t t = 0; t < rows.taps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const vfloat pixels = load(tap[t] + from + v * kLanes);
      store(to.neighbour(t, v), pixels);
      sum[v] += pixels - origin[v];
    }
}

// Squared deviations of the neighbours, and of PAMR's centres, from their mean, summed. Shrunk: of pixels times kShrink, whose
// squares overflow for no float.
constexpr float kShrink = 0x1p-80f;
template <bool kShrunk>
static inline void squares_of(const ParRows& rows, const Colour& of, const vfloat* sum, vfloat* squares) {
  auto shrunk = [](vfloat pixels) { return kShrunk ? pixels * kShrink : pixels; };
  vfloat origin[kVectors], mean[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    origin[v] = shrunk(load(of.neighbour(0, v)));
    const vfloat away = shrunk(load(of.centre(v))) - origin[v];
    mean[v] = kShrunk ? away * rows.centres : sum[v];
    squares[v] = away;
  }
  for (int64_t t = 0; kShrunk && t < rows.taps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) mean[v] += shrunk(load(of.neighbour(t, v))) - origin[v];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    mean[v] = mean[v] / rows.count;
    squares[v] = (squares[v] - mean[v]) * (squares[v] - mean[v]) * rows.centres;
  }
  for (int64_t t = 0; t < rows.taps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const vfloat deviation = shrunk(load(of.neighbour(t, v))) - origin[v] - mean[v];
      squares[v] += deviation * deviation;
    }
}

// `finite` stays 0 unless squares overflow, which kWide mends.
template <bool kWide>
static inline void inverse_divisor(const ParRows& rows, const Colour& of, const vfloat* sum, vfloat* finite) {
  const bool pamr = rows.args.variant == ParVariant::pamr;
  vfloat squares[kVectors], small[kVectors];
  squares_of<false>(rows, of, sum, squares);
  if constexpr (kWide) squares_of<true>(rows, of, sum, small);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    vfloat sigma = root_of(squares[v] / (rows.count - 1.0f));
    if constexpr (kWide) {
      const vfloat wide = root_of(small[v] / (rows.count - 1.0f)) * (1.0f / kShrink);
      sigma = squares[v] * 0.0f == 0.0f ? sigma : wide;
    } else {
      *finite += squares[v] * 0.0f;
    }
    store(of.inverse(v), pamr ? 1.0f / (sigma * 0.1f + 1e-8f) : 1.0f / ((sigma + 1e-8f) * rows.args.w1));
  }
}

// kappa of the tables' pixels, [taps][block], and the highest of each pixel.
static inline void sum_colours(const ParRows& rows, int64_t colours, int64_t block, const float* tables, float* kappa, vfloat* highest) {
  const vfloat share = splat(-1.0f / float(rows.colours));
  const bool pamr = rows.args.variant == ParVariant::pamr;
  const int64_t table = rows.table_floats(), centre = rows.taps * kStretch, inverse = centre + kStretch;
  for (int64_t t = 0; t < rows.taps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      vfloat total = {};
#pragma GCC unroll 3
      for (int64_t c = 0; c < colours; ++c) {
        const float* own = tables + c * table + v * kLanes;
        const vfloat distance = (load(own + t * kStretch) - load(own + centre)) * load(own + inverse);
        // Where a colour's sigma is 0 its kappa is about 1e15, the same for all taps: rounded before the others join it, or what
        // they change in the last place, 6e7, would decide between the taps.
        const vfloat part = rounded((pamr ? abs_of(distance) : distance * distance) * share);
        total = c == 0 ? part : total + part;
      }
      highest[v] = t == 0 ? total : max_of(highest[v], total);
      store(kappa + t * block + v * kLanes, total);
    }
}

// kappa of columns [x, x + kStretch), [taps][block], and the highest of each.
template <bool kWide>
static inline void kappas(const ParRows& rows, int64_t y, int64_t x, int64_t block, const float* const* tap, float* tables,
                          float* kappa, vfloat* highest, vfloat* finite) {
  for (int64_t c = 0; c < rows.colours; ++c) {
    const Colour colour = {tables + c * rows.table_floats(), rows.taps};
    vfloat sum[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(colour.centre(v), load(rows.at(y, c) + x + v * kLanes));
    copy_and_sum(rows, tap, c * rows.image_row + x, colour, sum);
    inverse_divisor<kWide>(rows, colour, sum, finite);
  }
  if (rows.colours == 3)
    sum_colours(rows, 3, block, tables, kappa, highest);
  else
    sum_colours(rows, rows.colours, block, tables, kappa, highest);
}

// In place of kappa: its softmax and the position term.
static inline void softmax(const ParRows& rows, int64_t block, const vfloat* highest, float* weights) {
  auto at = [&](int64_t t, int v) { return weights + t * block + v * kLanes; };
  vfloat sum[kVectors] = {}, inverse[kVectors];
  // The maximum is one of the stored values, rounded; it is taken off them as they are stored, never off a product.
  for (int64_t t = 0; t < rows.taps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const vfloat value = exp_of(load(at(t, v)) - highest[v]);
      store(at(t, v), value);
      sum[v] += value;
    }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) inverse[v] = 1.0f / sum[v];
  for (int64_t t = 0; t < rows.taps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(at(t, v), load(at(t, v)) * inverse[v] + rows.position[t]);
}

// One block of columns from `left` on: [taps][block].
static void fill_block(const ParRows& rows, int64_t y, int64_t left, int64_t block, const float* const* tap, float* tables,
                       float* weights) {
  const int64_t inside = std::min(block, rows.width - left);  // columns
  for (int64_t i = 0; i < inside; i += kStretch) {
    vfloat finite = {}, highest[kVectors];
    kappas<false>(rows, y, left + i, block, tap, tables, weights + i, highest, &finite);
    if (!(sum_of(finite) == 0.0f)) kappas<true>(rows, y, left + i, block, tap, tables, weights + i, highest, &finite);
    softmax(rows, block, highest, weights + i);
  }
  for (int64_t t = 0; t < rows.taps; ++t) std::fill(weights + t * block + inside, weights + (t + 1) * block, 0.0f);
}

static void fill_row(const void* context, int64_t, int64_t y, int64_t x, int64_t columns, int64_t block, float* weights) {
  const ParRows& rows = *static_cast<const ParRows*>(context);
  const float** tap = rows.tap + thread_number() * rows.taps;
  float* tables = rows.tables + thread_number() * rows.most_table_floats();
  for (int64_t t = 0; t < rows.taps; ++t)
    tap[t] = rows.at(y + rows.offsets[2 * t], 0) + std::clamp<int64_t>(rows.offsets[2 * t + 1], -rows.width, rows.width);
  for (int64_t left = x; left < x + columns; left += block, weights += rows.taps * block)
    fill_block(rows, y, left, block, tap, tables, weights);
}

int64_t par_bytes(const ParArgs& args, int threads) { return ParRows(args, nullptr, nullptr, nullptr, threads).bytes; }

Status par_diffuse(const ParArgs& args, const DiffusionArgs& diffusion, const float* position, void* workspace, int threads) {
  const ParRows rows(args, diffusion.offsets, position, workspace, threads);
  if (!same_images(args.images, diffusion.masks)) return Status::bad_argument;
  return diffuse_with(diffusion, WeightSource{prepare_row, fill_row, &rows}, static_cast<char*>(workspace) + rows.bytes, threads);
}

Status par_weights(const ParArgs& args, const View<4>& out, const int32_t* offsets, const float* position, void* workspace,
                   int threads) {
  const ParRows rows(args, offsets, position, workspace, threads);
  const int64_t row = round_up(rows.width, kWeightBlock);
  float* lines = reinterpret_cast<float*>(static_cast<char*>(workspace) + rows.bytes);  // [threads][taps][row]
  for (int64_t b = 0; b < out.size[0]; ++b) {
#pragma omp parallel num_threads(threads)
    {
      float* line = lines + thread_number() * rows.taps * row;
#pragma omp for schedule(static)
      for (int64_t y = 0; y < rows.height; ++y) prepare_row(&rows, b, y);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < rows.height; ++y) {
        fill_row(&rows, b, y, 0, row, row, line);
        for (int64_t t = 0; t < rows.taps; ++t) store_row(out, b, t, y, line + t * row);
      }
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA
}  // namespace afa

#if AFA_ISA_IS_BASELINE
#include <vector>

namespace afa {

AFA_DECLARE_PER_ISA(int64_t par_bytes(const ParArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status par_diffuse(const ParArgs& args, const DiffusionArgs& diffusion, const float* position,
                                       void* workspace, int threads))
AFA_DECLARE_PER_ISA(Status par_weights(const ParArgs& args, const View<4>& out, const int32_t* offsets,
                                       const float* position, void* workspace, int threads))

struct Taps {
  std::vector<int32_t> offsets;
  std::vector<float> position;
  explicit Taps(const ParArgs& args) : offsets(16 * args.num_dilations), position(8 * args.num_dilations) {
    par_offsets(args.dilations, args.num_dilations, offsets.data());
    par_position_weights(args, position.data());
  }
};

static DiffusionArgs with_taps(DiffusionArgs diffusion, const Taps& taps) {
  diffusion.offsets = taps.offsets.data();
  diffusion.taps = int64_t(taps.position.size());
  diffusion.border = Border::replicate;
  return diffusion;
}

int64_t par_cpu_workspace(const ParArgs& args, const DiffusionArgs& diffusion, int threads) {
  const Taps taps(args);
  return baseline::par_bytes(args, threads) + diffuse_cpu_workspace(with_taps(diffusion, taps), threads);
}

static Status dispatch(const ParArgs& args, const DiffusionArgs& diffusion, const float* position, void* workspace,
                       int threads) {
  AFA_DISPATCH(par_diffuse, args, diffusion, position, workspace, threads)
}

Status par_cpu(const ParArgs& args, const DiffusionArgs& diffusion, void* workspace, int threads) {
  const Taps taps(args);
  return dispatch(args, with_taps(diffusion, taps), taps.position.data(), workspace, threads);
}

int64_t par_weights_cpu_workspace(const ParArgs& args, int threads) {
  return baseline::par_bytes(args, threads) + 4 * int64_t(threads) * 8 * args.num_dilations * round_up(args.images.size[3], kWeightBlock);
}

static Status dispatch_weights(const ParArgs& args, const View<4>& out, const Taps& taps, void* workspace, int threads) {
  AFA_DISPATCH(par_weights, args, out, taps.offsets.data(), taps.position.data(), workspace, threads)
}

Status par_weights_cpu(const ParArgs& args, const View<4>& out, void* workspace, int threads) {
  return dispatch_weights(args, out, Taps(args), workspace, threads);
}

}  // namespace afa
#endif
