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

// Of an image of N = H * W points in d dimensions: the M lattice points that are corners of their simplices, numbered as first met. The
// CPU filters in tiles of pixels, see lattice_tiles.h. A tile numbers the corners that its points have by itself, its rows; points are in
// the order of tiles.
struct TiledLattice {
  int64_t height = 0, width = 0, dims = 0, vertices = 0;
  int64_t rows = 0, most = 0;    // of all tiles, of one
  uint16_t* corner = nullptr;    // [N][d + 1] corners of a point's simplex among the rows of its tile
  float* weight = nullptr;       // [N][d + 1] their barycentric weights, summing to 1
  int32_t* first = nullptr;      // [tiles + 1] where a tile's rows begin
  int32_t* vertex = nullptr;     // [rows] which vertex a row is
  int32_t* start = nullptr;      // [M + 1] where a vertex's rows begin in
  int32_t* row = nullptr;        // [rows] rows sorted by vertex
  int32_t* chained = nullptr;    // [d + 1] how many vertices have a neighbour along an axis: these, in
  int32_t* chain = nullptr;      // [d + 1][M + 1] chains of neighbours; ~v where one begins, and behind the last
};
int64_t lattice_tiles(int64_t height, int64_t width, int64_t dims);
// What the points of a lattice are: with `sigma_xy` x and y over it, and then the values of each pixel, row by row of the image, over
// `sigma`.
struct Features {
  const float* values = nullptr;
  int64_t pixel_stride = 0, feature_stride = 0;
  float sigma = 1, sigma_xy = 0;
};
// First the corners: corner, weight, first, and the number of rows; then vertices, of which there
// are at most as many as rows, and the rest. The first scratch memory is handed to both.
int64_t lattice_corners_cpu_workspace(const TiledLattice& lattice, int threads);
Status lattice_corners_cpu(const Features& features, TiledLattice* lattice, void* workspace, int threads);
int64_t lattice_links_cpu_workspace(const TiledLattice& lattice);
Status lattice_links_cpu(TiledLattice* lattice, void* first, void* workspace, int threads);

// values and out [1, K, H, W]. `transpose` blurs along the axes in reverse order: the adjoint.
int64_t lattice_filter_cpu_workspace(const TiledLattice& lattice, const View<4>& values, int threads);
Status lattice_filter_cpu(const TiledLattice& lattice, const View<4>& values, const View<4>& out, bool transpose, void* workspace,
                          int threads);

// --- dense CRF ---

// One of the kernels of a dense CRF: the filter of a lattice, whose points are multiplied before and after it, times a number or a
// matrix [C][stride] of classes, stride = round_up(C, 16).
struct CrfKernel {
  TiledLattice lattice;
  float scale = 1;
  const float *before = nullptr, *after = nullptr;  // [H][W], or null for 1
  const float* matrix = nullptr;                    // scale where it is null
};
// Mean field of one image: q = softmax(-unary), then, any number of times,
//   logits = -unary + sum over kernels of filter(q) times matrix or scale,   q = softmax(logits)
// Base and workspace are what one step hands to the next.
struct CrfStep {
  const CrfKernel* kernels = nullptr;
  int64_t count = 0;
  View<4> unary;            // [1, C, H, W]
  float* base = nullptr;    // minus the unary, as it is read again and again
  bool starts = false;      // q of the unary alone
  bool goes_on = true;      // another step follows
  View<4> before, out;      // [1, C, H, W] the last q, which the sums are of, and the next; no data where they are not asked for
  double* sums = nullptr;   // [2] with `before`: of |q - before|, of before * (log(before) - logits)
};
int64_t dense_crf_cpu_base(const CrfStep& step);  // floats
int64_t dense_crf_cpu_workspace(const CrfStep& step, int threads);
Status dense_crf_cpu(const CrfStep& step, void* workspace, int threads);

}  // namespace afa
