// The permutohedral lattice of the pixels of an image, or of any points, on the CPU.
//
// Data flow: every point is lifted to the plane of coordinates that sum to 0, rounded to the nearest point whose coordinates are
// multiples of d + 1, and the order of its remainders says in which simplex it lies. Each tile of points numbers the corners it meets
// by a hash table of its own, which stays in the cache: in parallel. Then the tiles' corners, in the order of tiles, are numbered by one
// table for all: as first met, which keeps neighbours near in memory, and the same however many threads there were. Then each vertex
// looks for its neighbour along every axis, which makes chains of them, and the tiles' rows are sorted by vertex.
// A key's hash is a sum of its coordinates times odd numbers: a corner's or a neighbour's follows from that of the last by an addition.
// Compiled without fused multiply-adds: which simplex a point is in must not depend on the instruction set.
// Floor: N * (d + 1) lookups at worst, M * (d + 1) for the neighbours. Bound: instructions of the lookups in a tile's table, 11 ns
// each, then cache misses of the table of all: 29 ns for a neighbour, 20 ns for a row, which one thread alone meets.
#include <algorithm>
#include <cmath>

#include "bilateral/bilateral.h"
#include "bilateral/lattice_tiles.h"
#include "common/arena.h"
#include "common/cpu.h"
#include "common/simd.h"
#include "common/threads.h"

namespace afa {
namespace AFA_ISA {

// Of the tiles. What is measured for N points is used by the tiles that have that much; a tile's part begins at (d + 1) times its first
// point.
struct TileScratch {
  int32_t* keys;      // [N * (d + 1)][d] of the tiles' rows
  uint64_t* hashes;   // [N * (d + 1)] of them
  uint16_t* table;    // [threads][slots] a tile's row + 1; 0 is free
  int64_t slots;

  TileScratch(const TiledLattice& lattice, int threads, Arena& arena) {
    const Tiles tiles(lattice.height, lattice.width, lattice.dims);
    const int64_t most = lattice.height * lattice.width * (lattice.dims + 1);
    for (slots = 1 << 10; slots < 2 * tiles.tall * tiles.wide * (lattice.dims + 1); slots *= 2) {
    }
    keys = arena.take<int32_t>(most * lattice.dims);
    hashes = arena.take<uint64_t>(most);
    table = arena.take<uint16_t>(threads * slots);
  }
};

// Of the vertices, at most as many as rows.
struct VertexScratch {
  int32_t* keys;      // [rows][d]
  uint64_t* hashes;   // [rows]
  uint64_t* table;    // [capacity] half a hash above, vertex + 1 below; 0 is free
  int32_t* next;      // [d + 1][rows] the neighbour along an axis, or -1
  uint8_t* inner;     // [d + 1][rows] whether it is another's
  int64_t capacity;
  mutable int bits = kLeastBits;  // of the table's size in use

