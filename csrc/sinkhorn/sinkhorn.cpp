// Sinkhorn normalisation on the CPU.
//
// Data flow, one image at a time, so that its window stays in a cache where it fits: it is copied, and every half step is a pass in
// which the threads sum up blocks of rows and renew their factors; a last pass writes r_i A_ij c_j. The same bits for any number of
// threads. Floor: the window read 2 * num_iter + 1 times and written once. Bound: that, from memory; from a cache two loads, one of them
// a conversion, for every kLanes / 2 products.
#include "sinkhorn/band.h"

namespace afa {
namespace AFA_ISA {

struct Sinkhorn {
  SinkhornArgs args;
  Band band;
  float* window;
  double* vectors[2];  // c and r

  Sinkhorn(const SinkhornArgs& a, int threads, Arena& arena) : args(a), band(a, threads, arena) {
    window = band.take_window(arena);
    for (double*& vector : vectors) vector = arena.take<double>(band.vector_size());
  }
  void begin(int64_t b, int64_t part) const {
    band.copy(args.affinity, b, part, window);
    for (double* vector : vectors) {
      band.clear(vector, part);
      for (int64_t y = band.first_row(part); y < band.end_row(part); ++y)
        std::fill(band.at(vector, y), band.at(vector, y) + band.width, 1.0);
    }
  }
  // Half step k: over columns, then over rows.
  void step(int64_t k, int64_t part, double* kept) const {
    double* sums = band.own_sums();
    if (k % 2 == 0)
      band.sum_columns<false>(window, nullptr, vectors[1], nullptr, part, sums);
    else
      band.sum_rows<false>(window, nullptr, vectors[0], part, sums);
    for (int64_t y = band.first_row(part); y < band.end_row(part); ++y, sums += band.row) {
      double* scale = band.at(vectors[k % 2], y);
      for (int64_t x = 0; x < band.width; ++x) kept[y * band.width + x] = scale[x] = renewed_scale(sums[x], scale[x], args.eps);
    }
  }
  void write(const View<4>& out, int64_t b, int64_t part) const {
    band.write(out, b, part, [this](int64_t dy, int64_t dx, int64_t y, float* to) {
      const double *own_c = band.at(vectors[0], y), *own_r = band.at(vectors[1], y);
      const double *other_c = band.at(vectors[0], y + dy) + dx, *other_r = band.at(vectors[1], y + dy) + dx;
      const float *from = band.at(window, dy, dx, y), *back = band.at(window, -dy, -dx, y + dy) + dx;
      for (int64_t x = 0; x < band.row; x += kDoubles) {
        const vnarrow value = narrow(wide(from + x) * load(other_c + x) * load(own_r + x));
        if (!args.symmetric) {
          store(to + x, value);
          continue;
        }
        // Both are rounded before they are added, so that the pixel at the other end comes to the same bits.
        const vnarrow other = narrow(wide(back + x) * load(own_c + x) * load(other_r + x));
        store(to + x, narrow((widened(value) + widened(other)) * 0.5));
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
  const int64_t blocks = run.band.blocks;
  for (int64_t b = 0; b < out.size[0]; ++b) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < blocks; ++part) run.begin(b, part);
      for (int64_t k = 0; k < 2 * args.num_iter; ++k) {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < blocks; ++part) run.step(k, part, scale_of(args, scales, b, k));
      }
#pragma omp for schedule(static)
      for (int64_t part = 0; part < blocks; ++part) run.write(out, b, part);
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
