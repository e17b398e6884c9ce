// PAR and PAMR on a GPU: the weights, for the resident diffusion (diffusion/resident.cuh) or written out for the streaming one.
//
// Data flow of par_weights_kernel: a block takes 32 x 16 pixels; the image tile with a halo as wide as the farthest tap goes to
// shared memory as float32 with the border resolved; each pixel then walks its taps twice: for the deviation of each colour,
// and for kappa, which stays in registers (48 taps: PAR's six dilations) through the softmax. For other dilation sets kappa is
// computed once more instead, with a running maximum and sum. Weights leave as one 128-byte line per warp and tap. A halo that
// does not fit in shared memory is read through the cache in its place.
// Floor: 4 (half: 2) bytes * taps per pixel written; 6 * taps shared loads and about 30 * taps operations per pixel.
// Sums of squares are taken about one of the neighbours themselves, so a constant neighbourhood has a deviation of exactly 0 and
// cancellation costs at most a factor of the number of taps.
// Occupancy: par_weights_kernel 256 x 2 (threads x blocks a multiprocessor, by registers).
#include "par/par.h"

#include <algorithm>
#include <vector>

#include "diffusion/resident.cuh"

namespace afa {

constexpr int kMaxDilations = 64;
constexpr int kColours = 3;
constexpr int kTileW = 32, kTileH = 16, kWeightThreads = 256;

struct ParTaps {
  int count;  // dilations
  bool pamr;
  float inverse_w1;
  int dy[kMaxDilations], dx[kMaxDilations];  // distances, one image length at most: from there on they reach its border alike
  float straight[kMaxDilations], diagonal[kMaxDilations];  // position weights
};

// Direction k of 8, row-major with the centre left out.
__device__ inline int direction_y(int k) { return (k + (k >= 4)) / 3 - 1; }
__device__ inline int direction_x(int k) { return (k + (k >= 4)) % 3 - 1; }
__device__ inline bool is_diagonal(int k) { return 0xA5 >> k & 1; }

// The deviation of one colour where squares overflow (pixels beyond 1e18), rare and so kept small: of the pixels times 2^-80.
template <class Pixel>
__device__ inline float wide_deviation(const ParTaps& taps, int c, float count, Pixel pixel) {
  constexpr float kShrink = 0x1p-80f;
  // Rounded before the origin is taken off, or pixels equal to it would not give 0.
  auto shrunk = [&](int dy, int dx) { return __fmul_rn(pixel(c, dy, dx), kShrink); };
  const float origin = shrunk(-taps.dy[0], -taps.dx[0]), away = shrunk(0, 0) - origin;
  const float centres = count - float(8 * taps.count);
  float sum = away * centres, squares = away * away * centres;
#pragma unroll 1
  for (int t = 0; t < 8 * taps.count; ++t) {
    const float value = shrunk(direction_y(t % 8) * taps.dy[t / 8], direction_x(t % 8) * taps.dx[t / 8]) - origin;
    sum += value;
    squares = fmaf(value, value, squares);
  }
  const float variance = (squares - sum * (sum / count)) / (count - 1.0f);
  return sqrtf(variance < 0.0f ? 0.0f : variance) * (1.0f / kShrink);
}

// 1 / (the divisor of each colour's differences). kDilations: how many there are, if the kernel was made for that number, else 0.
template <int kDilations, class Pixel>
__device__ __forceinline__ void inverse_divisors(const ParTaps& taps, const float (&centre)[kColours], float (&scale)[kColours],
                                                 Pixel pixel) {
  const int dilations = kDilations > 0 ? kDilations : taps.count;
  // PAMR's deviation has the centre among the values, once for each dilation.
  const float centres = taps.pamr ? float(dilations) : 0.0f, count = float(8 * dilations) + centres;
  float origin[kColours], sum[kColours], squares[kColours];
#pragma unroll
  for (int c = 0; c < kColours; ++c) {
    origin[c] = pixel(c, -taps.dy[0], -taps.dx[0]);
    const float away = centre[c] - origin[c];
    sum[c] = away * centres, squares[c] = away * away * centres;
  }
  for (int i = 0; i < dilations; ++i)
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int c = 0; c < kColours; ++c) {
        const float value = pixel(c, direction_y(k) * taps.dy[i], direction_x(k) * taps.dx[i]) - origin[c];
        sum[c] += value;
        squares[c] = fmaf(value, value, squares[c]);
      }
#pragma unroll
  for (int c = 0; c < kColours; ++c) {
    // max() would turn NaN into 0.
    const float variance = (squares[c] - sum[c] * (sum[c] / count)) / (count - 1.0f);
    float sigma = sqrtf(variance < 0.0f ? 0.0f : variance);
    if (!(fabsf(variance) < INFINITY)) sigma = wide_deviation(taps, c, count, pixel);
    scale[c] = taps.pamr ? 1.0f / (sigma * 0.1f + 1e-8f) : taps.inverse_w1 / (sigma + 1e-8f);
  }
}

