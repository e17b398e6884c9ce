// A lattice as its kernels see it.
//
// An entry e = i * (d + 1) + r is corner r of point i's simplex; vertices are numbered as entries first meet them. The entries of a
// vertex, points in order, are summed by chunks of kChunk, so that a vertex that has a whole image's is shared by many threads; how they
// are cut depends on their number alone, and so do the bits of the sum.
#pragma once

#include "bilateral/lattice_cuda.h"
#include "common/arena.h"
#include "common/cuda_common.cuh"

namespace afa {

constexpr int kMostLatticeDims = 32;
constexpr int kChunk = 64, kMostChunks = 1024;  // of a vertex; then chunks are longer

__host__ __device__ inline int chunk_length(int entries) {
  return entries <= kChunk * kMostChunks ? kChunk : (entries + kMostChunks - 1) / kMostChunks;
}

enum LatticeCount { kVertices = 0, kChunks = 1, kShared = 2, kLatticeCounts = 3 };

struct LatticeArrays {
  int points, entries, corners;
  int32_t* count;  // [3] vertices, further chunks (not a vertex's first), vertices that have some
  int2* corner;    // [entries] vertex and, as bits, weight
  int2* list;      // [entries] point and share, sorted by vertex
  int2* near;      // [corners][entries] the two neighbours of each vertex along every axis; -1 where there is none
  int32_t* start;  // [entries + 1] where a vertex's list begins
  int32_t* extra;  // [entries] its first further chunk
  int2* chunk;     // [further chunks] vertex, and where it begins
  int32_t* shared; // vertices that have further chunks

  LatticeArrays(const CudaLattice& lattice, baseline::Arena& arena)
      : points(int(lattice.points)), entries(int(lattice.points * (lattice.dims + 1))), corners(int(lattice.dims + 1)) {
    const int64_t most = lattice.points * (lattice.dims + 1);
    count = arena.take<int32_t>(kLatticeCounts);
    corner = arena.take<int2>(most);
    list = arena.take<int2>(most);
    near = arena.take<int2>(most * corners);
    start = arena.take<int32_t>(most + 1);
    extra = arena.take<int32_t>(most);
    chunk = arena.take<int2>(further(most));
    shared = arena.take<int32_t>(further(most));
  }
  static int64_t further(int64_t entries) { return entries / kChunk + 1; }
};

inline LatticeArrays arrays_of(const CudaLattice& lattice) {
  baseline::Arena arena(lattice.memory);
  return LatticeArrays(lattice, arena);
}

// Entries are counted in 32 bits, slots of a table twice as large too.
inline Status check_lattice(const CudaLattice& lattice) {
  if (lattice.points < 1 || lattice.dims < 1 || lattice.dims > kMostLatticeDims) return Status::bad_argument;
  return lattice.points < (int64_t(1) << 30) / (lattice.dims + 1) ? Status::ok : Status::unsupported;
}

// As many blocks as there is work for, but no more than keep the device busy: they walk on.
inline unsigned busy_blocks(int64_t blocks) {
  const int64_t most = int64_t(device_limits().multiprocessors) * 16;
  return unsigned(blocks < most ? blocks : most);
}

}  // namespace afa
