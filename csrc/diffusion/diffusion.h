// Diffusion over a fixed set of taps: PAR and PAMR iterations and the random walk are all this one step,
//
//   out[b,c,y,x] = sum_t weights[b,t,y,x] * masks[b,c,y+dy_t,x+dx_t]          repeated num_iter times,
//
// where a neighbour outside the image is its nearest pixel (replicate) or 0 (zero). `transpose` applies the adjoint of
// the same linear map instead: it is the gradient of the masks, exact at the borders too.
#pragma once

#include "common/common.h"
#include "common/cpu.h"

namespace afa {

enum class Border : int { replicate = 0, zero = 1 };

struct DiffusionArgs {
  View<4> weights;                      // [B, T, H, W]; unused where the operator computes the weights itself
  View<4> masks;                        // [B, C, H, W]
  View<4> out;                          // [B, C, H, W], distinct from masks
  const int32_t* offsets = nullptr;     // [T][2]: dy, dx
  int64_t taps = 0;
  const uint8_t* class_mask = nullptr;  // [B][C] on the host; null: every channel. Channels with 0 are written as 0
  int64_t num_iter = 0;
  Border border = Border::replicate;
  bool transpose = false;
};

// Bytes of scratch memory the CPU path needs: one image at a time, 64-byte aligned.
int64_t diffuse_cpu_workspace(const DiffusionArgs& args, int threads);
// How many iterations pass over the image at once, and the columns of the strips that they do it in. Of size, threads and the core's
// cache; the result has the same bits whatever it is.
struct Schedule {
  int64_t depth = 1, strip = 0;
};
Schedule diffuse_cpu_schedule(const DiffusionArgs& args, int threads);
Status diffuse_cpu(const DiffusionArgs& args, void* workspace, int threads);

// The same on a GPU: every pointer but offsets is the device's, class_mask too. Asynchronous on the stream, nothing allocated,
// capturable in a CUDA graph.
int64_t diffuse_cuda_workspace(const DiffusionArgs& args, int device);
// The plan is made at each call. If it is another than when the workspace was asked for, whose size is `bytes`: not_resident.
Status diffuse_cuda(const DiffusionArgs& args, void* workspace, int64_t bytes, int device, void* stream);

// How an operator hands its own weights to the diffusion: `prepare` sees every row of image b once, then, after a barrier,
// `fill` writes the weights of columns [x, x + columns) of row y, as [columns / block][T][block] floats. The block divides columns;
// all of them, x too, are multiples of kWeightBlock. Columns past the width are set to 0.
constexpr int64_t kWeightBlock = 32;
struct WeightSource {
  void (*prepare)(const void* context, int64_t b, int64_t y) = nullptr;
  void (*fill)(const void* context, int64_t b, int64_t y, int64_t x, int64_t columns, int64_t block, float* weights) = nullptr;
  const void* context = nullptr;
};

AFA_DECLARE_PER_ISA(Status diffuse_with(const DiffusionArgs& args, const WeightSource& source, void* workspace, int threads))
AFA_DECLARE_PER_ISA(Status diffuse_tensor(const DiffusionArgs& args, void* workspace, int threads))
AFA_DECLARE_PER_ISA(Schedule diffuse_schedule(const DiffusionArgs& args, int threads))
AFA_DECLARE_PER_ISA(int64_t diffuse_bytes(const DiffusionArgs& args, int threads))

}  // namespace afa
