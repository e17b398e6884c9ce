// Affinity along straight paths over an edge map (IRN):
//
//   A_ij = 1 - max of edge over the path from i to j = i + (dy, dx),   dy^2 + dx^2 < radius^2
//
// A path has the whole points (py, px) of the box between its ends with |dy px - dx py| < |d|, where d = (dy, dx). Directions are those
// of the half plane (dy > 0, or dy = 0 and dx > 0); the other half is the same pair seen from j. The window is
// [B, (2 * reach + 1)^2, H, W], row-major over (dy, dx); the centre holds 1, what has no path 0.
#pragma once

#include "common/common.h"
#include "common/cpu.h"

#if defined(__CUDACC__) || defined(AFA_CUDA_EMULATOR)
#define AFA_EVERYWHERE __host__ __device__
#else
#define AFA_EVERYWHERE
#endif

namespace afa {

struct PathArgs {
  View<4> edge;    // [B, 1, H, W]
  View<4> window;  // [B, (2 * reach + 1)^2, H, W]: A, or its gradient
  int64_t radius = 1, reach = 1;
};

// A path from its far end, level by level: the points with py + |px| = level. With n = dy + |dx| they are those with
// |dy level - n py| <= bound, the largest whole number below |d|. From n / 2 <= bound < n (n = 1: bound = 0) it follows that each level
// has one point, (lower, level - lower), or one more, (lower + 1, level - lower - 1), and that none is outside the box.
// In this order, levels from n to 0 and `lower` first, the first of several equal maxima has the gradient.
struct PathLevels {
  int dy, n, bound, level, lower, rest;  // rest = n lower - (dy level - bound), in 0..n-1

  AFA_EVERYWHERE PathLevels(int dy, int dx) : dy(dy), n(dy + (dx < 0 ? -dx : dx)), level(n), lower(dy) {
    const int64_t below = int64_t(dy) * dy + int64_t(dx) * dx - 1;
    int64_t root = int64_t(__builtin_sqrtf(float(below)));
    while (root * root > below) --root;
    while ((root + 1) * (root + 1) <= below) ++root;
    bound = rest = int(root);
  }
  AFA_EVERYWHERE bool more() const { return level >= 0; }
  AFA_EVERYWHERE bool two() const { return rest + n <= 2 * bound; }
  AFA_EVERYWHERE int code() const { return 2 * (n - level); }  // of the first point; the second's is one more
  AFA_EVERYWHERE void next() {
    --level, rest += dy;
    if (rest >= n) rest -= n, --lower;
  }
};

// Floats as whole numbers of the same order, so that a maximum is one instruction and NaN the largest; both zeros are one.
AFA_EVERYWHERE static inline int32_t path_key(float value) {
  const float one_zero = value + 0.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &one_zero, 4);
  if (value != value) return 0x7fc00000;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
AFA_EVERYWHERE static inline float path_value(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Planes of taps that leave the image from every pixel are not written: they must hold 0 already.
// Workspaces in bytes, 64-byte aligned.
int64_t path_affinity_cpu_workspace(const PathArgs& args, int threads);
Status path_affinity_cpu(const PathArgs& args, void* workspace, int threads);
// grad_edge [B, 1, H, W], from the window's gradient in args.
int64_t path_affinity_gradient_cpu_workspace(const PathArgs& args, int threads);
Status path_affinity_gradient_cpu(const PathArgs& args, const View<4>& grad_edge, void* workspace, int threads);

// The same on a GPU. Asynchronous on the stream, nothing allocated, capturable in a CUDA graph.
Status path_affinity_cuda(const PathArgs& args, int device, void* stream);
int64_t path_affinity_gradient_cuda_workspace(const PathArgs& args);
Status path_affinity_gradient_cuda(const PathArgs& args, const View<4>& grad_edge, void* workspace, int device, void* stream);

}  // namespace afa
