// The permutohedral lattice of a cloud of points, on the CPU.
//
// Data flow: every point is lifted to the plane of coordinates that sum to 0, rounded to the nearest point whose coordinates are
// multiples of d + 1, and the order of its remainders says in which simplex it lies: in parallel. Then the corners are
// numbered by a hash table, in the order in which points meet them, which keeps neighbours near in memory; a point in the simplex of the one
// before it, as in flat regions, is not looked up. Then each vertex looks for its neighbour along every axis, whose own neighbour
// the other way it is, and points are sorted by vertex, so that splatting is a sum over a list.
// Compiled without fused multiply-adds: which simplex a point is in must not depend on the instruction set.
// Floor: N * (d + 1) lookups at worst, M * (d + 1) for the neighbours. Bound: cache misses of the table.
#include <algorithm>
#include <cmath>

#include "bilateral/bilateral.h"
#include "common/arena.h"
#include "common/cpu.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

struct LatticeScratch {
  int32_t* base;       // [N][d] the multiples of d + 1, of the first d coordinates
  uint8_t* rank;       // [N][d + 1]
  int32_t* keys;       // [N * (d + 1)][d] of the vertices
  uint32_t* hashes;    // [N * (d + 1)]
  uint64_t* table;     // [capacity] hash above, vertex + 1 below; 0 is free
  int64_t capacity;

  LatticeScratch(int64_t points, int64_t dims, Arena& arena) {
    const int64_t most = points * (dims + 1);
    for (capacity = 1 << 10; capacity < 2 * most; capacity *= 2) {
    }
    base = arena.take<int32_t>(points * dims);
    rank = arena.take<uint8_t>(most);
    keys = arena.take<int32_t>(most * dims);
    hashes = arena.take<uint32_t>(most);
    table = arena.take<uint64_t>(capacity);
    used = arena.take<int64_t>(1);
  }
  int64_t* used;  // how much of the table is in use, a power of 2: kept between the two calls
};

static inline uint32_t hash_of(const int32_t* key, int64_t dims) {
  uint64_t hash = 0;
  for (int64_t k = 0; k < dims; ++k) hash = (hash + uint32_t(key[k])) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
  hash ^= hash >> 32;
  return uint32_t(hash);
}
static inline bool same_key(const int32_t* a, const int32_t* b, int64_t dims) {
  int32_t differs = 0;
  for (int64_t k = 0; k < dims; ++k) differs |= a[k] ^ b[k];
  return differs == 0;
}

// The slot of a key: its vertex's, or the free one where it belongs.
static inline int64_t slot_of(const LatticeScratch& scratch, const int32_t* key, uint32_t hash, int64_t dims) {
  const int64_t mask = *scratch.used - 1;
  int64_t slot = hash & mask;
  for (; scratch.table[slot]; slot = (slot + 1) & mask)
    if (uint32_t(scratch.table[slot] >> 32) == hash) {
      const int64_t vertex = int64_t(uint32_t(scratch.table[slot])) - 1;
      if (same_key(scratch.keys + vertex * dims, key, dims)) break;
    }
  return slot;
}

static void grow(const LatticeScratch& scratch, int64_t vertices) {
  *scratch.used *= 2;
  std::fill(scratch.table, scratch.table + *scratch.used, uint64_t(0));
  const int64_t mask = *scratch.used - 1;
  for (int64_t v = 0; v < vertices; ++v) {
    int64_t slot = scratch.hashes[v] & mask;
    while (scratch.table[slot]) slot = (slot + 1) & mask;
    scratch.table[slot] = uint64_t(scratch.hashes[v]) << 32 | uint64_t(v + 1);
  }
}

// Points beyond this, in multiples of d + 1, would have no exact coordinates; NaN goes to 0.
constexpr float kFarthest = float(1 << 22);

