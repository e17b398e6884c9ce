// PAR and PAMR weights on the CPU; their diffusion is diffusion.cpp's.
//
// Data flow: the image goes to float32 rows with replicated margins once; then, for each pixel row, vectors of pixels walk the
// 8*D taps four times: mean, squared deviation, kappa with its maximum, exponential with its sum. Deviations are taken from the
// first neighbour and then from the mean, so a constant neighbourhood has a standard deviation of exactly 0, as the formula's
// 1e-8 expects. Floor: 8*D exponentials and 3 * 3 * 8*D loads per pixel. Bound: arithmetic, about 30 operations per weight.
#include "par.h"

#include <algorithm>

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace afa {
namespace AFA_ISA {

struct ParRows {
  ParArgs args;
  const int32_t* offsets;   // [taps][2]
  const float* position;    // [taps]
  int64_t taps, height, width, colours, margin, image_row;
  float* image;             // [H][colours][margin + row + margin]

  ParRows(const ParArgs& par, const int32_t* tap_offsets, const float* tap_position, float* memory)
      : args(par), offsets(tap_offsets), position(tap_position), taps(8 * par.num_dilations), height(par.images.size[2]),
        width(par.images.size[3]), colours(par.images.size[1]), image(memory) {
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

// 1 / (the divisor of one colour's differences), at kLanes pixels.
static inline vfloat inverse_divisor(const ParRows& rows, int64_t y, int64_t c, int64_t x, vfloat centre) {
  const bool pamr = rows.args.variant == ParVariant::pamr;
  auto neighbour = [&](int64_t t) {
    return load(rows.at(y + rows.offsets[2 * t], c) + x +
                std::clamp<int64_t>(rows.offsets[2 * t + 1], -rows.width, rows.width));
  };
  const vfloat origin = neighbour(0);
  // PAMR's deviation has the centre among the values, once for each dilation.
  const float centres = pamr ? float(rows.args.num_dilations) : 0.0f, count = float(rows.taps) + centres;
  vfloat mean = (centre - origin) * centres;
  for (int64_t t = 0; t < rows.taps; ++t) mean += neighbour(t) - origin;
  mean = mean / count;
  vfloat squares = (centre - origin - mean) * (centre - origin - mean) * centres;
  for (int64_t t = 0; t < rows.taps; ++t) {
    const vfloat deviation = neighbour(t) - origin - mean;
    squares += deviation * deviation;
  }
  vfloat sigma = squares / (count - 1.0f);
  for (int i = 0; i < kLanes; ++i) sigma[i] = __builtin_sqrtf(sigma[i]);
  return pamr ? 1.0f / (sigma * 0.1f + 1e-8f) : 1.0f / ((sigma + 1e-8f) * rows.args.w1);
}

static void fill_row(const void* context, int64_t, int64_t y, int64_t row, float* weights) {
  const ParRows& rows = *static_cast<const ParRows*>(context);
  const float share = -1.0f / float(rows.colours);
  const bool pamr = rows.args.variant == ParVariant::pamr;
  for (int64_t x = 0; x < rows.width; x += kLanes) {
    for (int64_t c = 0; c < rows.colours; ++c) {
      const vfloat centre = load(rows.at(y, c) + x);
      const vfloat scale = inverse_divisor(rows, y, c, x, centre);
      for (int64_t t = 0; t < rows.taps; ++t) {
        const int64_t dx = std::clamp<int64_t>(rows.offsets[2 * t + 1], -rows.width, rows.width);
        const vfloat distance = (load(rows.at(y + rows.offsets[2 * t], c) + x + dx) - centre) * scale;
        const vfloat kappa = (pamr ? abs_of(distance) : distance * distance) * share;
        float* to = weights + t * row + x;
        store(to, c == 0 ? kappa : load(to) + kappa);
      }
    }
    vfloat highest = load(weights + x), sum = {};
    for (int64_t t = 1; t < rows.taps; ++t) highest = max_of(highest, load(weights + t * row + x));
    for (int64_t t = 0; t < rows.taps; ++t) {
      const vfloat value = exp_of(load(weights + t * row + x) - highest);
      store(weights + t * row + x, value);
      sum += value;
    }
    const vfloat inverse = 1.0f / sum;
    for (int64_t t = 0; t < rows.taps; ++t)
      store(weights + t * row + x, load(weights + t * row + x) * inverse + rows.position[t]);
  }
  for (int64_t t = 0; t < rows.taps; ++t) std::fill(weights + t * row + rows.width, weights + (t + 1) * row, 0.0f);
}

int64_t par_bytes(const ParArgs& args) { return ParRows(args, nullptr, nullptr, nullptr).floats() * 4; }

Status par_diffuse(const ParArgs& args, const DiffusionArgs& diffusion, const float* position, void* workspace, int threads) {
  ParRows rows(args, diffusion.offsets, position, static_cast<float*>(workspace));
  for (int i : {0, 2, 3})
    if (args.images.size[i] != diffusion.masks.size[i]) return Status::bad_argument;
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
#ifdef _OPENMP
      float* line = lines + omp_get_thread_num() * rows.taps * row;
#else
      float* line = lines;
#endif
#pragma omp for schedule(static)
      for (int64_t y = 0; y < rows.height; ++y) prepare_row(&rows, b, y);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < rows.height; ++y) {
        fill_row(&rows, b, y, row, line);
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
