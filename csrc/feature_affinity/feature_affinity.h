// Affinity of features: how alike the features of a pixel are to those of its window.
//
//   A_ij = |s_ij| or max(s_ij, 0) with s_ij = f_i . f_j,   or exp(-s_ij / C) with s_ij = sum_c |f_i,c - f_j,c|
//   dL/df_i = sum_j w_ij f_j   or   sum_j w_ij sign(f_i - f_j),        w_ij = (G_ij + G_ji) dA_ij/ds_ij,   G = dL/dA
//
// for |dy| <= r and |dx| <= r. The window is [B, (2r+1)^2, H, W], taps row-major, 0 where one leaves the image. A_ij = A_ji: each pair is
// summed once, the mirror image is a copy. Slopes are kept for one half of the window, the taps from the middle one on:
// [B, ((2r+1)^2 + 1) / 2, H, W].
#pragma once

#include "common/common.h"
#include "common/cpu.h"

namespace afa {

enum class PairKind : int { abs_dot = 0, relu_dot = 1, exp_l1 = 2 };

struct FeatureArgs {
  View<4> features;  // [B, C, H, W]
  int64_t radius = 0;
  PairKind kind = PairKind::abs_dot;
};

// Workspaces in bytes, 64-byte aligned. `out` is contiguous. `slopes`, if it has data: dA/ds of a product, -1, 0 or 1, contiguous.
int64_t feature_affinity_cpu_workspace(const FeatureArgs& args, int threads);
Status feature_affinity_cpu(const FeatureArgs& args, const View<4>& out, const View<4>& slopes, void* workspace, int threads);

// `slopes` of a product as above; of "exp_l1" the affinity itself, its taps from the middle one on. Any strides.
int64_t feature_affinity_backward_cpu_workspace(const FeatureArgs& args, int threads);
Status feature_affinity_backward_cpu(const FeatureArgs& args, const View<4>& slopes, const View<4>& grad, const View<4>& grad_features,
                                     void* workspace, int threads);

// The same on a GPU: asynchronous on the stream, nothing allocated, capturable in a CUDA graph. The forward needs no workspace.
Status feature_affinity_cuda(const FeatureArgs& args, const View<4>& out, const View<4>& slopes, int device, void* stream);
int64_t feature_affinity_backward_cuda_workspace(const FeatureArgs& args);
Status feature_affinity_backward_cuda(const FeatureArgs& args, const View<4>& slopes, const View<4>& grad, const View<4>& grad_features,
                                      void* workspace, int device, void* stream);

}  // namespace afa
