// Pixel-adaptive refinement: the weights of PAR (AFA, Eq. 9-11) and of PAMR (1-stage-wseg), and their diffusion.
//
// Taps: for each dilation d the 8 neighbours (dy, dx in {-d, 0, d}, row-major, centre left out), replicate padding.
//   PAR    weights = softmax_t( mean_c -(|I_t - I| / (sigma_c + 1e-8) / w1)^2 ) + w3 * softmax_t( -(dist_t / (sigma_pos + 1e-8) / w2)^2 )
//          sigma_c: unbiased standard deviation of the 8*D neighbours; dist_t = d or sqrt(2) d, sigma_pos theirs
//   PAMR   weights = softmax_t( mean_c -|I_t - I| / (1e-8 + 0.1 sigma_c) ), sigma_c over the 9*D values, centre included
#pragma once

#include <cmath>

#include "diffusion/diffusion.h"

namespace afa {

enum class ParVariant : int { par = 0, pamr = 1 };

struct ParArgs {
  View<4> images;                      // [B, 3, H, W]
  const int32_t* dilations = nullptr;  // [D], each >= 1
  int64_t num_dilations = 0;
  float w1 = 0.3f, w2 = 0.3f, w3 = 0.01f;
  ParVariant variant = ParVariant::par;
};

// offsets [8*D][2]: dy, dx of every tap, in the order of the weights' channels.
static inline void par_offsets(const int32_t* dilations, int64_t count, int32_t* offsets) {
  for (int64_t i = 0; i < count; ++i)
    for (int dy = -1; dy <= 1; ++dy)
      for (int dx = -1; dx <= 1; ++dx)
        if (dy != 0 || dx != 0) {
          *offsets++ = dy * dilations[i];
          *offsets++ = dx * dilations[i];
        }
}

// weights [8*D]: w3 * softmax of the position term. It is the same for every pixel, so it is computed once, in double.
// All 0 for PAMR, which has none.
static inline void par_position_weights(const ParArgs& args, float* weights) {
  const int64_t taps = 8 * args.num_dilations;
  auto distance = [&](int64_t t) { return args.dilations[t / 8] * (0xA5 >> (t % 8) & 1 ? std::sqrt(2.0) : 1.0); };  // bits: corners
  double mean = 0, variance = 0, nearest = 1e300, total = 0;
  for (int64_t t = 0; t < taps; ++t) {
    mean += distance(t) / taps;
    nearest = distance(t) < nearest ? distance(t) : nearest;
  }
  for (int64_t t = 0; t < taps; ++t) variance += (distance(t) - mean) * (distance(t) - mean) / (taps - 1);
  const double scale = 1.0 / ((std::sqrt(variance) + 1e-8) * args.w2);
  auto kernel = [&](int64_t t) { return std::exp((nearest * nearest - distance(t) * distance(t)) * scale * scale); };
  for (int64_t t = 0; t < taps; ++t) total += kernel(t);
  for (int64_t t = 0; t < taps; ++t)
    weights[t] = args.variant == ParVariant::par ? float(args.w3 * kernel(t) / total) : 0.0f;
}

// Bytes of scratch memory: one image at a time, 64-byte aligned. `diffusion` holds masks, out, num_iter, class_mask and
// transpose; its weights and offsets are not read.
int64_t par_cpu_workspace(const ParArgs& args, const DiffusionArgs& diffusion, int threads);
Status par_cpu(const ParArgs& args, const DiffusionArgs& diffusion, void* workspace, int threads);
// The weights alone: out [B, 8*D, H, W].
int64_t par_weights_cpu_workspace(const ParArgs& args, int threads);
Status par_weights_cpu(const ParArgs& args, const View<4>& out, void* workspace, int threads);

// The same on a GPU, see diffusion/diffusion.h. At most 64 dilations. half_weights keeps the weights in half precision between the
// iterations: half the memory and traffic for a relative error of at most 2^-11 an iteration (about 1e-3 after 10).
int64_t par_cuda_workspace(const ParArgs& args, const DiffusionArgs& diffusion, bool half_weights, int device);
Status par_cuda(const ParArgs& args, const DiffusionArgs& diffusion, bool half_weights, void* workspace, int64_t bytes, int device,
                void* stream);
Status par_weights_cuda(const ParArgs& args, const View<4>& out, int device, void* stream);

}  // namespace afa
