// Sinkhorn normalisation on the CPU.
//
// Data flow, one image at a time, so that its window stays in a cache where it fits: it is copied, and every half step is a pass in
// which the threads sum up rows of pixels and renew their factors; a last pass writes r_i A_ij c_j. The same bits for any number of
// threads. Floor: the window read 2 * num_iter + 1 times and written once. Bound: that, from memory; from a cache two loads, one of them
// a conversion, for every kLanes / 2 products.
#include "sinkhorn/band.h"

namespace afa {
namespace AFA_ISA {

// 1 / (sum + eps / before). A column or row of zeros has eps / before alone, which with eps > 0 must not become so small that
// its inverse is infinite: 0 times that is no number, and it stays 0.
static inline double renewed(double sum, double before, double eps) {
  const double scale = 1 / (eps > 0 ? sum + eps / before : sum);
  return eps > 0 && scale > 1e300 ? 1e300 : scale;
}

struct Sinkhorn {
  SinkhornArgs args;
  Band band;
  float* window;
  double* vectors[2];  // c and r

  Sinkhorn(const SinkhornArgs& a, int threads, Arena& arena) : args(a), band(a, threads, arena) {
    window = band.take_window(arena);
    for (double*& vector : vectors) vector = arena.take<double>(band.vector_size());
  }
  void begin_row(int64_t b, int64_t y) const {
    band.copy_row(args.affinity, b, y, window);
    for (double* vector : vectors) {
      band.clear(vector, y);
      std::fill(band.at(vector, y), band.at(vector, y) + band.width, 1.0);
    }
  }
  // Half step k: over columns, then over rows.
  void step_row(int64_t k, int64_t y, double* kept) const {
    double* sums = band.own_sums();
    if (k % 2 == 0)
      band.sum_column<false>(window, nullptr, vectors[1], nullptr, y, sums);
    else
      band.sum_row<false>(window, nullptr, vectors[0], y, sums);
    double* scale = band.at(vectors[k % 2], y);
    for (int64_t x = 0; x < band.width; ++x) kept[y * band.width + x] = scale[x] = renewed(sums[x], scale[x], args.eps);
  }
  void write_row(const View<4>& out, int64_t b, int64_t y) const {
    const double *own_c = band.at(vectors[0], y), *own_r = band.at(vectors[1], y);
    band.write_row(out, b, y, [&](int64_t dy, int64_t dx, float* to) {
      const float *from = band.at(window, dy, dx, y), *back = band.at(window, -dy, -dx, y + dy) + dx;
      const double *other_c = band.at(vectors[0], y + dy) + dx, *other_r = band.at(vectors[1], y + dy) + dx;
      for (int64_t x = 0; x < band.row; x += kDoubles) {
        const vnarrow value = narrow(wide(from + x) * load(other_c + x) * load(own_r + x));
        if (!args.symmetric) {
          store(to + x, value);
          continue;
        }
        // Both are rounded before they are added, so that the pixel at the other end comes to the same bits.
        const vnarrow other = narrow(wide(back + x) * load(own_c + x) * load(other_r + x));
        store(to + x, narrow((__builtin_convertvector(value, vdouble) + __builtin_convertvector(other, vdouble)) * 0.5));
      }
    });
  }
};

int64_t sinkhorn_bytes(const SinkhornArgs& args, int threads) {
  Arena arena(nullptr);
  Sinkhorn(args, threads, arena);
  return arena.used;
}

Status sinkhorn(const SinkhornArgs& args, const View<4>& out, double* scales, void* workspace, int threads) {
  if (!fits(args, out) || threads < 1) return Status::bad_argument;
  Arena arena(workspace);
  const Sinkhorn run(args, threads, arena);
  const int64_t height = run.band.height;
  for (int64_t b = 0; b < out.size[0]; ++b) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t y = 0; y < height; ++y) run.begin_row(b, y);
      for (int64_t k = 0; k < 2 * args.num_iter; ++k) {
#pragma omp for schedule(static)
        for (int64_t y = 0; y < height; ++y) run.step_row(k, y, scale_of(args, scales, b, k));
      }
#pragma omp for schedule(static)
      for (int64_t y = 0; y < height; ++y) run.write_row(out, b, y);
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t sinkhorn_bytes(const SinkhornArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status sinkhorn(const SinkhornArgs& args, const View<4>& out, double* scales, void* workspace, int threads))

int64_t sinkhorn_cpu_workspace(const SinkhornArgs& args, int threads) { AFA_DISPATCH(sinkhorn_bytes, args, threads) }
Status sinkhorn_cpu(const SinkhornArgs& args, const View<4>& out, double* scales, void* workspace, int threads) {
  AFA_DISPATCH(sinkhorn, args, out, scales, workspace, threads)
}
#endif

}  // namespace afa
