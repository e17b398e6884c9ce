// The permutohedral lattice of a cloud of points, on a GPU.
//
// Data flow: lattice_locate_kernel finds each point's simplex as lattice_build.cpp does, rounding by rounding: which one it is must not
// depend on where it is computed, so no product is fused into a sum. lattice_insert_kernel looks up every entry's key, which follows from
// its point's multiples and ranks, in a table whose slots hold (hash, entry): a free one is claimed, and of all entries with one key the
// first stays. Which slot a key gets depends on who comes first; nothing that is read later does: those entries that stayed, counted
// (lattice_first_kernel, lattice_offsets_kernel), number the vertices (lattice_number_kernel), and lattice_index_kernel gives the number
// to the others. Entries are sorted by vertex, stably, so that points stay in order; lattice_list_kernel writes the lists,
// lattice_link_kernel looks for each vertex's neighbour along an axis, whose own neighbour the other way it is, and
// lattice_chunk_kernel cuts long lists.
// Floor: the features read, E = N * (d + 1) entries of 16 bytes written; with the sort's 60 bytes an entry, table and lookups about 200
// bytes an entry: 0.07 ms for 500 x 375 pixels in 5 dimensions on an H100. Bound: the table's misses, and 20 launches.
// Occupancy: lattice_features_kernel 256 x 4, lattice_locate_kernel 64 x 8, lattice_insert_kernel 256 x 4, lattice_first_kernel
// 256 x 4, lattice_offsets_kernel 256 x 4, lattice_number_kernel 256 x 4, lattice_index_kernel 256 x 4, lattice_list_kernel
// 256 x 4, lattice_link_kernel 256 x 4, lattice_chunk_kernel 256 x 4, lattice_weigh_kernel 256 x 4 (threads x blocks a multiprocessor,
// by registers).
#include <cmath>

#include "bilateral/lattice_locate.cuh"
#include "common/radix_sort.h"
#include "common/scan.cuh"

namespace afa {

constexpr int kBuildThreads = 256;
constexpr int kNumbered = 8;  // entries of a thread in a row
constexpr int kNumberTile = kBuildThreads * kNumbered;
typedef unsigned long long Slot;  // hash above, entry + 1 below; 0 is free

struct LatticeBuild {
  int32_t* base;   // [points][dims] the multiples of d + 1, of the first d coordinates
  uint8_t* rank;   // [points][d + 1]
  Slot* table;     // [mask + 1]
  int32_t* slot;   // [entries]; later the vertices
  int32_t* number; // [entries] of those that are a vertex's first
  int32_t* first;  // [vertices] their first entries
  int32_t* tiles;  // vertices that begin in a tile of entries, then in all before
  uint32_t* sorted;  // [entries] vertices, and
  int32_t* order;    // the entries they are of
  void* sort;
  int64_t slots;
  int per_image;
  uint32_t mask;

  LatticeBuild(int64_t points, int64_t dims, int64_t images, baseline::Arena& arena) : per_image(int(points / images)) {
    const int64_t most = points * (dims + 1);
    for (slots = 1 << 10; slots < 2 * most; slots *= 2) {
    }
    mask = uint32_t(slots - 1);
    base = arena.take<int32_t>(points * dims);
    rank = arena.take<uint8_t>(most);
    table = arena.take<Slot>(slots);
    slot = arena.take<int32_t>(most);
    number = arena.take<int32_t>(most);
    first = arena.take<int32_t>(most);
    tiles = arena.take<int32_t>(blocks_for(most, kNumberTile));
    sorted = arena.take<uint32_t>(most);
    order = arena.take<int32_t>(most);
    sort = arena.take<char>(radix_sort_cuda_workspace(most));
  }
};

// ---- points ----------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_features_kernel(const __grid_constant__ View<4> images, float sigma_rgb, float sigma_xy, float* features) {
  const int width = int(images.size[3]), dims = sigma_rgb > 0 ? 5 : 2;
  const int64_t rows = images.size[0] * images.size[2];
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t b = row / images.size[2], y = row % images.size[2];
    for (int x = int(blockIdx.x * blockDim.x + threadIdx.x); x < width; x += int(gridDim.x * blockDim.x)) {
      float* to = features + (row * width + x) * dims;
      to[0] = float(x) / sigma_xy, to[1] = float(y) / sigma_xy;
      for (int c = 0; c < dims - 2; ++c)
        to[2 + c] = load_element(images.data, images.dtype, offset_of(images, b, c, y) + x * images.stride[3]) / sigma_rgb;
    }
  }
}

// ---- vertices --------------------------------------------------------------------------------------------------------------------

