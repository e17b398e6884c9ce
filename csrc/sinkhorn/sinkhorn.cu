// Sinkhorn normalisation on a GPU, and its gradient; the formulas are in sinkhorn.h.
//
// Data flow: one launch for every half step, which is as far as sums reach before all pixels need them. A block of
// sinkhorn_sum_kernel has 8 neighbouring pixels, and 32 threads for each of them share its taps, ten loads of each kind under way at a
// time: all of a radius of 8 together, on as many multiprocessors as a small grid allows. They add up what points at the pixel, or what
// it points at, in a fixed order, and renew its factor in place of the result tensor, or leave its u or v in the workspace. Then
// sinkhorn_write_kernel and sinkhorn_gradient_kernel write the window: a thread has a pixel and a tap, and the factors come from L1.
// Floor: the window read 2 * num_iter + 1 times and written once; a window of a few MB comes from L2 but for the first time. Bound: the
// latency of loads and of launches; on devices with few units for double, a conversion and a multiply-add in double for every product.
// Occupancy: sinkhorn_sum_kernel 256 x 2, sinkhorn_write_kernel 128 x 8, sinkhorn_gradient_kernel 128 x 5 (threads x blocks a
// multiprocessor, by registers).
#include "common/cuda_common.cuh"
#include "sinkhorn/sinkhorn.h"

namespace afa {

constexpr int kSinkhornPixels = 8, kSinkhornGroups = 32, kSinkhornThreads = kSinkhornPixels * kSinkhornGroups;
constexpr int kSinkhornWriters = 128, kSinkhornWarps = kSinkhornThreads / 32;

// The taps of the window that reach from some pixel of the image to another, row-major.
struct SinkhornTaps {
  int radius = 0, reach_y = 0, reach_x = 0, height = 0, width = 0;
  int64_t images = 0;

