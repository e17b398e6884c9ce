// Filtering by a permutohedral lattice that is built, on the CPU.
//
// Data flow, up to 32 channels at a time: each tile of pixels, its channels side by side, adds itself to its own rows (splat); each
// vertex sums the rows that are of it, a pass along the chains of each axis changes them in place (blur); each tile fetches its rows again,
// of which every point sums its corners (slice). Who adds to what and in which order follows from the tiles: the same bits for any
// number of threads.
// Floor: bytes. Of a pixel its values in and out, and (d + 1) corners and weights twice; of a tile's row three moves, of a vertex's
// at most 2 (d + 1) + 2, from the caches shared by the cores. Bound: these, and splat and slice, which touch (d + 1) rows for each pixel
// in a core's own cache.
#include "bilateral/lattice_filter.h"

namespace afa {
namespace AFA_ISA {

// A channel that comes alone, as norms do, fills no vector.
static inline int64_t filter_row(int64_t channels) { return channels == 1 ? 1 : channel_row(channels); }

struct FilterScratch {
  LatticeTables tables;
  int64_t fetched_floats, pixel_floats, line_count;  // for each thread:
  float *fetched, *pixels, *lines;                    // a tile's rows, its pixels, lines of planes
  FilterScratch(const TiledLattice& lattice, const View<4>& values, int threads, Arena& arena)
      : tables(lattice, filter_row(std::min(values.size[1], kMostChannels)), arena) {
    fetched_floats = round_up(lattice.most * tables.row, 16), pixel_floats = kTilePoints * tables.row;
    line_count = line_floats(tables.row, Tiles(lattice.height, lattice.width, lattice.dims));
    fetched = arena.take<float>(threads * fetched_floats);
    pixels = arena.take<float>(threads * pixel_floats);
    lines = arena.take<float>(threads * line_count);
  }
};

int64_t filter_bytes(const TiledLattice& lattice, const View<4>& values, int threads) {
  Arena arena(nullptr);
  FilterScratch(lattice, values, threads, arena);
  return arena.used;
}

Status filter_lattice(const TiledLattice& lattice, const View<4>& values, const View<4>& out, bool transpose, void* workspace,
                      int threads) {
  if (!same_size(values, out) || is_empty(values) || values.size[0] != 1 || values.size[2] != lattice.height ||
      values.size[3] != lattice.width)
    return Status::bad_argument;
  Arena arena(workspace);
  const FilterScratch scratch(lattice, values, threads, arena);
  const Tiles tiles(lattice.height, lattice.width, lattice.dims);
  const TiledLattice* const lattices[] = {&lattice};
  for (int64_t first = 0; first < values.size[1]; first += kMostChannels) {
    const int64_t channels = std::min(values.size[1] - first, kMostChannels);
    LatticeTables tables = scratch.tables;
    tables.row = filter_row(channels);
    const int64_t row = tables.row;
#pragma omp parallel num_threads(threads)
    {
      float* fetched = scratch.fetched + thread_number() * scratch.fetched_floats;
      float* pixels = scratch.pixels + thread_number() * scratch.pixel_floats;
      float* lines = scratch.lines + thread_number() * scratch.line_count;
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < tiles.count; ++t) {
        const Tile tile = tiles[t];
        float* rows = tables.rows + lattice.first[t] * row;
        std::fill(rows, tables.rows + lattice.first[t + 1] * row, 0.0f);
        side_by_side(values, tile, first, channels, 1.0f, 0.0f, lines, pixels, row, row);
        with_vectors(row, [&](auto vectors) { splat<decltype(vectors)::value>(lattice, tile, nullptr, pixels, row, rows); });
      }
      blur_all(lattices, &tables, 1, transpose);
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < tiles.count; ++t) {
        const Tile tile = tiles[t];
        with_vectors(row, [&](auto vectors) {
          fetch<decltype(vectors)::value>(lattice, t, tables.vertices, fetched);
          slice<decltype(vectors)::value>(lattice, tile, fetched, alpha(lattice), nullptr, nullptr, pixels, row);
        });
        apart(out, tile, first, channels, lines, pixels, row, row);
      }
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t filter_bytes(const TiledLattice& lattice, const View<4>& values, int threads))
AFA_DECLARE_PER_ISA(Status filter_lattice(const TiledLattice& lattice, const View<4>& values, const View<4>& out, bool transpose,
                                          void* workspace, int threads))

int64_t lattice_filter_cpu_workspace(const TiledLattice& lattice, const View<4>& values, int threads) {
  AFA_DISPATCH(filter_bytes, lattice, values, threads)
}
Status lattice_filter_cpu(const TiledLattice& lattice, const View<4>& values, const View<4>& out, bool transpose, void* workspace,
                          int threads) {
  AFA_DISPATCH(filter_lattice, lattice, values, out, transpose, workspace, threads)
}
#endif

}  // namespace afa