// kappa of one tap. It is compared with others and subtracted from them, and where sigma is 0 it is about 1e15, half a unit in whose
// last place is 3e7 in the exponent: left to the compiler, the last product would be fused into the subtraction here and not there.
template <class Pixel>
__device__ __forceinline__ float kappa_of(const ParTaps& taps, const float (&centre)[kColours], const float (&scale)[kColours], Pixel pixel,
                                          int dy, int dx) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kColours; ++c) {
    const float distance = __fmul_rn(pixel(c, dy, dx) - centre[c], scale[c]);
    sum = __fadd_rn(sum, taps.pamr ? fabsf(distance) : __fmul_rn(distance, distance));
  }
  return __fmul_rn(sum, -1.0f / kColours);
}

// The weights of one pixel. `pixel(c, dy, dx)` reads colour c of a neighbour; keeper.keep(t, weight) takes them, taps ascending, and
// gives them back by kept(t); those of the first kHeldDilations are held(t), with a constant t. Without kReads, for a keeper that gives
// nothing back exactly, kappa is computed twice.
template <int kDilations, int kHeldDilations, bool kReads, class Pixel, class Keeper>
__device__ __forceinline__ void pixel_weights(const ParTaps& taps, Pixel pixel, Keeper&& keeper) {
  const int dilations = kDilations > 0 ? kDilations : taps.count;
  float centre[kColours], scale[kColours];
#pragma unroll
  for (int c = 0; c < kColours; ++c) centre[c] = pixel(c, 0, 0);
  inverse_divisors<kDilations>(taps, centre, scale, pixel);
  auto kappa = [&](int i, int k) {
    return kappa_of(taps, centre, scale, pixel, direction_y(k) * taps.dy[i], direction_x(k) * taps.dx[i]);
  };
  auto position = [&](int i, int k) { return is_diagonal(k) ? taps.diagonal[i] : taps.straight[i]; };
  float highest = -INFINITY, sum = 0.0f;
  if constexpr (kDilations > 0) {
    float value[kDilations > 0 ? 8 * kDilations : 1];
#pragma unroll
    for (int t = 0; t < 8 * kDilations; ++t) highest = fmaxf(highest, value[t] = kappa(t / 8, t % 8));
#pragma unroll
    for (int t = 0; t < 8 * kDilations; ++t) sum += value[t] = __expf(value[t] - highest);
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int t = 0; t < 8 * kDilations; ++t) keeper.keep(t, fmaf(value[t], inverse, position(t / 8, t % 8)));
  } else if constexpr (kReads) {
    // Each stays where its weight will be: kappa, then its exponential, then the weight.
    auto each = [&](auto change) {
      if constexpr (kHeldDilations > 0) {
#pragma unroll
        for (int t = 0; t < 8 * kHeldDilations; ++t) keeper.hold(t, change(t / 8, t % 8, keeper.held(t)));
      }
      for (int i = kHeldDilations; i < dilations; ++i)
#pragma unroll
        for (int k = 0; k < 8; ++k) keeper.keep(8 * i + k, change(i, k, keeper.kept(8 * i + k)));
    };
    each([&](int i, int k, float) {
      const float value = kappa(i, k);
      highest = fmaxf(highest, value);
      return value;
    });
    each([&](int, int, float value) {
      value = __expf(value - highest);
      sum += value;
      return value;
    });
    const float inverse = 1.0f / sum;
    each([&](int i, int k, float value) { return fmaf(value, inverse, position(i, k)); });
  } else {
    for (int i = 0; i < dilations; ++i)
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float value = kappa(i, k), higher = fmaxf(highest, value);
        sum = (highest == -INFINITY ? 0.0f : sum * __expf(highest - higher)) + __expf(value - higher);
        highest = higher;
      }
    const float inverse = 1.0f / sum;
    for (int i = 0; i < dilations; ++i)
#pragma unroll
      for (int k = 0; k < 8; ++k) keeper.keep(8 * i + k, fmaf(__expf(kappa(i, k) - highest), inverse, position(i, k)));
  }
}

// Reads a tile in shared memory around one of its pixels; `at` is that pixel's place.
struct TileNeighbours {
  SharedArray<float> centre;
  int plane, line;  // bytes
  __device__ TileNeighbours(SharedArray<float> pixels, int at, int rows, int pitch)
      : centre(pixels + at), plane(4 * rows * pitch), line(4 * pitch) {}
  __device__ __forceinline__ float operator()(int c, int dy, int dx) const { return element_at(centre, c * plane + dy * line + 4 * dx); }
};

// ---- the weights alone ---------------------------------------------------------------------------------------------------

