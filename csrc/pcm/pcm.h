// The pixel correlation module (SEAM): sums over all pairs of pixels of an image,
//
//   out_j = sum_i a_ij values_i,   a_ij = max(f_i . f_j, 0)
//
// of all channels, with features f that are divided by their norms already. Where out has one channel more than values, that one's
// values are 1: its sums are what a mean divides by. a is symmetric, so the same sum of the gradient g of out is that of the values; and
//
//   d f_j = sum_i [f_i . f_j > 0] (g_j . values_i + values_j . g_i) f_i
//
// over all channels, also that of 1. a is never formed but a tile at a time.
#pragma once

#include "common/common.h"
#include "common/cpu.h"

namespace afa {

struct PcmArgs {
  View<4> values, features;  // [B, K, H, W], [B, C, H, W]
  View<4> sums;              // [B, K or K + 1, H, W]: out, or its gradient g
  View<4> grad_features;     // [B, C, H, W]; of pcm_features_gradient alone

  // Channels with that of 1.
  int64_t channels() const { return sums.size[1]; }
  int64_t count() const { return features.size[2] * features.size[3]; }
};

// Whether sizes fit together.
static inline bool pcm_fits(const PcmArgs& args, bool gradient) {
  const int64_t channels = args.values.size[1], more = args.sums.size[1] - channels;
  return same_images(args.values, args.features) && same_images(args.values, args.sums) && channels > 0 && args.features.size[1] > 0 &&
         (more == 0 || more == 1) && (!gradient || same_size(args.grad_features, args.features));
}

// Workspaces in bytes, 64-byte aligned: what is packed, of all images at once.
int64_t pcm_cpu_workspace(const PcmArgs& args, int threads);
Status pcm_cpu(const PcmArgs& args, void* workspace, int threads);
int64_t pcm_features_gradient_cpu_workspace(const PcmArgs& args, int threads);
Status pcm_features_gradient_cpu(const PcmArgs& args, void* workspace, int threads);

// The same on a GPU: every pointer is the device's. Asynchronous on the stream, nothing allocated, capturable in a CUDA graph.
int64_t pcm_cuda_workspace(const PcmArgs& args, int device);
Status pcm_cuda(const PcmArgs& args, void* workspace, int device, void* stream);
int64_t pcm_features_gradient_cuda_workspace(const PcmArgs& args, int device);
Status pcm_features_gradient_cuda(const PcmArgs& args, void* workspace, int device, void* stream);

}  // namespace afa