// Which simplex a point is in, and its barycentric weights.
template <int kDims>
static inline void locate(const float* feature, const float* scales, int dims_given, int32_t* base, uint8_t* rank, float* weight) {
  const int dims = kDims ? kDims : dims_given;
  constexpr int most = kDims ? kDims : kMostDims;
  float lifted[most + 1], nearest[most + 1], barycentric[most + 2];
  int order[most + 1];
  float sum = 0;
  for (int j = dims; j > 0; --j) {
    const float scaled = feature[j - 1] * scales[j - 1];
    lifted[j] = sum - float(j) * scaled;
    sum += scaled;
  }
  lifted[0] = sum;
  const float inverse = 1.0f / float(dims + 1);
  float steps = 0;
  for (int j = 0; j <= dims; ++j) {
    float step = __builtin_rintf(inverse * lifted[j]);
    step = step > -kFarthest && step < kFarthest ? step : 0.0f;
    nearest[j] = step * float(dims + 1);
    steps += step;
    order[j] = 0;
  }
  for (int i = 0; i < dims; ++i) {
    const float own = lifted[i] - nearest[i];
    for (int j = i + 1; j <= dims; ++j) {
      const int less = own < lifted[j] - nearest[j];
      order[i] += less, order[j] += 1 - less;
    }
  }
  // Where the nearest multiples do not sum to 0, those that were rounded most go the other way.
  const int excess = steps > -float(dims + 1) && steps < float(dims + 1) ? int(steps) : 0;
  for (int j = 0; j <= dims; ++j) {
    order[j] += excess;
    if (order[j] < 0)
      order[j] += dims + 1, nearest[j] += float(dims + 1);
    else if (order[j] > dims)
      order[j] -= dims + 1, nearest[j] -= float(dims + 1);
    barycentric[j] = 0;
  }
  barycentric[dims + 1] = 0;
  for (int j = 0; j <= dims; ++j) {
    const float part = (lifted[j] - nearest[j]) * inverse;
    barycentric[dims - order[j]] += part;
    barycentric[dims + 1 - order[j]] -= part;
  }
  barycentric[0] += 1.0f + barycentric[dims + 1];
  for (int j = 0; j <= dims; ++j) rank[j] = uint8_t(order[j]), weight[j] = barycentric[j];
  for (int j = 0; j < dims; ++j) base[j] = int32_t(nearest[j]);
}

template <int kDims>
static int64_t number(const Lattice& lattice, const LatticeScratch& scratch) {
  const int64_t dims = kDims ? kDims : lattice.dims, corners = dims + 1;
  int64_t vertices = 0;
  *scratch.used = 1 << 10;
  std::fill(scratch.table, scratch.table + *scratch.used, uint64_t(0));
  for (int64_t i = 0; i < lattice.points; ++i) {
    const int32_t* base = scratch.base + i * dims;
    const uint8_t* rank = scratch.rank + i * corners;
    int32_t* index = lattice.index + i * corners;
    if (i > 0 && same_key(base, base - dims, dims) && std::memcmp(rank, rank - corners, size_t(corners)) == 0) {
      std::memcpy(index, index - corners, size_t(corners) * sizeof *index);
      continue;
    }
    for (int64_t r = 0; r < corners; ++r) {
      int32_t* key = scratch.keys + vertices * dims;  // there for good if it is a new one
      for (int64_t k = 0; k < dims; ++k) key[k] = base[k] + int32_t(r) - (rank[k] > dims - r ? int32_t(corners) : 0);
      const uint32_t hash = hash_of(key, dims);
      int64_t slot = slot_of(scratch, key, hash, dims);
      if (!scratch.table[slot]) {
        scratch.hashes[vertices] = hash;
        scratch.table[slot] = uint64_t(hash) << 32 | uint64_t(vertices + 1);
        index[r] = int32_t(vertices++);
        if (2 * vertices > *scratch.used) grow(scratch, vertices);
      } else {
        index[r] = int32_t(uint32_t(scratch.table[slot]) - 1);
      }
    }
  }
  return vertices;
}

