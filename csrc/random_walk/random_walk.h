// Random-walk propagation over an affinity window (AFA, Eq. 7 and 8):
//
//   D_jj = sum_i A_ij^p + eps,   T = D^-1 A^p,   M' = T M        repeated
//
// The window is [B, (2r+1)^2, h, w], tap t of pixel i holding A_ij for j = i + offset_t. That is the diffusion of diffusion/diffusion.h with
// zero border and the weights T. What taps outside the image hold plays no part.
#pragma once

#include "common/common.h"
#include "common/cpu.h"

namespace afa {

struct WalkArgs {
  View<4> affinity;                     // [B, (2r+1)^2, H, W]
  int64_t radius = 0;
  float power = 2, eps = 0.1f;
};

struct WalkMasks {
  View<4> cams, out;                    // [B, C, H, W], distinct
  const uint8_t* class_mask = nullptr;  // [B][C], the CPU's on the host; null: every channel. Channels with 0 are written as 0
  int64_t num_steps = 0;
  bool transpose = false;               // the adjoint: the gradient of the cams
};

// Workspaces in bytes, one image at a time, 64-byte aligned.
int64_t random_walk_cpu_workspace(const WalkArgs& args, const WalkMasks& masks, int threads);
Status random_walk_cpu(const WalkArgs& args, const WalkMasks& masks, void* workspace, int threads);

// The gradient of the affinity. states and grads [B, C, H, W] hold what entered each step and the gradient that came to its end,
// steps and channels side by side: dL/dT_ij = sum_c grads_c,i states_c,j.
int64_t random_walk_affinity_gradient_cpu_workspace(const WalkArgs& args, const View<4>& states, int threads);
Status random_walk_affinity_gradient_cpu(const WalkArgs& args, const View<4>& states, const View<4>& grads,
                                         const View<4>& grad_affinity, void* workspace, int threads);

// The same on a GPU: every pointer is the device's, class_mask too. Asynchronous on the stream, nothing allocated, capturable in a
// CUDA graph.
int64_t random_walk_cuda_workspace(const WalkArgs& args, const WalkMasks& masks, int device);
Status random_walk_cuda(const WalkArgs& args, const WalkMasks& masks, void* workspace, int64_t bytes, int device, void* stream);
int64_t random_walk_affinity_gradient_cuda_workspace(const WalkArgs& args);
Status random_walk_affinity_gradient_cuda(const WalkArgs& args, const View<4>& states, const View<4>& grads,
                                          const View<4>& grad_affinity, void* workspace, int device, void* stream);

}  // namespace afa
