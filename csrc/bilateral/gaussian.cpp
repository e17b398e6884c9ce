// A spatial Gaussian on the CPU: down the columns, then along the rows.
//
// Data flow: planes are shared among the threads. A thread sums rows of its plane, vectors of pixels at a time, into one row with
// margins, then that row's neighbours. Weights end where 1e-8 of their sum is left.
// Floor: 2 * (12 sigma + 1) fused multiply-adds for each value. Bound: these.
#include <cmath>

#include "bilateral/lattice_filter.h"

namespace afa {
namespace AFA_ISA {

struct Gaussian {
  int64_t height, width, row, reach_y, reach_x, margin;
  float *weights, *planes, *lines;  // [reach + 1], [threads][H][row], [threads][margin + row + margin + row]
  Gaussian(const View<4>& values, float sigma, int threads, Arena& arena)
      : height(values.size[2]), width(values.size[3]), row(round_up(width, kLanes)) {
    const double reach = std::ceil(5.8 * double(sigma));
    reach_y = int64_t(std::min(reach, double(height - 1))), reach_x = int64_t(std::min(reach, double(width - 1)));
    margin = round_up(reach_x, kLanes);
    weights = arena.take<float>(std::max(reach_y, reach_x) + 1);
    planes = arena.take<float>(threads * height * row);
    lines = arena.take<float>(threads * 2 * (margin + row));
  }
};

int64_t gaussian_bytes(const View<4>& values, float sigma, int threads) {
  Arena arena(nullptr);
  Gaussian(values, sigma, threads, arena);
  return arena.used;
}

Status filter_gaussian(const View<4>& values, const View<4>& out, float sigma, void* workspace, int threads) {
  if (!same_size(values, out) || is_empty(values)) return Status::bad_argument;
  Arena arena(workspace);
  const Gaussian args(values, sigma, threads, arena);
  for (int64_t d = 0; d <= std::max(args.reach_y, args.reach_x); ++d)
    args.weights[d] = float(std::exp(-0.5 * (double(d) / double(sigma)) * (double(d) / double(sigma))));
  args.weights[0] = 1.0f;  // 0 / 0 of the smallest sigma
#pragma omp parallel num_threads(threads)
  {
    float* plane = args.planes + thread_number() * args.height * args.row;
    float* line = args.lines + thread_number() * 2 * (args.margin + args.row);
    std::fill(line, line + 2 * args.margin + args.row, 0.0f);
    line += args.margin;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < values.size[0] * values.size[1]; ++p) {
      const int64_t b = p / values.size[1], c = p % values.size[1];
      for (int64_t y = 0; y < args.height; ++y) {
        load_row(values, b, c, y, plane + y * args.row);
        std::fill(plane + y * args.row + args.width, plane + (y + 1) * args.row, 0.0f);
      }
      for (int64_t y = 0; y < args.height; ++y) {
        for (int64_t x = 0; x < args.row; x += kLanes) {
          const float* at = plane + y * args.row + x;
          vfloat sum = load(at);
          for (int64_t d = 1; d <= args.reach_y; ++d) {
            if (y >= d) sum += args.weights[d] * load(at - d * args.row);
            if (y + d < args.height) sum += args.weights[d] * load(at + d * args.row);
          }
          store(line + x, sum);
        }
        float* to = line + args.row + args.margin;  // the row behind the line
        for (int64_t x = 0; x < args.row; x += kLanes) {
          vfloat sum = load(line + x);
          for (int64_t d = 1; d <= args.reach_x; ++d) sum += args.weights[d] * (load(line + x - d) + load(line + x + d));
          store(to + x, sum);
        }
        store_row(out, b, c, y, to);
      }
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t gaussian_bytes(const View<4>& values, float sigma, int threads))
AFA_DECLARE_PER_ISA(Status filter_gaussian(const View<4>& values, const View<4>& out, float sigma, void* workspace, int threads))

int64_t gaussian_cpu_workspace(const View<4>& values, float sigma, int threads) { AFA_DISPATCH(gaussian_bytes, values, sigma, threads) }
Status gaussian_cpu(const View<4>& values, const View<4>& out, float sigma, void* workspace, int threads) {
  AFA_DISPATCH(filter_gaussian, values, out, sigma, workspace, threads)
}
#endif

}  // namespace afa