struct WeightArgs {
  View<4> images, out;  // [B, 3, H, W], [B, 8 * D, H, W]
  int reach_y, reach_x;
  ParTaps taps;
};

struct WeightWriter {
  const View<4>& out;
  int64_t at;  // the pixel's first weight
  __device__ void keep(int t, float weight) { store_element(out.data, out.dtype, at + t * out.stride[1], weight); }
};

template <int kDilations, bool kShared>
__global__ void __launch_bounds__(kWeightThreads, 2) par_weights_kernel(const __grid_constant__ WeightArgs args) {
  const View<4>& images = args.images;
  const int height = int(images.size[2]), width = int(images.size[3]);
  const int rows = kTileH + 2 * args.reach_y, pitch = kTileW + 2 * args.reach_x;
  SharedArena arena;
  SharedArray<float> tile = arena.take<float>(kShared ? kColours * rows * pitch : 0);
  const int x0 = int(blockIdx.x) * kTileW, column = threadIdx.x % kTileW, x = x0 + column;
  for (int64_t b = blockIdx.z; b < images.size[0]; b += gridDim.z)
    for (int64_t y0 = int64_t(blockIdx.y) * kTileH; y0 < height; y0 += int64_t(gridDim.y) * kTileH) {
      if constexpr (kShared) {
        __syncthreads();  // the last tile's readers are done
        ResidentPlan shape;
        shape.tile_w = kTileW, shape.reach_y = args.reach_y, shape.reach_x = args.reach_x, shape.rows = rows, shape.pitch = pitch;
        load_tile(shape, ImageTile{int(b), int(y0), x0, 0, 0}, images, kColours, tile);
        __syncthreads();
      }
      for (int row = threadIdx.x / kTileW; row < kTileH; row += kWeightThreads / kTileW) {
        const int y = int(y0) + row;
        if (y >= height || x >= width) continue;
        WeightWriter writer{args.out, offset_of(args.out, b, 0, y) + x * args.out.stride[3]};
        if constexpr (kShared) {
          const TileNeighbours pixel(tile, (row + args.reach_y) * pitch + column + args.reach_x, rows, pitch);
          pixel_weights<kDilations, 0, false>(args.taps, pixel, writer);
        } else {
          pixel_weights<kDilations, 0, false>(
              args.taps,
              [&](int c, int dy, int dx) {
                const int64_t row_at = offset_of(images, b, c, clamp_to(y + dy, 0, height - 1));
                return load_element(images.data, images.dtype, row_at + clamp_to(x + dx, 0, width - 1) * images.stride[3]);
              },
              writer);
        }
      }
    }
}

// ---- the weights of a resident tile --------------------------------------------------------------------------------------

struct ParWeights {
  static constexpr int kPlanes = kColours;
  View<4> images;
  bool whole;  // copies_whole
  ParTaps taps;
  template <class Word, int kHeld>
  __device__ void fill(const ResidentArgs& args, const ImageTile& tile, const TileReader& reader, SharedArray<Word> to,
                       HeldWeights<kHeld>& held, SharedArray<float> pixels) const {
    const ResidentPlan& plan = args.plan;
    if (whole) {
      reader.copy<-1>(static_cast<const float*>(images.data) + tile.b * images.stride[0], int(images.stride[2]), images.stride[1], kColours,
                      pixels);
      commit_copies();
      wait_copies<0>();
      reader.finish<-1>(kColours, pixels);
    } else {
      load_tile(plan, tile, images, kColours, pixels);
      __syncthreads();
    }
    for_own_pixels<kHeld>(plan.pixels(), held, [&](int p, HeldWeights<kHeld>& own) {
      const TilePixel at(plan, p);
      if (!at.inside(tile)) return;
      const TileNeighbours pixel(pixels, at.centre(plan), plan.rows, plan.pitch);
      pixel_weights<0, kHeld / 8, kTapsPerWord<Word> == 1>(taps, pixel, WeightKeeper<Word, kHeld>(to, &own, plan.pixels(), p));
    });
  }
};

// ---- entry points --------------------------------------------------------------------------------------------------------

static int64_t farthest(const ParArgs& args, int64_t size) {
  return std::min<int64_t>(*std::max_element(args.dilations, args.dilations + args.num_dilations), size);
}

static ParTaps make_taps(const ParArgs& args) {
  ParTaps taps = {};
  std::vector<float> position(8 * args.num_dilations);
  par_position_weights(args, position.data());
  taps.count = int(args.num_dilations), taps.pamr = args.variant == ParVariant::pamr, taps.inverse_w1 = 1.0f / args.w1;
  for (int64_t i = 0; i < args.num_dilations; ++i) {
    taps.dy[i] = int(std::min<int64_t>(args.dilations[i], args.images.size[2]));
    taps.dx[i] = int(std::min<int64_t>(args.dilations[i], args.images.size[3]));
    taps.diagonal[i] = position[8 * i], taps.straight[i] = position[8 * i + 1];
  }
  return taps;
}

