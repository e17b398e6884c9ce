// Sinkhorn normalisation on a GPU, and its gradient; the formulas are in sinkhorn.h.
//
// Data flow: one launch for every half step, which is as far as sums reach before all pixels need them. A block of
// sinkhorn_sum_kernel has 32 neighbouring pixels, and 8 threads for each of them share its taps, four loads under way at a time; they add
// up what points at the pixel, or what it points at, in a fixed order, and renew its factor in place of the result tensor, or leave its u
// or v in the workspace. Then sinkhorn_write_kernel and sinkhorn_gradient_kernel write the window: a thread has a pixel and the taps of
// one dy, whose neighbours' factors come from L1.
// Floor: the window read 2 * num_iter + 1 times and written once; a window of a few MB comes from L2 but for the first time. Bound: the
// latency of loads and of launches; on devices with few units for double, a conversion and a multiply-add in double for every product.
// Occupancy: sinkhorn_sum_kernel 256 x 2, sinkhorn_write_kernel 128 x 8, sinkhorn_gradient_kernel 128 x 8 (threads x blocks a
// multiprocessor, by registers).
#include "common/cuda_common.cuh"
#include "sinkhorn/sinkhorn.h"

namespace afa {

constexpr int kSinkhornPixels = 32, kSinkhornGroups = 8, kSinkhornThreads = kSinkhornPixels * kSinkhornGroups;
constexpr int kSinkhornWriters = 128, kSinkhornBatch = 4;

// The taps of the window that reach from some pixel of the image to another, row-major.
struct SinkhornTaps {
  int radius = 0, reach_y = 0, reach_x = 0, height = 0, width = 0;
  int64_t images = 0;