  VertexScratch(const TiledLattice& lattice, Arena& arena) {
    for (capacity = 1 << kLeastBits; capacity < 2 * lattice.rows; capacity *= 2) {
    }
    keys = arena.take<int32_t>(lattice.rows * lattice.dims);
    hashes = arena.take<uint64_t>(lattice.rows);
    table = arena.take<uint64_t>(capacity);
    next = arena.take<int32_t>(lattice.rows * (lattice.dims + 1));
    inner = arena.take<uint8_t>(lattice.rows * (lattice.dims + 1));
  }
  static constexpr int kLeastBits = 10;
};

// Of each coordinate, in a key's hash; their sum moves all of them by 1.
struct Factors {
  uint64_t of[kMostDims + 1], sum = 0;
  explicit Factors(int64_t dims) {
    uint64_t state = 0x9E3779B97F4A7C15u;
    for (int64_t k = 0; k < dims; ++k) {
      state += 0x9E3779B97F4A7C15u;
      uint64_t mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
      mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
      of[k] = (mixed ^ mixed >> 31) | 1, sum += of[k];
    }
    of[dims] = 0;  // the last coordinate is no part of a key
  }
};
static inline bool same_key(const int32_t* a, const int32_t* b, int64_t dims) {
  int32_t differs = 0;
  for (int64_t k = 0; k < dims; ++k) differs |= a[k] ^ b[k];
  return differs == 0;
}

constexpr int64_t kSoon = 16;  // lookups ahead of which memory is asked

// --- the table of all ---

static inline int64_t home(uint64_t hash, int bits) { return int64_t(hash >> (64 - bits)); }
static inline uint64_t entry(uint64_t hash, int64_t vertex) { return hash << 32 | uint64_t(vertex + 1); }

// The slot of a key: its vertex's, or the free one where it belongs.
static inline int64_t slot_of(const VertexScratch& scratch, const int32_t* key, uint64_t hash, int64_t dims) {
  const int64_t mask = (int64_t(1) << scratch.bits) - 1;
  int64_t slot = home(hash, scratch.bits);
  for (; scratch.table[slot]; slot = (slot + 1) & mask)
    if ((scratch.table[slot] ^ hash << 32) >> 32 == 0) {
      const int64_t vertex = int64_t(uint32_t(scratch.table[slot])) - 1;
      if (same_key(scratch.keys + vertex * dims, key, dims)) break;
    }
  return slot;
}

static void grow(const VertexScratch& scratch, int64_t vertices) {
  const int bits = ++scratch.bits;
  const int64_t mask = (int64_t(1) << bits) - 1;
  std::fill(scratch.table, scratch.table + mask + 1, uint64_t(0));
  for (int64_t v = 0; v < vertices; ++v) {
    const uint64_t hash = scratch.hashes[v];
    int64_t slot = home(hash, bits);
    while (scratch.table[slot]) slot = (slot + 1) & mask;
    scratch.table[slot] = entry(hash, v);
  }
}

// --- points ---

// Points beyond this, in multiples of d + 1, would have no exact coordinates; NaN goes to 0.
constexpr float kFarthest = float(1 << 22);

static inline vfloat chosen(vint condition, vfloat value) { return (vfloat)(condition & (vint)value); }

// Which simplices kLanes points are in, and their barycentric weights: coordinates [d], base [d], rank [d + 1], weight [d + 1] of them.
template <int kDims>
static inline void locate(const vfloat* feature, const float* scales, int dims_given, vfloat* base, vint* rank, vfloat* weight) {
  const int dims = kDims ? kDims : dims_given;
  constexpr int most = kDims ? kDims : kMostDims;
  vfloat lifted[most + 1], nearest[most + 1], own[most + 1], part[most + 2];
  vfloat sum = {};
  for (int j = dims; j > 0; --j) {
    const vfloat scaled = feature[j - 1] * scales[j - 1];
    lifted[j] = sum - float(j) * scaled;
    sum += scaled;
  }
  lifted[0] = sum;
  const float inverse = 1.0f / float(dims + 1);
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: rounds what is nearer than kFarthest to integers
  vfloat steps = {};
  for (int j = 0; j <= dims; ++j) {
    vfloat step = inverse * lifted[j] + magic - magic;
    step = chosen((step > -kFarthest) & (step < kFarthest), step);
    nearest[j] = step * float(dims + 1);
    own[j] = lifted[j] - nearest[j];
    steps += step;
    rank[j] = vint{};
  }
  for (int i = 0; i < dims; ++i)
    for (int j = i + 1; j <= dims; ++j) {
      const vint less = own[i] < own[j];  // -1 where it is
      rank[i] -= less, rank[j] += 1 + less;
    }
  // Where the nearest multiples do not sum to 0, those that were rounded most go the other way.
  steps = chosen((steps > -float(dims + 1)) & (steps < float(dims + 1)), steps);
  const vint excess = (vint)(steps + magic) - (vint)magic;
  for (int j = 0; j <= dims; ++j) {
    rank[j] += excess;
    const vint below = rank[j] < 0, above = rank[j] > dims;
    rank[j] += (below - above) * -(dims + 1);
    nearest[j] += chosen(below, splat(float(dims + 1))) - chosen(above, splat(float(dims + 1)));
    own[j] = (lifted[j] - nearest[j]) * inverse;
  }
  // By rank, from the highest; two differ by the weight of the corner between them.
  for (int r = 0; r <= dims; ++r) {
    part[r] = vfloat{};
    for (int j = 0; j <= dims; ++j) part[r] += chosen(rank[j] == dims - r, own[j]);
  }
  weight[0] = part[0] + (1.0f - part[dims]);
  for (int r = 1; r <= dims; ++r) weight[r] = part[r] - part[r - 1];
  for (int j = 0; j < dims; ++j) base[j] = nearest[j];
}

// Corners of the points of a tile among its rows, of which it returns the number.
template <int kDims>
static int32_t number(const Features& features, const Tile& tile, const float* scales, const Factors& factors, const TiledLattice& lattice,
                      const TileScratch& scratch, uint16_t* table) {
  const int64_t dims = kDims ? kDims : lattice.dims, corners = dims + 1;
  constexpr int most = kDims ? kDims : kMostDims;
  int32_t* keys = scratch.keys + tile.first * corners * dims;
  uint64_t* hashes = scratch.hashes + tile.first * corners;
  const int bits = __builtin_ctzll(uint64_t(scratch.slots));
  std::fill(table, table + scratch.slots, uint16_t(0));
  int32_t both[2][2][most + 1] = {};  // base and rank of this point and of the one before
  vfloat feature[most + 1] = {}, scaled[most], bases[most], weights[most + 1];
  vint ranks[most + 1];
  const int64_t place = features.sigma_xy > 0 ? 2 : 0;  // features
  int64_t x = 0, y = 0;
  int32_t rows = 0;
  for (int64_t p = 0; p < tile.points(); ++p) {
    const int lane = int(p % kLanes);
    if (lane == 0) {
      for (int i = 0; i < kLanes && p + i < tile.points(); ++i) {
        const float* values = features.values + ((tile.y + y) * lattice.width + tile.x + x) * features.pixel_stride;
        if (place) feature[0][i] = float(tile.x + x), feature[1][i] = float(tile.y + y);
        for (int64_t k = place; k < dims; ++k, values += features.feature_stride) feature[k][i] = *values;
        if (++x == tile.width) x = 0, ++y;
      }
      for (int64_t k = 0; k < dims; ++k) scaled[k] = feature[k] / (k < place ? features.sigma_xy : features.sigma);
      locate<kDims>(scaled, scales, int(dims), bases, ranks, weights);
    }
    int32_t *base = both[p & 1][0], *rank = both[p & 1][1];
    for (int64_t k = 0; k < dims; ++k) base[k] = int32_t(bases[k][lane]);
    for (int64_t k = 0; k < corners; ++k) {
      rank[k] = ranks[k][lane];
      lattice.weight[(tile.first + p) * corners + k] = weights[k][lane];
    }
    uint16_t* corner = lattice.corner + (tile.first + p) * corners;
    if (p > 0 && same_key(base, both[~p & 1][0], dims) && same_key(rank, both[~p & 1][1], corners)) {
      std::memcpy(corner, corner - corners, size_t(corners) * sizeof *corner);
      continue;
    }
    int32_t ranked[most + 1], key[most + 1];  // ranked: the axis of each rank
    std::fill(ranked, ranked + corners, int32_t(dims));  // of a point that is NaN ranks may be missing
    for (int32_t k = 0; k < corners; ++k) ranked[rank[k]] = k;
    uint64_t hash = 0;
    key[dims] = 0;
    for (int64_t k = 0; k < dims; ++k) key[k] = base[k], hash += uint64_t(int64_t(base[k])) * factors.of[k];
    for (int64_t r = 0; r < corners; ++r) {
      int64_t slot = home(hash, bits);
      while (table[slot] && (hashes[table[slot] - 1] != hash || !same_key(keys + (table[slot] - 1) * dims, key, dims)))
        slot = (slot + 1) & (scratch.slots - 1);
      if (!table[slot]) {
        for (int64_t k = 0; k < dims; ++k) keys[rows * dims + k] = key[k];
        hashes[rows] = hash;
        table[slot] = uint16_t(++rows);
      }
      corner[r] = uint16_t(table[slot] - 1);
      // To the next: up by 1 along all axes, and back by d + 1 along one.
      const int32_t axis = ranked[dims - r];
      for (int64_t k = 0; k < dims; ++k) key[k] += 1;
      key[axis] -= int32_t(corners);
      hash += factors.sum - uint64_t(corners) * factors.of[axis];
    }
  }
  return rows;
}

template <int kDims>
static void corners_of(const Features& features, TiledLattice* lattice, const TileScratch& scratch, int threads) {
  const int dims = kDims ? kDims : int(lattice->dims);
  const Tiles tiles(lattice->height, lattice->width, dims);
  const Factors factors(dims);
  float scales[kMostDims];
  for (int i = 0; i < dims; ++i)
    scales[i] = float(1.0 / std::sqrt(double((i + 1) * (i + 2))) * float(std::sqrt(2.0 / 3.0) * (dims + 1)));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t t = 0; t < tiles.count; ++t)
    lattice->first[t + 1] =
        number<kDims>(features, tiles[t], scales, factors, *lattice, scratch, scratch.table + thread_number() * scratch.slots);
  lattice->first[0] = 0, lattice->rows = 0, lattice->most = 0;
  for (int64_t t = 0; t < tiles.count; ++t) {
    lattice->most = std::max<int64_t>(lattice->most, lattice->first[t + 1]);
    lattice->first[t + 1] = int32_t(lattice->rows += lattice->first[t + 1]);
  }
}

// --- vertices ---

// The rows of all tiles, numbered as first met.
static void unite(TiledLattice* lattice, const TileScratch& of_tiles, const VertexScratch& scratch) {
  const Tiles tiles(lattice->height, lattice->width, lattice->dims);
  const int64_t dims = lattice->dims;
  int64_t vertices = 0;
  std::fill(scratch.table, scratch.table + (int64_t(1) << scratch.bits), uint64_t(0));
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t count = lattice->first[t + 1] - lattice->first[t];
    const int32_t* keys = of_tiles.keys + tiles[t].first * (dims + 1) * dims;
    const uint64_t* hashes = of_tiles.hashes + tiles[t].first * (dims + 1);
    int32_t* vertex = lattice->vertex + lattice->first[t];
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(scratch.table + home(hashes[std::min(i + kSoon, count - 1)], scratch.bits));
      const int64_t slot = slot_of(scratch, keys + i * dims, hashes[i], dims);
      if (scratch.table[slot]) {
        vertex[i] = int32_t(uint32_t(scratch.table[slot]) - 1);
        continue;
      }
      scratch.table[slot] = entry(hashes[i], vertices);
      scratch.hashes[vertices] = hashes[i];
      std::memcpy(scratch.keys + vertices * dims, keys + i * dims, size_t(dims) * sizeof *keys);
      vertex[i] = int32_t(vertices++);
      if (2 * vertices > int64_t(1) << scratch.bits) grow(scratch, vertices);
    }
  }
  lattice->vertices = vertices;
}

