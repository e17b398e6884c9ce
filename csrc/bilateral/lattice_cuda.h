// The permutohedral lattice and the mean field that stands on it, on a GPU. Nothing here waits for the device: how many vertices
// a lattice has it alone knows, and all memory is for as many as there can be.
#pragma once

#include "common/common.h"

namespace afa {

// Of one or more images, whose points do not meet: `points` in all, in `dims` dimensions, at `memory` on the device.
struct CudaLattice {
  int64_t points = 0, dims = 0;
  void* memory = nullptr;
};
int64_t lattice_cuda_bytes(int64_t points, int64_t dims);

// (x, y) / sigma_xy, and (r, g, b) / sigma_rgb unless that is 0: features [B * H * W][5 or 2] of images [B, 3, H, W].
Status lattice_features_cuda(const View<4>& images, float sigma_rgb, float sigma_xy, float* features, int device, void* stream);

// features [points][dims]; every image has as many points. Vertices are numbered as lattice_corners_cpu does.
int64_t lattice_build_cuda_workspace(int64_t points, int64_t dims);
Status lattice_build_cuda(const CudaLattice& lattice, const float* features, int64_t images, void* workspace, int device, void* stream);

// What a lattice splats, each point's share times its factor [points]: [points * (dims + 1)] pairs, for CudaKernel::list.
Status lattice_weigh_cuda(const CudaLattice& lattice, const float* factor, void* list, int device, void* stream);

// scale * after_i * filter(in)_i
struct CudaKernel {
  CudaLattice lattice;
  const void* list = nullptr;    // of lattice_weigh_cuda; the lattice's own where it is null
  const float* after = nullptr;  // [points], 1 where it is null
  float scale = 1;
};

enum class Finish : int { sum = 0, softmax = 1, slope = 2 };

// Rows are [points][round_up(channels, 4)] floats on 16-byte boundaries, those behind the channels 0.
//   near' = near + sum over kernels of scale * after * filter(in),   z = base + matrix near', or base + near' without one
//   out = z,   softmax(z),   or the gradient through a softmax that gave q: q * (z - <q, z>), which is taken off total
struct CudaStep {
  const CudaKernel* kernels = nullptr;
  int64_t count = 0, points = 0, channels = 0;
  const float* in = nullptr;      // of the kernels
  const float* near = nullptr;    // may be null,
  const float* base = nullptr;    // and these too
  const float* matrix = nullptr;  // [row][row] with row = round_up(channels, 4), 0 behind the channels: from, to
  const float* q = nullptr;       // of Finish::slope
  float *out = nullptr, *logits = nullptr, *total = nullptr;  // logits: z beside the softmax; null for what is not wanted
  bool transpose = false;         // blurs along the axes in reverse order: the adjoint
  Finish finish = Finish::sum;
};
int64_t lattice_step_cuda_workspace(const CudaStep& step);
Status lattice_step_cuda(const CudaStep& step, void* workspace, int device, void* stream);

}  // namespace afa