  explicit SinkhornTaps(const SinkhornArgs& args) {
    images = args.affinity.size[0], height = int(args.affinity.size[2]), width = int(args.affinity.size[3]), radius = int(args.radius);
    reach_y = radius < height ? radius : height - 1, reach_x = radius < width ? radius : width - 1;
  }
  __host__ __device__ int64_t pixels() const { return int64_t(height) * width; }
  // Of a pixel; in 32 bits where they hold it, for 64-bit divisions are long.
  __device__ int row_of(int64_t pixel) const {
    return pixel <= 0x7fffffff ? int(unsigned(pixel) / unsigned(width)) : int(pixel / width);
  }
  // Without branches.
  __device__ bool inside(int y, int x) const { return (unsigned(y) < unsigned(height)) & (unsigned(x) < unsigned(width)); }
  // Where A of pixel (y, x) towards (y + dy, x + dx) is.
  __device__ int64_t at(const View<4>& view, int64_t b, int dy, int dx, int y, int x) const {
    return offset_of(view, b, int64_t(dy + radius) * (2 * radius + 1) + dx + radius, y) + x * view.stride[3];
  }
};

// What the gradient of the result has for a pair, and where the result was averaged with its transpose, that of both its ends.
__device__ inline double average_sinkhorn(float value, float back, bool symmetric) {
  return symmetric ? (double(value) + double(back)) * 0.5 : double(value);
}

// The vector of one half step, of all images: `data` + b * `image`.
struct SinkhornVector {
  double* data = nullptr;
  int64_t image = 0;
  __device__ double at(int64_t b, int64_t pixel, double otherwise) const { return data ? data[b * image + pixel] : otherwise; }
};

// One half step: forward 1 / (sum + eps / scale), backward -scale^2 sum + eps later.
struct SinkhornStep {
  SinkhornTaps taps;
  View<4> affinity, grad;
  bool columns = false, backward = false, symmetric = false;
  double eps = 0;
  SinkhornVector vector;       // of the neighbours, what A is multiplied by: 1 where there is none, but 0 beside G
  SinkhornVector grad_vector;  // and what A G is multiplied by
  SinkhornVector scale, later, out;
};

// What this thread's taps bring to the sum over a row, A_ij f_j, or over a column, A_ij f_i. kWith: f is not the vector alone, but that
// and G_ij times another. A batch of taps is loaded before the first is used; rows and columns are counted, and places move on by what one
// tap is from the next: divisions and products would cost more than the tap.
template <class T, bool kWith>
__device__ double sum_sinkhorn_taps(const SinkhornStep& step, int64_t b, int y, int x) {
  constexpr int kBatch = kWith ? 4 : 10;
  const SinkhornTaps& taps = step.taps;
  const View<4>& view = step.affinity;
  const int sign = step.columns ? -1 : 1, side = 2 * taps.reach_x + 1, whole = 2 * taps.radius + 1;
  const int down = kSinkhornGroups / side, right = kSinkhornGroups % side;  // the next tap, or that and a row down and `side` back
  int dy = int(threadIdx.y) / side - taps.reach_y, dx = int(threadIdx.y) % side - taps.reach_x;
  int64_t next = (int64_t(down) * whole + right) * view.stride[1], wrap = int64_t(whole - side) * view.stride[1];
  if (step.columns) {
    next -= down * view.stride[2] + right * view.stride[3];
    wrap -= view.stride[2] - side * view.stride[3];
  }
  const T* from = static_cast<const T*>(view.data) +
                  (step.columns ? taps.at(view, b, dy, dx, y - dy, x - dx) : taps.at(view, b, dy, dx, y, x));
  int64_t near = int64_t(y + sign * dy) * taps.width + x + sign * dx;
  const int64_t next_near = sign * (int64_t(down) * taps.width + right), wrap_near = sign * int64_t(taps.width - side);
  const bool weighed = step.vector.data != nullptr, grad_weighed = step.grad_vector.data != nullptr;
  const double* vector = weighed ? step.vector.data + b * step.vector.image : nullptr;
  const double* grad_vector = grad_weighed ? step.grad_vector.data + b * step.grad_vector.image : nullptr;
  double sum = 0;
  while (dy <= taps.reach_y) {
    T own[kBatch] = {};
    float grad[kBatch] = {}, back[kBatch] = {};
    double factor[kBatch], of_grad[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int near_y = y + sign * dy, near_x = x + sign * dx;
      const bool there = (dy <= taps.reach_y) & taps.inside(near_y, near_x);
      factor[n] = there & !weighed & !kWith ? 1 : 0, of_grad[n] = there ? 1 : 0;
      if (there) own[n] = *from;
      if (there & weighed) factor[n] = vector[near];
      if (kWith) {
        const int from_y = step.columns ? near_y : y, from_x = step.columns ? near_x : x;
        if (there) grad[n] = load_element(step.grad.data, step.grad.dtype, taps.at(step.grad, b, dy, dx, from_y, from_x));
        if (there & step.symmetric)
          back[n] = load_element(step.grad.data, step.grad.dtype, taps.at(step.grad, b, -dy, -dx, from_y + dy, from_x + dx));
        if (there & grad_weighed) of_grad[n] = grad_vector[near];
      }
      dy += down, dx += right, from += next, near += next_near;
      const bool wraps = dx > taps.reach_x;
      dy += wraps, dx -= wraps ? side : 0, from += wraps ? wrap : 0, near += wraps ? wrap_near : 0;
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (kWith) factor[n] += average_sinkhorn(grad[n], back[n], step.symmetric) * of_grad[n];
      sum += double(to_float(own[n])) * factor[n];
    }
  }
  return sum;
}

template <bool kWith>
__global__ void __launch_bounds__(kSinkhornThreads, 2) sinkhorn_sum_kernel(const __grid_constant__ SinkhornStep step) {
  SharedArena arena;
  SharedArray<double> sums = arena.take<double>(kSinkhornWarps * kSinkhornPixels);
  const SinkhornTaps& taps = step.taps;
  const int64_t pixel = int64_t(blockIdx.x) * kSinkhornPixels + threadIdx.x;
  const int y = taps.row_of(pixel), x = int(pixel - int64_t(y) * taps.width);
  const bool present = pixel < taps.pixels();
  for (int64_t b = blockIdx.y; b < taps.images; b += gridDim.y) {
    double part = 0;
    if (present) {
      switch (step.affinity.dtype) {
        case DType::f16: part = sum_sinkhorn_taps<__half, kWith>(step, b, y, x); break;
        case DType::bf16: part = sum_sinkhorn_taps<__nv_bfloat16, kWith>(step, b, y, x); break;
        default: part = sum_sinkhorn_taps<float, kWith>(step, b, y, x);
      }
    }
    // A warp has four threads of each pixel.
#pragma unroll
    for (int distance = kSinkhornPixels; distance < 32; distance *= 2) part += __shfl_xor_sync(0xffffffffu, part, distance);
    __syncthreads();  // the sums of the image before may still be read
    if (threadIdx.y % (kSinkhornGroups / kSinkhornWarps) == 0)
      sums[threadIdx.y / (kSinkhornGroups / kSinkhornWarps) * kSinkhornPixels + threadIdx.x] = part;
    __syncthreads();
    if (!present || threadIdx.y > 0) continue;
    double sum = 0;
#pragma unroll
    for (int warp = 0; warp < kSinkhornWarps; ++warp) sum += sums[warp * kSinkhornPixels + threadIdx.x];
    const double scale = step.scale.at(b, pixel, 1);
    double out = renewed_scale(sum, scale, step.eps);
    if (step.backward) out = -(scale * sum) * scale + (step.eps > 0 ? step.eps * step.later.at(b, pixel, 0) : 0.0);
    step.out.data[b * step.out.image + pixel] = out;
  }
}

// ---- writing the window ------------------------------------------------------------------------------------------------------------

struct SinkhornWriteArgs {
  SinkhornTaps taps;
  View<4> from, out;          // A, or G
  bool symmetric = false;
  SinkhornVector c, r;        // at the end
  const double* scales = nullptr;  // [B][steps][H][W]: c and r after each half step
  const double* slopes = nullptr;  // v and u of each
  int64_t steps = 0;
};

// Stores value(b, dy, dx, y, x, own pixel, the one at the other end) for the pixel and the tap that are this thread's, and 0 where the tap
// leaves the image.
template <class Value>
__device__ void write_sinkhorn(const SinkhornWriteArgs& args, const Value& value) {
  const SinkhornTaps& taps = args.taps;
  const int64_t pixel = int64_t(blockIdx.x) * kSinkhornWriters + threadIdx.x;
  if (pixel >= taps.pixels()) return;
  const int y = taps.row_of(pixel), x = int(pixel - int64_t(y) * taps.width), side = 2 * taps.radius + 1;
  for (int64_t b = blockIdx.z; b < taps.images; b += gridDim.z)
    for (int tap = int(blockIdx.y); tap < side * side; tap += int(gridDim.y)) {
      const int dy = tap / side - taps.radius, dx = tap % side - taps.radius;
      const float result = taps.inside(y + dy, x + dx) ? value(b, dy, dx, y, x, pixel, pixel + int64_t(dy) * taps.width + dx) : 0.0f;
      store_element(args.out.data, args.out.dtype, taps.at(args.out, b, dy, dx, y, x), result);
    }
}

__global__ void __launch_bounds__(kSinkhornWriters, 8) sinkhorn_write_kernel(const __grid_constant__ SinkhornWriteArgs args) {
  write_sinkhorn(args, [&args](int64_t b, int dy, int dx, int y, int x, int64_t own, int64_t near) {
    const SinkhornTaps& taps = args.taps;
    const double a = load_element(args.from.data, args.from.dtype, taps.at(args.from, b, dy, dx, y, x));
    // Both are rounded before they are added, so that the pixel at the other end comes to the same bits.
    const float value = float(a * args.c.at(b, near, 1) * args.r.at(b, own, 1));
    if (!args.symmetric) return value;
    const double back = load_element(args.from.data, args.from.dtype, taps.at(args.from, b, -dy, -dx, y + dy, x + dx));
    return float(average_sinkhorn(value, float(back * args.c.at(b, own, 1) * args.r.at(b, near, 1)), true));
  });
}

__global__ void __launch_bounds__(kSinkhornWriters, 5) sinkhorn_gradient_kernel(const __grid_constant__ SinkhornWriteArgs args) {
  write_sinkhorn(args, [&args](int64_t b, int dy, int dx, int y, int x, int64_t own, int64_t near) {
    const SinkhornTaps& taps = args.taps;
    const float g = load_element(args.from.data, args.from.dtype, taps.at(args.from, b, dy, dx, y, x));
    float back = 0;
    if (args.symmetric) back = load_element(args.from.data, args.from.dtype, taps.at(args.from, b, -dy, -dx, y + dy, x + dx));
    double sum = average_sinkhorn(g, back, args.symmetric) * args.c.at(b, near, 1) * args.r.at(b, own, 1);
    const int64_t pixels = taps.pixels();
    const double *scales = args.scales + b * args.steps * pixels, *slopes = args.slopes + b * args.steps * pixels;
    double r = 1;
    for (int64_t k = 0; k < args.steps; k += 2, scales += 2 * pixels, slopes += 2 * pixels) {
      sum += r * slopes[near] + slopes[pixels + own] * scales[near];
      r = scales[pixels + own];
    }
    return float(sum);
  });
}

// ---- launching -------------------------------------------------------------------------------------------------------------------

static Status check_sinkhorn(const SinkhornArgs& args, const View<4>& out) {
  if (!fits(args, out)) return Status::bad_argument;
  // Rows, columns and taps are counted in 32 bits.
  const bool small = args.radius < (1 << 14) && out.size[2] < (1 << 30) && out.size[3] < (1 << 30) &&
                     blocks_for(out.size[2] * out.size[3], kSinkhornPixels) <= 0x7fffffff;
  return small ? Status::ok : Status::unsupported;
}

// The k-th of vectors that lie as scale_of has them; none where k is that of no half step.
static SinkhornVector vector_of(const SinkhornArgs& args, const double* vectors, int64_t k) {
  SinkhornVector vector;
  vector.image = 2 * args.num_iter * args.affinity.size[2] * args.affinity.size[3];
  if (k >= 0 && k < 2 * args.num_iter) vector.data = const_cast<double*>(scale_of(args, vectors, 0, k));
  return vector;
}

static SinkhornStep step_of(const SinkhornArgs& args, int64_t k) {
  SinkhornStep step{SinkhornTaps(args)};
  step.affinity = args.affinity, step.eps = args.eps, step.columns = k % 2 == 0;
  return step;
}

template <bool kWith>
static Status launch_step(const SinkhornStep& step, void* stream) {
  LaunchShape shape;
  shape.block = dim3(kSinkhornPixels, kSinkhornGroups);
  shape.grid = dim3(unsigned(blocks_for(step.taps.pixels(), kSinkhornPixels)), grid_limit(step.taps.images));
  shape.shared_bytes = SharedArena::bytes<double>(kSinkhornWarps * kSinkhornPixels);
  return launch(sinkhorn_sum_kernel<kWith>, shape, stream, step);
}

static Status launch_writing(void (*kernel)(SinkhornWriteArgs), const SinkhornArgs& args, SinkhornWriteArgs write, const double* scales,
                             void* stream) {
  write.symmetric = args.symmetric, write.steps = 2 * args.num_iter, write.scales = scales;
  write.c = vector_of(args, scales, write.steps - 2), write.r = vector_of(args, scales, write.steps - 1);
  LaunchShape shape;
  shape.block = dim3(kSinkhornWriters);
  shape.grid = dim3(unsigned(blocks_for(write.taps.pixels(), kSinkhornWriters)),
                    grid_limit((2 * args.radius + 1) * (2 * args.radius + 1)), grid_limit(write.taps.images));
  return launch(kernel, shape, stream, write);
}

Status sinkhorn_cuda(const SinkhornArgs& args, const View<4>& out, double* scales, int device, void* stream) {
  AFA_TRY(check_sinkhorn(args, out));
  DeviceGuard guard(device);
  for (int64_t k = 0; k < 2 * args.num_iter; ++k) {
    SinkhornStep step = step_of(args, k);
    step.vector = vector_of(args, scales, k - 1), step.scale = vector_of(args, scales, k - 2), step.out = vector_of(args, scales, k);
    AFA_TRY(launch_step<false>(step, stream));
  }
  return launch_writing(sinkhorn_write_kernel, args, {SinkhornTaps(args), args.affinity, out}, scales, stream);
}

int64_t sinkhorn_gradient_cuda_workspace(const SinkhornArgs& args) {
  return 16 * args.num_iter * args.affinity.size[0] * args.affinity.size[2] * args.affinity.size[3];
}

Status sinkhorn_gradient_cuda(const SinkhornArgs& args, const double* scales, const View<4>& grad, const View<4>& grad_affinity,
                              void* workspace, int device, void* stream) {
  AFA_TRY(check_sinkhorn(args, grad));
  AFA_TRY(check_sinkhorn(args, grad_affinity));
  DeviceGuard guard(device);
  const double* slopes = static_cast<const double*>(workspace);
  const int64_t last = 2 * args.num_iter - 1;
  for (int64_t k = last; k >= 0; --k) {
    SinkhornStep step = step_of(args, k);
    step.backward = true, step.symmetric = args.symmetric, step.grad = grad;
    step.vector = vector_of(args, slopes, k + 1), step.later = vector_of(args, slopes, k + 2), step.out = vector_of(args, slopes, k);
    step.scale = vector_of(args, scales, k), step.grad_vector = vector_of(args, scales, k == last ? k - 1 : last);
    AFA_TRY(k + 2 > last ? launch_step<true>(step, stream) : launch_step<false>(step, stream));
  }
  SinkhornWriteArgs write{SinkhornTaps(args), grad, grad_affinity};
  write.slopes = slopes;
  return launch_writing(sinkhorn_gradient_kernel, args, write, scales, stream);
}

}  // namespace afa
