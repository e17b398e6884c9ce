// PAR and PAMR weights on the CPU; their diffusion is diffusion/diffusion.cpp's.
//
// Data flow: the image goes to float32 rows with replicated margins once; then, for each pixel row, vectors of pixels walk the
// 8*D taps four times: mean, squared deviation, kappa with its maximum, exponential with its sum. Deviations are taken from the
// first neighbour and then from the mean, so a constant neighbourhood has a standard deviation of exactly 0, as the formula's
// 1e-8 expects. A row in which a square overflows (pixels beyond 1e18) is done once more with shrunken pixels.
// Floor: 8*D exponentials and 3 * 3 * 8*D loads per pixel. Bound: arithmetic, about 30 operations per weight.
#include "par/par.h"

#include <algorithm>

#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

struct ParRows {
  ParArgs args;
  const int32_t* offsets;   // [taps][2]
  const float* position;    // [taps]
  int64_t taps, height, width, colours, margin, image_row;
  float centres, count;     // values a deviation is taken of: PAMR has the centre among them, once for each dilation
  float* image;             // [H][colours][margin + row + margin]

  ParRows(const ParArgs& par, const int32_t* tap_offsets, const float* tap_position, float* memory)
      : args(par), offsets(tap_offsets), position(tap_position), taps(8 * par.num_dilations), height(par.images.size[2]),
        width(par.images.size[3]), colours(par.images.size[1]),
        centres(par.variant == ParVariant::pamr ? float(par.num_dilations) : 0.0f), count(float(taps) + centres), image(memory) {
    int64_t reach = 0;
    for (int64_t i = 0; i < par.num_dilations; ++i) reach = std::max<int64_t>(reach, par.dilations[i]);
    margin = round_up(std::min(reach, width), 16);
    image_row = margin + round_up(width, 32) + margin;
  }
  int64_t floats() const { return round_up(height * colours * image_row, 16); }
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

// Squared deviations of the neighbours, and of PAMR's centres, from their mean, summed, at kLanes pixels. Shrunk: of pixels times
// kShrink, whose squares overflow for no float.
constexpr float kShrink = 0x1p-80f;
template <bool kShrunk>
static inline vfloat squares_of(const ParRows& rows, int64_t y, int64_t c, int64_t x, vfloat centre) {
  auto shrunk = [](vfloat pixels) { return kShrunk ? pixels * kShrink : pixels; };
  auto neighbour = [&](int64_t t) {
    return shrunk(load(rows.at(y + rows.offsets[2 * t], c) + x +
                       std::clamp<int64_t>(rows.offsets[2 * t + 1], -rows.width, rows.width)));
  };
  const vfloat origin = neighbour(0), away = shrunk(centre) - origin;
  vfloat mean = away * rows.centres;
  for (int64_t t = 0; t < rows.taps; ++t) mean += neighbour(t) - origin;
  mean = mean / rows.count;
  vfloat squares = (away - mean) * (away - mean) * rows.centres;
  for (int64_t t = 0; t < rows.taps; ++t) {
    const vfloat deviation = neighbour(t) - origin - mean;
    squares += deviation * deviation;
  }
  return squares;
}

static inline vfloat root_of(vfloat value) {
  for (int i = 0; i < kLanes; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
}

// 1 / (the divisor of one colour's differences), at kLanes pixels. `finite` stays 0 unless squares overflow, which kWide mends.
template <bool kWide>
static inline vfloat inverse_divisor(const ParRows& rows, int64_t y, int64_t c, int64_t x, vfloat centre, vfloat* finite) {
  const vfloat squares = squares_of<false>(rows, y, c, x, centre);
  vfloat sigma = root_of(squares / (rows.count - 1.0f));
  if constexpr (kWide) {
    const vfloat wide = root_of(squares_of<true>(rows, y, c, x, centre) / (rows.count - 1.0f)) * (1.0f / kShrink);
    sigma = squares * 0.0f == 0.0f ? sigma : wide;
  } else {
    *finite += squares * 0.0f;
  }
  const bool pamr = rows.args.variant == ParVariant::pamr;
  return pamr ? 1.0f / (sigma * 0.1f + 1e-8f) : 1.0f / ((sigma + 1e-8f) * rows.args.w1);
}

// One block of columns from `left` on: [taps][block]. Whether no square overflowed.
template <bool kWide>
static bool fill(const ParRows& rows, int64_t y, int64_t left, int64_t block, float* weights) {
  const float share = -1.0f / float(rows.colours);
  const bool pamr = rows.args.variant == ParVariant::pamr;
  vfloat finite = {};
  const int64_t inside = std::min(block, rows.width - left);  // columns
  for (int64_t i = 0; i < inside; i += kLanes) {
    const int64_t x = left + i;
    for (int64_t c = 0; c < rows.colours; ++c) {
      const vfloat centre = load(rows.at(y, c) + x);
      const vfloat scale = inverse_divisor<kWide>(rows, y, c, x, centre, &finite);
      for (int64_t t = 0; t < rows.taps; ++t) {
        const int64_t dx = std::clamp<int64_t>(rows.offsets[2 * t + 1], -rows.width, rows.width);
        const vfloat distance = (load(rows.at(y + rows.offsets[2 * t], c) + x + dx) - centre) * scale;
        // Where a colour's sigma is 0 its kappa is about 1e15, the same for all taps: rounded before the others join it, or what
        // they change in the last place, 6e7, would decide between the taps.
        const vfloat kappa = rounded((pamr ? abs_of(distance) : distance * distance) * share);
        float* to = weights + t * block + i;
        store(to, c == 0 ? kappa : load(to) + kappa);
      }
    }
    // The maximum is one of the stored values, rounded; it is taken off them as they are stored, never off a product.
    vfloat highest = load(weights + i), sum = {};
    for (int64_t t = 1; t < rows.taps; ++t) highest = max_of(highest, load(weights + t * block + i));
    for (int64_t t = 0; t < rows.taps; ++t) {
      const vfloat value = exp_of(load(weights + t * block + i) - highest);
      store(weights + t * block + i, value);
      sum += value;
    }
    const vfloat inverse = 1.0f / sum;
    for (int64_t t = 0; t < rows.taps; ++t)
      store(weights + t * block + i, load(weights + t * block + i) * inverse + rows.position[t]);
  }
  for (int64_t t = 0; t < rows.taps; ++t) std::fill(weights + t * block + inside, weights + (t + 1) * block, 0.0f);
  return sum_of(finite) == 0.0f;
}

static void fill_row(const void* context, int64_t, int64_t y, int64_t x, int64_t columns, int64_t block, float* weights) {
  const ParRows& rows = *static_cast<const ParRows*>(context);
  for (int64_t left = x; left < x + columns; left += block, weights += rows.taps * block)
    if (!fill<false>(rows, y, left, block, weights)) fill<true>(rows, y, left, block, weights);
}

int64_t par_bytes(const ParArgs& args) { return ParRows(args, nullptr, nullptr, nullptr).floats() * 4; }

Status par_diffuse(const ParArgs& args, const DiffusionArgs& diffusion, const float* position, void* workspace, int threads) {
  ParRows rows(args, diffusion.offsets, position, static_cast<float*>(workspace));
  if (!same_images(args.images, diffusion.masks)) return Status::bad_argument;
  return diffuse_with(diffusion, WeightSource{prepare_row, fill_row, &rows}, rows.image + rows.floats(), threads);
}

Status par_weights(const ParArgs& args, const View<4>& out, const int32_t* offsets, const float* position, void* workspace,
                   int threads) {
  const ParRows rows(args, offsets, position, static_cast<float*>(workspace));
  const int64_t row = round_up(rows.width, 32);
  float* lines = rows.image + rows.floats();  // [threads][taps][row]
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

AFA_DECLARE_PER_ISA(int64_t par_bytes(const ParArgs& args))
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
  return baseline::par_bytes(args) + diffuse_cpu_workspace(with_taps(diffusion, taps), threads);
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
  return baseline::par_bytes(args) + 4 * int64_t(threads) * 8 * args.num_dilations * round_up(args.images.size[3], 32);
}

static Status dispatch_weights(const ParArgs& args, const View<4>& out, const Taps& taps, void* workspace, int threads) {
  AFA_DISPATCH(par_weights, args, out, taps.offsets.data(), taps.position.data(), workspace, threads)
}

Status par_weights_cpu(const ParArgs& args, const View<4>& out, void* workspace, int threads) {
  return dispatch_weights(args, out, Taps(args), workspace, threads);
}

}  // namespace afa
#endif