  explicit SinkhornTaps(const SinkhornArgs& args) {
    images = args.affinity.size[0], height = int(args.affinity.size[2]), width = int(args.affinity.size[3]), radius = int(args.radius);
    reach_y = radius < height ? radius : height - 1, reach_x = radius < width ? radius : width - 1;
  }
  __host__ __device__ int64_t pixels() const { return int64_t(height) * width; }
  __device__ bool inside(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  // Where A of pixel (y, x) towards (y + dy, x + dx) is.
  __device__ int64_t at(const View<4>& view, int64_t b, int dy, int dx, int y, int x) const {
    return offset_of(view, b, int64_t(dy + radius) * (2 * radius + 1) + dx + radius, y) + x * view.stride[3];
  }
};

// Several elements, so that their loads are under way together; 0 for those that are not there.
struct SinkhornBatch {
  int64_t at[kSinkhornBatch];
  bool there[kSinkhornBatch];
  template <class T>
  __device__ void load_as(const void* data, float* values) const {
#pragma unroll
    for (int i = 0; i < kSinkhornBatch; ++i) values[i] = there[i] ? to_float(static_cast<const T*>(data)[at[i]]) : 0.0f;
  }
  __device__ void load(const View<4>& view, float* values) const {
    switch (view.dtype) {
      case DType::f16: return load_as<__half>(view.data, values);
      case DType::bf16: return load_as<__nv_bfloat16>(view.data, values);
      default: return load_as<float>(view.data, values);
    }
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
  // Those of several pixels, 0 where they are not there.
  __device__ void load(int64_t b, const int64_t* pixels, const bool* there, double otherwise, double* values) const {
#pragma unroll
    for (int n = 0; n < kSinkhornBatch; ++n) values[n] = there[n] ? otherwise : 0;
    if (data == nullptr) return;
#pragma unroll
    for (int n = 0; n < kSinkhornBatch; ++n)
      if (there[n]) values[n] = data[b * image + pixels[n]];
  }
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
// and G_ij times another.
template <bool kWith>
__device__ double sum_sinkhorn_taps(const SinkhornStep& step, int64_t b, int y, int x) {
  const SinkhornTaps& taps = step.taps;
  const int sign = step.columns ? -1 : 1, side = 2 * taps.reach_x + 1;
  int dy = -taps.reach_y, dx = int(threadIdx.y) - taps.reach_x;
  double sum = 0;
  while (dy <= taps.reach_y) {
    SinkhornBatch own, slope, back;
    int64_t near[kSinkhornBatch];
#pragma unroll
    for (int n = 0; n < kSinkhornBatch; ++n, dx += kSinkhornGroups) {
      while (dx > taps.reach_x) dx -= side, ++dy;
      const int near_y = y + sign * dy, near_x = x + sign * dx;
      const int from_y = step.columns ? near_y : y, from_x = step.columns ? near_x : x;
      own.there[n] = slope.there[n] = dy <= taps.reach_y && taps.inside(near_y, near_x);
      back.there[n] = own.there[n] && step.symmetric;
      near[n] = int64_t(near_y) * taps.width + near_x;
      own.at[n] = taps.at(step.affinity, b, dy, dx, from_y, from_x);
      if (kWith) slope.at[n] = taps.at(step.grad, b, dy, dx, from_y, from_x);
      if (kWith) back.at[n] = taps.at(step.grad, b, -dy, -dx, from_y + dy, from_x + dx);
    }
    float a[kSinkhornBatch], g[kSinkhornBatch], other[kSinkhornBatch];
    double factor[kSinkhornBatch], of_grad[kSinkhornBatch];
    own.load(step.affinity, a);
    if (kWith) slope.load(step.grad, g), back.load(step.grad, other);
    step.vector.load(b, near, own.there, kWith ? 0 : 1, factor);
    if (kWith) step.grad_vector.load(b, near, own.there, 1, of_grad);
#pragma unroll
    for (int n = 0; n < kSinkhornBatch; ++n) {
      if (kWith) factor[n] += average_sinkhorn(g[n], other[n], step.symmetric) * of_grad[n];
      sum += double(a[n]) * factor[n];
    }
  }
  return sum;
}

template <bool kWith>
__global__ void __launch_bounds__(kSinkhornThreads, 2) sinkhorn_sum_kernel(const __grid_constant__ SinkhornStep step) {
  SharedArena arena;
  SharedArray<double> sums = arena.take<double>(kSinkhornThreads);
  const SinkhornTaps& taps = step.taps;
  const int64_t pixel = int64_t(blockIdx.x) * kSinkhornPixels + threadIdx.x;
  const int y = int(pixel / taps.width), x = int(pixel % taps.width);
  const bool present = pixel < taps.pixels();
  for (int64_t b = blockIdx.y; b < taps.images; b += gridDim.y) {
    __syncthreads();  // the sums of the image before may still be read
    sums[threadIdx.y * kSinkhornPixels + threadIdx.x] = present ? sum_sinkhorn_taps<kWith>(step, b, y, x) : 0.0;
    __syncthreads();
    if (!present || threadIdx.y > 0) continue;
    double sum = 0;
    for (int group = 0; group < kSinkhornGroups; ++group) sum += sums[group * kSinkhornPixels + threadIdx.x];
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

// Stores value(b, dy, dx, y, x, own pixel, the one at the other end) for the pixel and the row of taps that are this thread's, and 0 where a tap
// leaves the image.
template <class Value>
__device__ void write_sinkhorn(const SinkhornWriteArgs& args, const Value& value) {
  const SinkhornTaps& taps = args.taps;
  const int64_t pixel = int64_t(blockIdx.x) * kSinkhornWriters + threadIdx.x;
  if (pixel >= taps.pixels()) return;
  const int y = int(pixel / taps.width), x = int(pixel % taps.width), side = 2 * taps.radius + 1;
  for (int64_t part = blockIdx.y; part < taps.images * side; part += gridDim.y) {
    const int64_t b = part / side;
    const int dy = int(part % side) - taps.radius;
    for (int dx = -taps.radius; dx <= taps.radius; ++dx) {
      const float result = taps.inside(y + dy, x + dx) ? value(b, dy, dx, y, x, pixel, pixel + int64_t(dy) * taps.width + dx) : 0.0f;
      store_element(args.out.data, args.out.dtype, taps.at(args.out, b, dy, dx, y, x), result);
    }
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

__global__ void __launch_bounds__(kSinkhornWriters, 8) sinkhorn_gradient_kernel(const __grid_constant__ SinkhornWriteArgs args) {
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
  shape.shared_bytes = SharedArena::bytes<double>(kSinkhornThreads);
  return launch(sinkhorn_sum_kernel<kWith>, shape, stream, step);
}

static Status launch_writing(void (*kernel)(SinkhornWriteArgs), const SinkhornArgs& args, SinkhornWriteArgs write, const double* scales,
                             void* stream) {
  write.symmetric = args.symmetric, write.steps = 2 * args.num_iter, write.scales = scales;
  write.c = vector_of(args, scales, write.steps - 2), write.r = vector_of(args, scales, write.steps - 1);
  LaunchShape shape;
  shape.block = dim3(kSinkhornWriters);
  shape.grid = dim3(unsigned(blocks_for(write.taps.pixels(), kSinkhornWriters)), grid_limit(write.taps.images * (2 * args.radius + 1)));
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