// The neighbour of a vertex along every axis.
template <int kDims>
static void neighbours(const TiledLattice& lattice, const VertexScratch& scratch, const Factors& factors) {
  const int64_t dims = kDims ? kDims : lattice.dims, corners = dims + 1, vertices = lattice.vertices;
  int32_t key[kMostDims + 1] = {};
#pragma omp for schedule(static)
  for (int64_t i = 0; i < vertices * corners; ++i) scratch.inner[i] = 0;
#pragma omp for schedule(static)
  for (int64_t v = 0; v < vertices; ++v)
    for (int64_t axis = 0; axis < corners; ++axis) {
      const uint64_t step = factors.sum - uint64_t(corners) * factors.of[axis];
      __builtin_prefetch(scratch.table + home(scratch.hashes[std::min(v + kSoon / 4, vertices - 1)] + step, scratch.bits));
      for (int64_t k = 0; k < dims; ++k) key[k] = scratch.keys[v * dims + k] + 1;
      key[axis] -= int32_t(corners);
      const int64_t slot = slot_of(scratch, key, scratch.hashes[v] + step, dims);
      const int32_t other = int32_t(uint32_t(scratch.table[slot])) - 1;
      scratch.next[axis * vertices + v] = other;
      if (other >= 0) scratch.inner[axis * vertices + other] = 1;
    }
}