static Status check_images(const ParArgs& args) {
  if (args.num_dilations < 1 || args.images.size[1] != kColours || is_empty(args.images)) return Status::bad_argument;
  const bool fits = args.num_dilations <= kMaxDilations && args.images.size[2] < (1 << 30) && args.images.size[3] < (1 << 30);
  return fits ? Status::ok : Status::unsupported;
}

static Status launch_weights(const ParArgs& args, const View<4>& out, void* stream) {
  AFA_TRY(check_images(args));
  if (out.size[1] != 8 * args.num_dilations || !same_images(out, args.images)) return Status::bad_argument;
  const auto& size = args.images.size;
  WeightArgs weights = {args.images, out, int(farthest(args, args.images.size[2])), int(farthest(args, args.images.size[3])),
                        make_taps(args)};
  LaunchShape shape;
  shape.block = dim3(kWeightThreads);
  shape.grid = dim3(unsigned(blocks_for(size[3], kTileW)), grid_limit(blocks_for(size[2], kTileH)), grid_limit(size[0]));
  const int64_t tile = int64_t(kTileH + 2 * weights.reach_y) * (kTileW + 2 * weights.reach_x);
  if (4 * kColours * tile > std::min(device_limits().shared_bytes, 110 * 1024))
    return launch(par_weights_kernel<0, false>, shape, stream, weights);
  shape.shared_bytes = SharedArena::bytes<float>(kColours * tile);
  if (args.num_dilations == 6) return launch(par_weights_kernel<6, true>, shape, stream, weights);
  return launch(par_weights_kernel<0, true>, shape, stream, weights);
}

Status par_weights_cuda(const ParArgs& args, const View<4>& out, int device, void* stream) {
  DeviceGuard guard(device);
  return launch_weights(args, out, stream);
}

struct Prepared {
  std::vector<int32_t> offsets;
  DiffusionArgs diffusion;
  PlanChoice choice;

  Prepared(const ParArgs& args, const DiffusionArgs& given, bool half_weights) : offsets(16 * args.num_dilations), diffusion(given) {
    par_offsets(args.dilations, args.num_dilations, offsets.data());
    diffusion.offsets = offsets.data(), diffusion.taps = 8 * args.num_dilations, diffusion.border = Border::replicate;
    // Streamed weights lie in the workspace, their rows padded to 16 bytes.
    View<4>& weights = diffusion.weights;
    weights.dtype = half_weights ? DType::f16 : DType::f32;
    for (int i = 0; i < 4; ++i) weights.size[i] = i == 1 ? diffusion.taps : args.images.size[i];
    pack_rows(&weights, 8);
    choice = choose_plan(diffusion, ParWeights::kPlanes, half_weights, true, device_limits(), plan_wish());
  }
  int64_t workspace() const {
    return choice.resident ? resident_workspace(diffusion, choice.plan) : weight_bytes() + stream_workspace(diffusion);
  }
  int64_t weight_bytes() const {
    const View<4>& weights = diffusion.weights;
    return diffusion.num_iter > 0 ? round_up(element_bytes(weights.dtype) * weights.stride[0] * weights.size[0], 256) : 0;
  }
};

int64_t par_cuda_workspace(const ParArgs& args, const DiffusionArgs& diffusion, bool half_weights, int device) {
  if (check_images(args) != Status::ok) return 0;
  DeviceGuard guard(device);
  return Prepared(args, diffusion, half_weights).workspace();
}

Status par_cuda(const ParArgs& args, const DiffusionArgs& given, bool half_weights, void* workspace, int64_t bytes, int device,
                void* stream) {
  AFA_TRY(check_images(args));
  if (given.num_iter < 0 || given.masks.size[1] < 1) return Status::bad_argument;
  if (!same_size(given.masks, given.out) || !same_images(given.masks, args.images)) return Status::bad_argument;
  if (given.masks.size[1] > 8192) return Status::unsupported;
  DeviceGuard guard(device);
  Prepared prepared(args, given, half_weights);
  if (!as_wished(prepared.diffusion, prepared.choice, 1)) return Status::unsupported;
  if (bytes < prepared.workspace()) return Status::not_resident;
  if (prepared.choice.resident)
    return launch_resident(prepared.diffusion, prepared.choice.plan, ParWeights{args.images, copies_whole(args.images), make_taps(args)}, workspace, stream);
  prepared.diffusion.weights.data = workspace;
  if (given.num_iter > 0) AFA_TRY(launch_weights(args, prepared.diffusion.weights, stream));
  return stream_diffusion(prepared.diffusion, true, static_cast<char*>(workspace) + prepared.weight_bytes(), stream);
}

}  // namespace afa
