// Sinkhorn normalisation of an affinity window: columns, then rows, brought to sums of 1, num_iter times.
//
//   A_ij <- A_ij / (sum_i A_ij + eps),   A_ij <- A_ij / (sum_j A_ij + eps)
//
// The window is [B, (2r+1)^2, h, w], tap t of pixel i holding A_ij for j = i + offset_t; what taps outside the image hold plays no part.
// Nothing of it is written before the end: at any time it has become T_ij = r_i A_ij c_j, and a half step renews c or r,
//
//   c_j <- c_j / (c_j sum_i r_i A_ij + eps) = 1 / (sum_i r_i A_ij + eps / c_j),   r_i likewise from sum_j A_ij c_j
//
// starting at 1. Sums and factors are double: one affinity of 1e30 beside one of 1e-30 makes factors that float does not hold.
//
// The gradient G of T runs backwards on vectors as well. u = dL/d(sum_j A_ij c_j) of a half step over rows and
// v = dL/d(sum_i r_i A_ij) of one over columns are, with r and c as that step left them,
//
//   u_i = -r_i^2 sum_j A_ij c_j G_ij                     of the last half step, which is one over rows
//   v_j = -c_j^2 sum_i A_ij (r_i G_ij + u_i)             of the one before
//   u_i = -r_i^2 sum_j A_ij v_j + eps u_i                of any other: v of the step after it, u of the one over rows after it
//   v_j = -c_j^2 sum_i A_ij u_i + eps v_j                likewise
//   dL/dA_ij = r_i c_j G_ij + sum over row steps of u_i c_j + sum over column steps of r_i v_j
//
// where c and r of those two sums are what the step was given.
#pragma once

#include "common/common.h"
#include "common/cpu.h"

#ifdef __CUDACC__
#define AFA_SINKHORN_SHARED __host__ __device__
#else
#define AFA_SINKHORN_SHARED
#endif

namespace afa {

struct SinkhornArgs {
  View<4> affinity;        // [B, (2r+1)^2, H, W]
  int64_t radius = 0, num_iter = 0;
  double eps = 0;
  bool symmetric = false;  // (T + T') / 2 is returned, and G is its gradient
};

// What holds for every device.
static inline bool fits(const SinkhornArgs& args, const View<4>& out) {
  const int64_t side = 2 * args.radius + 1;
  return args.radius >= 0 && args.affinity.size[1] == side * side && same_size(args.affinity, out) && !is_empty(out) &&
         args.num_iter >= 0;
}
// c and r after every half step, c first: [B][2 * num_iter][H][W] double, of which this is the k-th of image b.
template <class T>
static inline T* scale_of(const SinkhornArgs& args, T* scales, int64_t b, int64_t k) {
  return scales + (b * 2 * args.num_iter + k) * args.affinity.size[2] * args.affinity.size[3];
}

// 1 / (sum + eps / before). A column or row of zeros has eps / before alone, which with eps > 0 must not become so small that its
// inverse is infinite: 0 times that is no number, and it stays 0.
AFA_SINKHORN_SHARED static inline double renewed_scale(double sum, double before, double eps) {
  const double scale = 1 / (eps > 0 ? sum + eps / before : sum);
  return eps > 0 && scale > 1e300 ? 1e300 : scale;
}

// Workspaces in bytes, one image at a time, 64-byte aligned.
int64_t sinkhorn_cpu_workspace(const SinkhornArgs& args, int threads);
Status sinkhorn_cpu(const SinkhornArgs& args, const View<4>& out, double* scales, void* workspace, int threads);
int64_t sinkhorn_gradient_cpu_workspace(const SinkhornArgs& args, int threads);
Status sinkhorn_gradient_cpu(const SinkhornArgs& args, const double* scales, const View<4>& grad, const View<4>& grad_affinity,
                             void* workspace, int threads);

// The same on a GPU: every pointer is the device's. Asynchronous on the stream, nothing allocated, capturable in a CUDA graph.
Status sinkhorn_cuda(const SinkhornArgs& args, const View<4>& out, double* scales, int device, void* stream);
int64_t sinkhorn_gradient_cuda_workspace(const SinkhornArgs& args);
Status sinkhorn_gradient_cuda(const SinkhornArgs& args, const double* scales, const View<4>& grad, const View<4>& grad_affinity,
                              void* workspace, int device, void* stream);

}  // namespace afa