// The keys of entries: integer coordinates, and the image.
template <int kDims>
struct Keys {
  const int32_t* __restrict__ base;
  const uint8_t* __restrict__ rank;
  int dims, corners, per_image;

  __device__ Keys(const LatticeBuild& build, int dims_given)
      : base(build.base), rank(build.rank), dims(kDims ? kDims : dims_given), corners(dims + 1), per_image(build.per_image) {}
  __device__ int at(int entry, int k) const {
    const int point = entry / corners, r = entry % corners;
    return base[point * dims + k] + r - (rank[point * corners + k] > dims - r ? corners : 0);
  }
  __device__ int image(int entry) const { return entry / corners / per_image; }
  // Of the vertex a step along an axis from an entry's; axis < 0 is the entry's own.
  __device__ int moved(int entry, int k, int axis) const {
    return at(entry, k) + (axis < 0 ? 0 : k == axis ? 1 - corners : 1);
  }
  __device__ uint32_t hash(int entry, int axis) const {
    Slot hash = Slot(image(entry));
#pragma unroll
    for (int k = 0; k < dims; ++k) hash = (hash + uint32_t(moved(entry, k, axis))) * 0x9E3779B97F4A7C15ull, hash ^= hash >> 29;
    return uint32_t(hash ^ hash >> 32);
  }
  __device__ bool same(int entry, int axis, int other) const {
    int differs = image(entry) ^ image(other);
#pragma unroll
    for (int k = 0; k < dims; ++k) differs |= moved(entry, k, axis) ^ at(other, k);
    return differs == 0;
  }
};

__device__ inline int entry_of(Slot slot) { return int(uint32_t(slot)) - 1; }

template <int kDims>
__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_insert_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build) {
  const Keys<kDims> keys(build, lattice.corners - 1);
  const int entry = int(blockIdx.x) * kBuildThreads + int(threadIdx.x);
  if (entry >= lattice.entries) return;
  const uint32_t hash = keys.hash(entry, -1);
  const Slot own = Slot(hash) << 32 | uint32_t(entry + 1);
  uint32_t at = hash & build.mask;
  for (;; at = (at + 1) & build.mask) {
    Slot seen = __ldcg(&build.table[at]);
    if (seen == 0) seen = atomicCAS(&build.table[at], Slot(0), own);
    if (seen == 0) break;
    if (uint32_t(seen >> 32) != hash || !keys.same(entry, -1, entry_of(seen))) continue;
    if (own < seen) atomicMin(&build.table[at], own);
    break;
  }
  build.slot[entry] = int32_t(at);
}

// Whether an entry is the first of its vertex.
__device__ inline bool is_first(const LatticeArrays& lattice, const LatticeBuild& build, int entry) {
  return entry < lattice.entries && entry_of(build.table[uint32_t(build.slot[entry])]) == entry;
}
__device__ inline int count_first(const LatticeArrays& lattice, const LatticeBuild& build, int begin) {
  int found = 0;
  for (int i = 0; i < kNumbered; ++i) found += is_first(lattice, build, begin + i);
  return found;
}

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_first_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build) {
  SharedArena arena;
  SharedArray<int> scratch = arena.take<int>(kBuildThreads / 32 + 1);
  int total;
  block_exclusive_sum(count_first(lattice, build, int(blockIdx.x) * kNumberTile + int(threadIdx.x) * kNumbered), scratch, &total);
  if (threadIdx.x == 0) build.tiles[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_offsets_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build, int tiles) {
  SharedArena arena;
  SharedArray<int> scratch = arena.take<int>(kBuildThreads / 32 + 1);
  int before = 0;
  for (int first = 0; first < tiles; first += kBuildThreads) {
    const int tile = first + int(threadIdx.x);
    int total;
    const int sum = block_exclusive_sum(tile < tiles ? build.tiles[tile] : 0, scratch, &total);
    if (tile < tiles) build.tiles[tile] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) lattice.count[kVertices] = before, lattice.count[kChunks] = 0, lattice.count[kShared] = 0;
}

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_number_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build) {
  SharedArena arena;
  SharedArray<int> scratch = arena.take<int>(kBuildThreads / 32 + 1);
  const int begin = int(blockIdx.x) * kNumberTile + int(threadIdx.x) * kNumbered;
  int total;
  int vertex = build.tiles[blockIdx.x] + block_exclusive_sum(count_first(lattice, build, begin), scratch, &total);
  for (int entry = begin; entry < begin + kNumbered; ++entry)
    if (is_first(lattice, build, entry)) build.first[vertex] = entry, build.number[entry] = vertex++;
}

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_index_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build) {
  const int entry = int(blockIdx.x) * kBuildThreads + int(threadIdx.x);
  if (entry >= lattice.entries) return;
  const int vertex = build.number[entry_of(build.table[uint32_t(build.slot[entry])])];
  lattice.corner[entry].x = build.slot[entry] = vertex;
}

