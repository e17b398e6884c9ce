// The bilateral filter: sums over all pixels j of exp(-|f_i - f_j|^2 / 2) v_j, f = (x, y) / sigma_xy beside (r, g, b) / sigma_rgb.
//
//   exact     every pair, but those whose weight cannot matter; without colours a separable convolution
//   lattice   the permutohedral lattice of Adams, Baek and Davis (2010): values are splatted to the corners of the simplex around
//             each pixel, blurred along the d + 1 axes with (1/2, 1, 1/2), sliced back, and scaled by 1 / (1 + 2^-d)
#pragma once

#include "common/common.h"

namespace afa {

// --- exact ---

struct BilateralArgs {
  View<4> images, values, out;          // [B, 3, H, W], [B, K, H, W] twice
  float scale_rgb = 0, scale_xy = 0;    // 1 / (2 sigma^2)
  int64_t* counted = nullptr;           // [2] pairs of tiles that were met, that there are, are added there; may be null
};
int64_t bilateral_exact_cpu_workspace(const BilateralArgs& args, int threads);
Status bilateral_exact_cpu(const BilateralArgs& args, void* workspace, int threads);
int64_t bilateral_exact_cuda_workspace(const BilateralArgs& args, int device);
Status bilateral_exact_cuda(const BilateralArgs& args, void* workspace, int device, void* stream);

// Pixels in an order in which tiles of `tile` neighbours are compact in (x, y, r, g, b), each times its scale: halves of halves, split
// where they are widest. points [N][5]; scratch of as many.
void compact_order(float* points, int64_t count, int64_t tile, int32_t* order);

// Without colours: values and out [B, K, H, W], sigma in pixels.
int64_t gaussian_cpu_workspace(const View<4>& values, float sigma, int threads);
Status gaussian_cpu(const View<4>& values, const View<4>& out, float sigma, void* workspace, int threads);
int64_t gaussian_cuda_workspace(const View<4>& values, float sigma);
Status gaussian_cuda(const View<4>& values, const View<4>& out, float sigma, void* workspace, int device, void* stream);

// --- lattice ---

constexpr int kMostDims = 32;

// Of one image: N points in d dimensions and the M lattice points that are corners of their simplices, numbered as first met.
struct Lattice {
  int64_t points = 0, dims = 0, vertices = 0;
  int32_t* index = nullptr;      // [N][d + 1] corners of a point's simplex
  float* weight = nullptr;       // [N][d + 1] their barycentric weights, summing to 1
  int32_t* near = nullptr;       // [d + 1][M][2] neighbours along every axis; M where there is none
  int32_t* start = nullptr;      // [M + 1] where a vertex's points begin in
  int32_t* point = nullptr;      // [N][d + 1] points sorted by vertex, and
  float* share = nullptr;        // [N][d + 1] their weights
};
// features [N][d]. First the corners: index, weight, and the number of vertices; then, with as many rows in near and start, the rest.
// The same scratch memory for both.
int64_t lattice_build_cpu_workspace(int64_t points, int64_t dims);
Status lattice_corners_cpu(const float* features, Lattice* lattice, void* workspace, int threads);
Status lattice_links_cpu(Lattice* lattice, void* workspace, int threads);

// values and out [1, K, H, W], H * W = N. `transpose` blurs along the axes in reverse order: the adjoint.
int64_t lattice_filter_cpu_workspace(const Lattice& lattice, const View<4>& values, int threads);
Status lattice_filter_cpu(const Lattice& lattice, const View<4>& values, const View<4>& out, bool transpose, void* workspace,
                          int threads);


// --- dense CRF ---

// One of the kernels of a dense CRF: the filter of a lattice, times a number or a matrix [C][stride] of classes.
struct CrfKernel {
  Lattice lattice;
  float scale = 1;
  const float* matrix = nullptr;  // scale where it is null
};
// An iteration of mean field over N points with their channels side by side: base, in, logits, out and, where there is a matrix, spread are
// [N][stride] floats, stride = round_up(channels, 16), those behind the channels of `in` 0.
//   logits = base + sum over kernels of filter(in) times matrix or scale,   out = softmax(logits)
struct CrfStep {
  const CrfKernel* kernels = nullptr;
  int64_t count = 0, points = 0, channels = 0;
  const float *base = nullptr, *in = nullptr;
  float *logits = nullptr, *spread = nullptr, *out = nullptr;
  bool keep_logits = false;  // else what is left in logits is of no use
};
int64_t dense_crf_cpu_workspace(const CrfStep& step);
Status dense_crf_cpu(const CrfStep& step, void* workspace, int threads);

}  // namespace afa