static void chains(const TiledLattice& lattice, const VertexScratch& scratch, int64_t axis) {
  const int64_t vertices = lattice.vertices;
  const int32_t* next = scratch.next + axis * vertices;
  const uint8_t* inner = scratch.inner + axis * vertices;
  int32_t *chain = lattice.chain + axis * (vertices + 1), *at = chain;
  for (int64_t v = 0; v < vertices; ++v) {
    if (inner[v] || next[v] < 0) continue;
    *at++ = ~int32_t(v);
    for (int32_t i = next[v]; i >= 0; i = next[i]) *at++ = i;
  }
  *at = ~0;
  lattice.chained[axis] = int32_t(at - chain);
}

static void sort_rows(const TiledLattice& lattice) {
  int32_t* start = lattice.start;
  std::fill(start, start + lattice.vertices + 1, 0);
  for (int64_t i = 0; i < lattice.rows; ++i) ++start[lattice.vertex[i]];
  int32_t sum = 0;
  for (int64_t v = 0; v <= lattice.vertices; ++v) sum += start[v], start[v] = sum;
  // From the last to the first, so that each start ends where its list begins.
  for (int64_t i = lattice.rows - 1; i >= 0; --i) lattice.row[--start[lattice.vertex[i]]] = int32_t(i);
}

