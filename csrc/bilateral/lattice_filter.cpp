// Filtering by a permutohedral lattice that is built, on the CPU.
//
// Data flow, up to 32 channels at a time: pixels with their channels side by side; each vertex sums its points (splat), a pass along
// each axis reads one table of vertices and writes another (blur), each point sums its corners (slice). All are
// gathers in a fixed order: the same bits for any number of threads. A row behind the last vertex is zero, for neighbours that are not there.
// Floor: bytes, 2 * N * (d + 1) rows for splat and slice and 4 * M * (d + 1) for the blur. Bound: these, from the caches.
#include "bilateral/lattice_filter.h"

namespace afa {
namespace AFA_ISA {

struct LatticeTables {
  int64_t row;
  float *pixels, *first, *second, *lines;  // [N][row], [M + 1][row] twice, [threads][channels][W]
  LatticeTables(const Lattice& lattice, const View<4>& values, int threads, Arena& arena)
      : row(channel_row(std::min(values.size[1], kMostChannels))) {
    pixels = arena.take<float>(lattice.points * row);
    first = arena.take<float>((lattice.vertices + 1) * row);
    second = arena.take<float>((lattice.vertices + 1) * row);
    lines = arena.take<float>(threads * row * values.size[3]);
  }
};

int64_t filter_bytes(const Lattice& lattice, const View<4>& values, int threads) {
  Arena arena(nullptr);
  LatticeTables(lattice, values, threads, arena);
  return arena.used;
}

Status filter_lattice(const Lattice& lattice, const View<4>& values, const View<4>& out, bool transpose, void* workspace, int threads) {
  if (!same_size(values, out) || is_empty(values) || values.size[0] != 1 || values.size[2] * values.size[3] != lattice.points)
    return Status::bad_argument;
  Arena arena(workspace);
  const LatticeTables tables(lattice, values, threads, arena);
  const int64_t height = values.size[2], width = values.size[3];
  for (int64_t first = 0; first < values.size[1]; first += kMostChannels) {
    const int64_t channels = std::min(values.size[1] - first, kMostChannels), row = channel_row(channels);
#pragma omp parallel num_threads(threads)
    {
      float* lines = tables.lines + thread_number() * tables.row * width;
#pragma omp for schedule(static)
      for (int64_t y = 0; y < height; ++y) side_by_side(values, 0, first, channels, y, lines, tables.pixels + y * width * row, row);
      filter_rows(lattice, {tables.pixels, nullptr, tables.pixels, row, row, 1.0f}, transpose, tables.first, tables.second);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < height; ++y) apart(out, 0, first, channels, y, lines, tables.pixels + y * width * row, row);
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t filter_bytes(const Lattice& lattice, const View<4>& values, int threads))
AFA_DECLARE_PER_ISA(Status filter_lattice(const Lattice& lattice, const View<4>& values, const View<4>& out, bool transpose,
                                          void* workspace, int threads))

int64_t lattice_filter_cpu_workspace(const Lattice& lattice, const View<4>& values, int threads) {
  AFA_DISPATCH(filter_bytes, lattice, values, threads)
}
Status lattice_filter_cpu(const Lattice& lattice, const View<4>& values, const View<4>& out, bool transpose, void* workspace,
                          int threads) {
  AFA_DISPATCH(filter_lattice, lattice, values, out, transpose, workspace, threads)
}
#endif

}  // namespace afa