template <int kDims>
static void corners_of(const float* features, Lattice* lattice, const LatticeScratch& scratch, int threads) {
  const int dims = kDims ? kDims : int(lattice->dims);
  float scales[kMostDims];
  for (int i = 0; i < dims; ++i)
    scales[i] = float(1.0 / std::sqrt(double((i + 1) * (i + 2))) * float(std::sqrt(2.0 / 3.0) * (dims + 1)));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < lattice->points; ++i)
    locate<kDims>(features + i * dims, scales, dims, scratch.base + i * dims, scratch.rank + i * (dims + 1),
                  lattice->weight + i * (dims + 1));
  lattice->vertices = number<kDims>(*lattice, scratch);
}

int64_t lattice_scratch_bytes(int64_t points, int64_t dims) {
  Arena arena(nullptr);
  LatticeScratch(points, dims, arena);
  return arena.used;
}

static bool sound(const Lattice& lattice) {
  return lattice.points > 0 && lattice.dims > 0 && lattice.dims <= kMostDims &&
         lattice.points < (int64_t(1) << 31) / (lattice.dims + 1) - 1;
}

Status lattice_corners(const float* features, Lattice* lattice, void* workspace, int threads) {
  if (!sound(*lattice)) return Status::bad_argument;
  Arena arena(workspace);
  const LatticeScratch scratch(lattice->points, lattice->dims, arena);
  switch (lattice->dims) {
    case 2: corners_of<2>(features, lattice, scratch, threads); break;
    case 5: corners_of<5>(features, lattice, scratch, threads); break;
    default: corners_of<0>(features, lattice, scratch, threads); break;
  }
  return Status::ok;
}

Status lattice_links(Lattice* lattice, void* workspace, int threads) {
  if (!sound(*lattice)) return Status::bad_argument;
  Arena arena(workspace);
  const LatticeScratch scratch(lattice->points, lattice->dims, arena);
  const int64_t dims = lattice->dims, corners = dims + 1, vertices = lattice->vertices;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < corners * vertices * 2; ++i) lattice->near[i] = int32_t(vertices);
    int32_t key[kMostDims];
#pragma omp for schedule(static)
    for (int64_t v = 0; v < vertices; ++v)
      for (int64_t axis = 0; axis < corners; ++axis) {
        for (int64_t k = 0; k < dims; ++k) key[k] = scratch.keys[v * dims + k] + 1;
        if (axis < dims) key[axis] -= int32_t(corners);
        const int64_t slot = slot_of(scratch, key, hash_of(key, dims), dims);
        if (!scratch.table[slot]) continue;
        const int64_t other = int64_t(uint32_t(scratch.table[slot])) - 1;
        lattice->near[(axis * vertices + v) * 2] = int32_t(other);
        lattice->near[(axis * vertices + other) * 2 + 1] = int32_t(v);
      }
  }
  int32_t* start = lattice->start;
  std::fill(start, start + vertices + 1, 0);
  const int64_t all = lattice->points * corners;
  for (int64_t e = 0; e < all; ++e) ++start[lattice->index[e]];
  int32_t sum = 0;
  for (int64_t v = 0; v <= vertices; ++v) sum += start[v], start[v] = sum;
  // From the last to the first, so that each start ends where its list begins.
  for (int64_t i = lattice->points - 1; i >= 0; --i)
    for (int64_t r = dims; r >= 0; --r) {
      const int32_t at = --start[lattice->index[i * corners + r]];
      lattice->point[at] = int32_t(i), lattice->share[at] = lattice->weight[i * corners + r];
    }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t lattice_scratch_bytes(int64_t points, int64_t dims))
AFA_DECLARE_PER_ISA(Status lattice_corners(const float* features, Lattice* lattice, void* workspace, int threads))
AFA_DECLARE_PER_ISA(Status lattice_links(Lattice* lattice, void* workspace, int threads))

int64_t lattice_build_cpu_workspace(int64_t points, int64_t dims) { return baseline::lattice_scratch_bytes(points, dims); }
Status lattice_corners_cpu(const float* features, Lattice* lattice, void* workspace, int threads) {
  AFA_DISPATCH(lattice_corners, features, lattice, workspace, threads)
}
Status lattice_links_cpu(Lattice* lattice, void* workspace, int threads) {
  AFA_DISPATCH(lattice_links, lattice, workspace, threads)
}
#endif

}  // namespace afa