// --- calls ---

int64_t corners_bytes(const TiledLattice& lattice, int threads) {
  Arena arena(nullptr);
  TileScratch(lattice, threads, arena);
  return arena.used;
}
int64_t links_bytes(const TiledLattice& lattice) {
  Arena arena(nullptr);
  VertexScratch(lattice, arena);
  return arena.used;
}

static bool sound(const TiledLattice& lattice) {
  return lattice.height > 0 && lattice.width > 0 && lattice.dims > 0 && lattice.dims <= kMostDims &&
         lattice.height * lattice.width < (int64_t(1) << 31) / (lattice.dims + 1) - 1;
}

Status build_corners(const Features& features, TiledLattice* lattice, void* workspace, int threads) {
  if (!sound(*lattice) || (features.sigma_xy > 0 && lattice->dims < 2)) return Status::bad_argument;
  Arena arena(workspace);
  const TileScratch scratch(*lattice, threads, arena);
  switch (lattice->dims) {
    case 2: corners_of<2>(features, lattice, scratch, threads); break;
    case 5: corners_of<5>(features, lattice, scratch, threads); break;
    default: corners_of<0>(features, lattice, scratch, threads); break;
  }
  return Status::ok;
}

Status build_links(TiledLattice* lattice, void* first, void* workspace, int threads) {
  if (!sound(*lattice)) return Status::bad_argument;
  Arena of_first(first), arena(workspace);
  const TileScratch of_tiles(*lattice, threads, of_first);
  const VertexScratch scratch(*lattice, arena);
  const Factors factors(lattice->dims);
  unite(lattice, of_tiles, scratch);
#pragma omp parallel num_threads(threads)
  {
    switch (lattice->dims) {
      case 2: neighbours<2>(*lattice, scratch, factors); break;
      case 5: neighbours<5>(*lattice, scratch, factors); break;
      default: neighbours<0>(*lattice, scratch, factors); break;
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < lattice->dims + 2; ++task)
      task ? chains(*lattice, scratch, task - 1) : sort_rows(*lattice);
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t corners_bytes(const TiledLattice& lattice, int threads))
AFA_DECLARE_PER_ISA(Status build_corners(const Features& features, TiledLattice* lattice, void* workspace, int threads))
AFA_DECLARE_PER_ISA(int64_t links_bytes(const TiledLattice& lattice))
AFA_DECLARE_PER_ISA(Status build_links(TiledLattice* lattice, void* first, void* workspace, int threads))

int64_t lattice_tiles(int64_t height, int64_t width, int64_t dims) { return baseline::Tiles(height, width, dims).count; }
int64_t lattice_corners_cpu_workspace(const TiledLattice& lattice, int threads) { AFA_DISPATCH(corners_bytes, lattice, threads) }
Status lattice_corners_cpu(const Features& features, TiledLattice* lattice, void* workspace, int threads) {
  AFA_DISPATCH(build_corners, features, lattice, workspace, threads)
}
int64_t lattice_links_cpu_workspace(const TiledLattice& lattice) { AFA_DISPATCH(links_bytes, lattice) }
Status lattice_links_cpu(TiledLattice* lattice, void* first, void* workspace, int threads) {
  AFA_DISPATCH(build_links, lattice, first, workspace, threads)
}
#endif

}  // namespace afa