// ---- lists and neighbours --------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_list_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build) {
  const int at = int(blockIdx.x) * kBuildThreads + int(threadIdx.x);
  if (at >= lattice.entries) return;
  const int vertex = int(build.sorted[at]), entry = build.order[at];
  int2 pair;
  pair.x = entry / lattice.corners, pair.y = lattice.corner[entry].y;
  lattice.list[at] = pair;
  if (at == lattice.entries - 1) lattice.start[vertex + 1] = lattice.entries;
  if (at > 0 && int(build.sorted[at - 1]) == vertex) return;
  lattice.start[vertex] = at;
  for (int axis = 0; axis < lattice.corners; ++axis) lattice.near[int64_t(axis) * lattice.entries + vertex] = make_int2(-1, -1);
}

template <int kDims>
__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_link_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build) {
  const Keys<kDims> keys(build, lattice.corners - 1);
  const int axis = int(blockIdx.y), vertices = lattice.count[kVertices];
  int2* near = lattice.near + int64_t(axis) * lattice.entries;
  for (int vertex = int(blockIdx.x) * kBuildThreads + int(threadIdx.x); vertex < vertices; vertex += int(gridDim.x) * kBuildThreads) {
    const int entry = build.first[vertex];
    const uint32_t hash = keys.hash(entry, axis);
    for (uint32_t at = hash & build.mask; const Slot seen = build.table[at]; at = (at + 1) & build.mask) {
      if (uint32_t(seen >> 32) != hash || !keys.same(entry, axis, entry_of(seen))) continue;
      const int other = build.number[entry_of(seen)];
      near[vertex].x = other, near[other].y = vertex;
      break;
    }
    if (axis != 0) continue;
    const int entries = lattice.start[vertex + 1] - lattice.start[vertex], further = (entries - 1) / chunk_length(entries);
    if (further == 0) continue;
    // Where in memory they are depends on who comes first, not what is summed.
    lattice.extra[vertex] = atomicAdd(&lattice.count[kChunks], further);
    lattice.shared[atomicAdd(&lattice.count[kShared], 1)] = vertex;
  }
}

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_chunk_kernel(const __grid_constant__ LatticeArrays lattice, const __grid_constant__ LatticeBuild build) {
  const int at = int(blockIdx.x) * kBuildThreads + int(threadIdx.x);
  if (at >= lattice.entries) return;
  const int vertex = int(build.sorted[at]), begin = lattice.start[vertex];
  const int length = chunk_length(lattice.start[vertex + 1] - begin), before = at - begin;
  if (before > 0 && before % length == 0) lattice.chunk[lattice.extra[vertex] + before / length - 1] = make_int2(vertex, at);
}

__global__ void __launch_bounds__(kBuildThreads, 4)
    lattice_weigh_kernel(const __grid_constant__ LatticeArrays lattice, const float* __restrict__ factor, int2* list) {
  const int at = int(blockIdx.x) * kBuildThreads + int(threadIdx.x);
  if (at >= lattice.entries) return;
  int2 pair = lattice.list[at];
  pair.y = __float_as_int(__int_as_float(pair.y) * factor[pair.x]);
  list[at] = pair;
}

// ---- launching -------------------------------------------------------------------------------------------------------------------

static LaunchShape entry_shape(int64_t entries) {
  LaunchShape shape;
  shape.block = dim3(kBuildThreads), shape.grid = dim3(unsigned(blocks_for(entries, kBuildThreads)));
  return shape;
}

int64_t lattice_cuda_bytes(int64_t points, int64_t dims) {
  baseline::Arena arena(nullptr);
  LatticeArrays({points, dims, nullptr}, arena);
  return arena.used;
}

int64_t lattice_build_cuda_workspace(int64_t points, int64_t dims) {
  baseline::Arena arena(nullptr);
  LatticeBuild(points, dims, 1, arena);
  return arena.used;
}

Status lattice_features_cuda(const View<4>& images, float sigma_rgb, float sigma_xy, float* features, int device, void* stream) {
  if (is_empty(images) || images.size[1] != 3 || images.size[3] >= (1 << 30)) return Status::bad_argument;
  DeviceGuard guard(device);
  LaunchShape shape;
  shape.block = dim3(kBuildThreads);
  shape.grid = dim3(unsigned(blocks_for(images.size[3], kBuildThreads)), grid_limit(images.size[0] * images.size[2]));
  return launch(lattice_features_kernel, shape, stream, images, sigma_rgb, sigma_xy, features);
}

