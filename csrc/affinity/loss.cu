// The affinity loss of a window on a GPU, forward and backward.
//
// Data flow: a block owns a run of pixels of one image, a thread one pixel, whose taps it walks; the block's sums go to the workspace,
// and the block that comes last adds them up in order: one launch, the same bits every run. Labels are read as the caller has them;
// each pixel's is checked where it is the centre of a window.
// Floor: the window read once (forward) or its gradient written once (backward). Bound: memory.
// Occupancy: window_loss_kernel 256 x 4, window_loss_gradient_kernel 256 x 4 (threads x blocks a multiprocessor, by registers).
#include "affinity/affinity.cuh"

namespace afa {

struct WindowLossArgs {
  View<4> window;      // or its gradient
  DeviceLabels labels;
  int radius;
  PairResults results;
  float4* shares;      // [blocks of the grid]
  unsigned* counter;
  DeviceSlopes slopes;
};

// Calls visit(tap, other) with the label that pixel (y, x) reaches through each tap, -1 where it leaves the image.
template <class Visit>
__device__ inline void walk_taps(const WindowLossArgs& args, int64_t b, int y, int x, Visit visit) {
  const int height = int(args.window.size[2]), width = int(args.window.size[3]), r = args.radius;
  int tap = 0;
  for (int dy = -r; dy <= r; ++dy)
    for (int dx = -r; dx <= r; ++dx, ++tap) {
      const bool inside = y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width;
      visit(tap, inside ? label_at<false>(args.labels, b, y + dy, x + dx) : -1);
    }
}

__global__ void __launch_bounds__(kPairThreads, 4) window_loss_kernel(const __grid_constant__ WindowLossArgs args) {
  SharedArena arena;
  SharedArray<double> sums = arena.take<double>(kPairThreads / 32);
  SharedArray<int> last = arena.take<int>(1);
  const View<4>& window = args.window;
  const int64_t width = window.size[3], pixels = window.size[2] * width;
  double same = 0, different = 0, same_count = 0, different_count = 0;
  for (int64_t b = blockIdx.y; b < window.size[0]; b += gridDim.y) {
    const int64_t pixel = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (pixel >= pixels) continue;
    const int y = int(pixel / width), x = int(pixel % width), own = label_at<true>(args.labels, b, y, x);
    if (own < 0) continue;
    float same_part = 0, different_part = 0;
    int same_found = 0, different_found = 0;
    walk_taps(args, b, y, x, [&](int tap, int other) {
      if (other < 0) return;
      const float affinity = load_element(window.data, window.dtype, offset_of(window, b, tap, y) + x * window.stride[3]);
      same_part += other == own ? 1.0f - affinity : 0.0f, different_part += other == own ? 0.0f : affinity;
      same_found += other == own, different_found += other != own;
    });
    same += same_part, different += different_part, same_count += same_found, different_count += different_found;
  }
  same = block_sum(same, sums), different = block_sum(different, sums);
  same_count = block_sum(same_count, sums), different_count = block_sum(different_count, sums);
  double* shares = reinterpret_cast<double*>(args.shares);
  const int64_t block = blockIdx.y * int64_t(gridDim.x) + blockIdx.x, blocks = int64_t(gridDim.x) * gridDim.y;
  if (threadIdx.x == 0) {
    shares[4 * block] = same, shares[4 * block + 1] = different;
    shares[4 * block + 2] = same_count, shares[4 * block + 3] = different_count;
  }
  if (!comes_last(args.counter, last)) return;
  double total[4] = {};
  for (int64_t at = threadIdx.x; at < blocks; at += blockDim.x)
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += __ldcg(shares + 4 * at + i);
#pragma unroll
  for (int i = 0; i < 4; ++i) total[i] = block_sum(total[i], sums);
  if (threadIdx.x == 0) write_loss(args.results, total[0], total[1], total[2], total[3]);
}

__global__ void __launch_bounds__(kPairThreads, 4) window_loss_gradient_kernel(const __grid_constant__ WindowLossArgs args) {
  const View<4>& out = args.window;
  const int64_t width = out.size[3], pixels = out.size[2] * width;
  const LossSlopes slopes = loss_slopes(args.slopes);
  const int64_t pixel = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (pixel >= pixels) return;
  const int y = int(pixel / width), x = int(pixel % width);
  for (int64_t b = blockIdx.y; b < out.size[0]; b += gridDim.y) {
    const int own = label_at<true>(args.labels, b, y, x);
    walk_taps(args, b, y, x, [&](int tap, int other) {
      const float value = own < 0 || other < 0 ? 0.0f : other == own ? slopes.same : slopes.different;
      store_element(out.data, out.dtype, offset_of(out, b, tap, y) + x * out.stride[3], value);
    });
  }
}

static LaunchShape window_shape(const View<4>& window) {
  LaunchShape shape;
  shape.block = dim3(kPairThreads);
  shape.grid = dim3(unsigned(blocks_for(window.size[2] * window.size[3], kPairThreads)), grid_limit(window.size[0]));
  return shape;
}
static Status window_fits(const View<4>& window, int64_t radius) {
  if (radius < 0 || window.size[1] != (2 * radius + 1) * (2 * radius + 1)) return Status::bad_argument;
  const bool small = radius < (1 << 14) && window.size[2] < (1 << 30) && window.size[3] < (1 << 30) &&
                     blocks_for(window.size[2] * window.size[3], kPairThreads) <= 0x7fffffff;
  return small ? Status::ok : Status::unsupported;
}

int64_t affinity_loss_cuda_workspace(const View<4>& window) {
  const LaunchShape shape = window_shape(window);
  return 64 + 32 * int64_t(shape.grid.x) * shape.grid.y;
}

Status affinity_loss_cuda(const View<4>& window, const DeviceLabels& labels, int64_t radius, const PairResults& results, void* workspace,
                          int device, void* stream) {
  AFA_TRY(window_fits(window, radius));
  DeviceGuard guard(device);
  WindowLossArgs args = {};
  args.window = window, args.labels = labels, args.radius = int(radius), args.results = results;
  args.counter = static_cast<unsigned*>(workspace);
  args.shares = reinterpret_cast<float4*>(static_cast<char*>(workspace) + 64);
  AFA_TRY(cuda_failed(cudaMemsetAsync(workspace, 0, 64, static_cast<cudaStream_t>(stream))));
  LaunchShape shape = window_shape(window);
  shape.shared_bytes = SharedArena::bytes<double>(kPairThreads / 32) + SharedArena::bytes<int>(1);
  return launch(window_loss_kernel, shape, stream, args);
}

Status affinity_loss_backward_cuda(const View<4>& grad_window, const DeviceSlopes& slopes, int64_t radius, int device, void* stream) {
  AFA_TRY(window_fits(grad_window, radius));
  DeviceGuard guard(device);
  WindowLossArgs args = {};
  args.window = grad_window, args.labels = slopes.labels, args.radius = int(radius), args.slopes = slopes;
  return launch(window_loss_gradient_kernel, window_shape(grad_window), stream, args);
}

}  // namespace afa
