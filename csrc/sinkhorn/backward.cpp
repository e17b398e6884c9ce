// The gradient of the affinity through the Sinkhorn normalisation, on the CPU; the formulas are in sinkhorn.h.
//
// Data flow, one image at a time: the window and the gradient of the result are copied, the latter averaged with its transpose where the
// result was; then a pass for every half step, from the last to the first, leaves its u or v; a last pass adds up what each pair of
// pixels has of them. The same bits for any number of threads. Floor: the window read 2 * num_iter times, the gradient read three times
// and written once. Bound: in the last pass 2 * num_iter loads and fused multiply-adds for every kLanes / 2 pairs.
#include "sinkhorn/band.h"

namespace afa {
namespace AFA_ISA {

struct SinkhornGradient {
  SinkhornArgs args;
  Band band;
  int64_t steps;
  float *window, *grad;
  double *scales, *slopes, *ones;  // [steps][H][line]: c and r after each half step, v and u of it; [line]

  SinkhornGradient(const SinkhornArgs& a, int threads, Arena& arena) : args(a), band(a, threads, arena), steps(2 * a.num_iter) {
    window = band.take_window(arena), grad = band.take_window(arena);
    scales = arena.take<double>(steps * band.vector_size());
    slopes = arena.take<double>(steps * band.vector_size());
    ones = arena.take<double>(band.line);
    if (arena.base) std::fill(ones, ones + band.line, 1.0);
  }
  double* step(double* vectors, int64_t k) const { return vectors + k * band.vector_size(); }
  // c or r after half step k at row y: 1 where nothing has been divided yet.
  const double* scale_row(int64_t k, int64_t y) const { return k < 0 ? ones + band.margin : band.at(step(scales, k), y); }

  void begin(const double* kept, const View<4>& grads, int64_t b, int64_t part) const {
    band.copy(args.affinity, b, part, window);
    band.copy(grads, b, part, grad);
    for (int64_t k = 0; k < steps; ++k) {
      band.clear(step(scales, k), part), band.clear(step(slopes, k), part);
      for (int64_t y = band.first_row(part); y < band.end_row(part); ++y) {
        const double* from = scale_of(args, kept, b, k) + y * band.width;
        std::copy(from, from + band.width, band.at(step(scales, k), y));
      }
    }
  }
  // (G + G') / 2 of the pairs whose tap is behind the centre, to both places: no other block touches these.
  void average(int64_t part) const {
    for (int64_t dy = 0; dy <= band.reach_y; ++dy)
      for (int64_t dx = dy > 0 ? -band.reach_x : 1; dx <= band.reach_x; ++dx)
        for (int64_t y = band.first_y(part, dy); y < band.end_y(part, dy); ++y) {
          float *own = band.at(grad, dy, dx, y), *back = band.at(grad, -dy, -dx, y + dy) + dx;
          for (int64_t x = band.first_x(dx); x < band.end_x(dx); ++x) own[x] = back[x] = float((double(own[x]) + back[x]) * 0.5);
        }
  }
  // u or v of half step k.
  void step_back(int64_t k, int64_t part) const {
    double* sums = band.own_sums();
    const double* after = k + 1 < steps ? step(slopes, k + 1) : nullptr;
    if (k == steps - 1)
      band.sum_rows<true>(window, grad, step(scales, k - 1), part, sums);
    else if (k == steps - 2)
      band.sum_columns<true>(window, grad, after, step(scales, k + 1), part, sums);
    else if (k % 2 == 1)
      band.sum_rows<false>(window, nullptr, after, part, sums);
    else
      band.sum_columns<false>(window, nullptr, after, nullptr, part, sums);
    for (int64_t y = band.first_row(part); y < band.end_row(part); ++y, sums += band.row) {
      const double *scale = scale_row(k, y), *later = k + 2 < steps ? band.at(step(slopes, k + 2), y) : nullptr;
      double* slope = band.at(step(slopes, k), y);
      for (int64_t x = 0; x < band.width; ++x) slope[x] = -(scale[x] * sums[x]) * scale[x];
      for (int64_t x = 0; x < band.width && later && args.eps > 0; ++x) slope[x] += args.eps * later[x];
    }
  }
  void write(const View<4>& out, int64_t b, int64_t part) const {
    band.write(out, b, part, [this](int64_t dy, int64_t dx, int64_t y, float* to) {
      const float* from = band.at(grad, dy, dx, y);
      const double *other_c = scale_row(steps - 2, y + dy) + dx, *own_r = scale_row(steps - 1, y);
      for (int64_t x = 0; x < band.row; x += kDoubles) {
        vdouble sum = wide(from + x) * load(other_c + x) * load(own_r + x);
        for (int64_t k = 0; k < steps; k += 2) {
          const double *v = band.at(step(slopes, k), y + dy) + dx, *u = band.at(step(slopes, k + 1), y);
          sum += load(scale_row(k - 1, y) + x) * load(v + x);
          sum += load(u + x) * load(scale_row(k, y + dy) + dx + x);
        }
        store(to + x, narrow(sum));
      }
    });
  }
};

int64_t sinkhorn_gradient_bytes(const SinkhornArgs& args, int threads) {
  Arena arena(nullptr);
  SinkhornGradient(args, threads, arena);
  return arena.used;
}

Status sinkhorn_gradient(const SinkhornArgs& args, const double* scales, const View<4>& grad, const View<4>& out, void* workspace,
                         int threads) {
  if (!fits(args, grad) || !fits(args, out) || threads < 1) return Status::bad_argument;
  Arena arena(workspace);
  const SinkhornGradient run(args, threads, arena);
  const int64_t blocks = run.band.blocks;
  for (int64_t b = 0; b < out.size[0]; ++b) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < blocks; ++part) run.begin(scales, grad, b, part);
      if (args.symmetric) {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < blocks; ++part) run.average(part);
      }
      for (int64_t k = run.steps - 1; k >= 0; --k) {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < blocks; ++part) run.step_back(k, part);
      }
#pragma omp for schedule(static)
      for (int64_t part = 0; part < blocks; ++part) run.write(out, b, part);
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t sinkhorn_gradient_bytes(const SinkhornArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status sinkhorn_gradient(const SinkhornArgs& args, const double* scales, const View<4>& grad, const View<4>& out,
                                             void* workspace, int threads))

int64_t sinkhorn_gradient_cpu_workspace(const SinkhornArgs& args, int threads) { AFA_DISPATCH(sinkhorn_gradient_bytes, args, threads) }
Status sinkhorn_gradient_cpu(const SinkhornArgs& args, const double* scales, const View<4>& grad, const View<4>& grad_affinity,
                             void* workspace, int threads) {
  AFA_DISPATCH(sinkhorn_gradient, args, scales, grad, grad_affinity, workspace, threads)
}
#endif

}  // namespace afa