template <int kDims>
static Status number_vertices(const LatticeArrays& lattice, const LatticeBuild& build, const LatticeScales& scales, const float* features,
                              void* stream) {
  LaunchShape shape;
  shape.block = dim3(kLocateThreads), shape.grid = dim3(unsigned(blocks_for(lattice.points, kLocateThreads)));
  if (kDims == 0)
    shape.shared_bytes = 2 * SharedArena::bytes<float>(lattice.corners * kLocateThreads) +
                         SharedArena::bytes<int>(lattice.corners * kLocateThreads);
  AFA_TRY(launch(lattice_locate_kernel<kDims>, shape, stream, lattice, build.base, build.rank, scales, features));
  AFA_TRY(cuda_failed(cudaMemsetAsync(build.table, 0, size_t(build.slots) * sizeof(Slot), static_cast<cudaStream_t>(stream))));
  const LaunchShape entries = entry_shape(lattice.entries);
  AFA_TRY(launch(lattice_insert_kernel<kDims>, entries, stream, lattice, build));
  LaunchShape tiles, one;
  tiles.block = one.block = dim3(kBuildThreads);
  tiles.grid = dim3(unsigned(blocks_for(lattice.entries, kNumberTile))), one.grid = dim3(1);
  tiles.shared_bytes = one.shared_bytes = SharedArena::bytes<int>(kBuildThreads / 32 + 1);
  AFA_TRY(launch(lattice_first_kernel, tiles, stream, lattice, build));
  AFA_TRY(launch(lattice_offsets_kernel, one, stream, lattice, build, int(tiles.grid.x)));
  AFA_TRY(launch(lattice_number_kernel, tiles, stream, lattice, build));
  return launch(lattice_index_kernel, entries, stream, lattice, build);
}

template <int kDims>
static Status link_vertices(const LatticeArrays& lattice, const LatticeBuild& build, void* stream) {
  SortPairs pairs;
  pairs.keys = reinterpret_cast<const uint32_t*>(build.slot), pairs.sorted_keys = build.sorted, pairs.sorted_payload = build.order;
  pairs.count = lattice.entries, pairs.bits = 0;
  while (int64_t(1) << pairs.bits < lattice.entries) ++pairs.bits;  // the largest number is less than that
  AFA_TRY(radix_sort_cuda(pairs, build.sort, stream));
  LaunchShape shape = entry_shape(lattice.entries);
  AFA_TRY(launch(lattice_list_kernel, shape, stream, lattice, build));
  shape.grid = dim3(busy_blocks(shape.grid.x), unsigned(lattice.corners));
  AFA_TRY(launch(lattice_link_kernel<kDims>, shape, stream, lattice, build));
  return launch(lattice_chunk_kernel, entry_shape(lattice.entries), stream, lattice, build);
}

template <int kDims>
static Status build_lattice(const LatticeArrays& lattice, const LatticeBuild& build, const LatticeScales& scales, const float* features,
                            void* stream) {
  AFA_TRY(number_vertices<kDims>(lattice, build, scales, features, stream));
  return link_vertices<kDims>(lattice, build, stream);
}

Status lattice_build_cuda(const CudaLattice& lattice, const float* features, int64_t images, void* workspace, int device, void* stream) {
  AFA_TRY(check_lattice(lattice));
  if (images < 1 || lattice.points % images != 0) return Status::bad_argument;
  DeviceGuard guard(device);
  baseline::Arena arena(workspace);
  const LatticeArrays arrays = arrays_of(lattice);
  const LatticeBuild build(lattice.points, lattice.dims, images, arena);
  LatticeScales scales = {};
  const int dims = int(lattice.dims);
  for (int i = 0; i < dims; ++i)
    scales.at[i] = float(1.0 / std::sqrt(double((i + 1) * (i + 2))) * float(std::sqrt(2.0 / 3.0) * (dims + 1)));
  switch (dims) {
    case 2: return build_lattice<2>(arrays, build, scales, features, stream);
    case 5: return build_lattice<5>(arrays, build, scales, features, stream);
    default: return build_lattice<0>(arrays, build, scales, features, stream);
  }
}

Status lattice_weigh_cuda(const CudaLattice& lattice, const float* factor, void* list, int device, void* stream) {
  AFA_TRY(check_lattice(lattice));
  DeviceGuard guard(device);
  const LatticeArrays arrays = arrays_of(lattice);
  return launch(lattice_weigh_kernel, entry_shape(arrays.entries), stream, arrays, factor, static_cast<int2*>(list));
}

}  // namespace afa
