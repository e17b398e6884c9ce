// Filtering by a permutohedral lattice that is built, and what a dense CRF makes of it in an iteration, on a GPU.
//
// Data flow: rows of channels, 4 of a row to a thread. lattice_splat_kernel sums each chunk of a vertex's list in order,
// lattice_join_kernel adds up the chunks of those vertices that have several, lattice_blur_kernel goes along an axis from one table of
// vertices to another, and lattice_gather_kernel lets every point take its share of all kernels' tables, adds what does not change,
// multiplies by the matrix of classes, and goes through the softmax, or backwards through it, while the point's row is in shared memory. No
// sum depends on which thread comes first. Where rows are too long for the tables' memory, a group of channels goes through all but the
// last of these at a time.
// Floor: an iteration moves, of rows, E = N * (d + 1) to splat and as many to gather, 3 of M vertices for each of d + 1 axes, and 2 to 3
// of N points. At 500 x 375 pixels, 21 classes (rows of 96 bytes) and M = 0.4 N, as photographs have: 216 + 130 MB in 5 dimensions,
// 108 + 21 MB in 2 (M = 0.13 N), 54 MB of points. The 18 MB of distinct rows stay in a 50 MB cache, whose some 5.5 TB/s make that 0.1 ms;
// from memory alone at 3.3 TB/s 0.16 ms: 1 to 1.6 ms for 10 iterations. Bound: the cache's bandwidth, and 14 launches an iteration.
// Occupancy: lattice_splat_kernel 256 x 4, lattice_join_kernel 128 x 8, lattice_blur_kernel 256 x 4, lattice_gather_kernel 256 x 3
// (threads x blocks a multiprocessor, by registers).
// Wide loads: lattice_splat_kernel, lattice_join_kernel, lattice_blur_kernel, lattice_gather_kernel.
#include <cmath>
#include <utility>

#include "bilateral/lattice.cuh"

namespace afa {

constexpr int kRowThreads = 256, kJoinThreads = 128;
constexpr int64_t kMostFused = 4;          // kernels
constexpr int64_t kMostFiltered = 128;     // channels at once
constexpr int64_t kMostRow = 4096;         // channels
constexpr int64_t kTableBytes = int64_t(2) << 30;

__device__ inline float4 zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
__device__ inline void add_to(float4& sum, const float4& value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}
__device__ inline void add_times(float4& sum, float factor, const float4& value) {
  sum.x = fmaf(factor, value.x, sum.x), sum.y = fmaf(factor, value.y, sum.y);
  sum.z = fmaf(factor, value.z, sum.z), sum.w = fmaf(factor, value.w, sum.w);
}

// ---- tables of vertices ----------------------------------------------------------------------------------------------------------

// Threads (quad, item) of a block: float4 `quad` of the rows of what it walks over.
struct SplatArgs {
  LatticeArrays lattice;
  const int2* list;
  const float4* in;  // [points][row]
  float4* table;     // [vertices][quads]
  float4* chunks;    // [further chunks][quads]
  int row, quads;
};

__global__ void __launch_bounds__(kRowThreads, 4) lattice_splat_kernel(const __grid_constant__ SplatArgs args) {
  const int vertices = args.lattice.count[kVertices], items = vertices + args.lattice.count[kChunks];
  const int quad = int(threadIdx.x), step = int(gridDim.x * blockDim.y);
  const float4* __restrict__ in = args.in;
  const int2* __restrict__ list = args.list;
  for (int item = int(blockIdx.x * blockDim.y + threadIdx.y); item < items; item += step) {
    const int further = item - vertices;
    const int vertex = further < 0 ? item : args.lattice.chunk[further].x;
    const int first = args.lattice.start[vertex], last = args.lattice.start[vertex + 1];
    const int begin = further < 0 ? first : args.lattice.chunk[further].y;
    const int end = min(begin + chunk_length(last - first), last);
    float4 sum = zero4();
#pragma unroll 4
    for (int at = begin; at < end; ++at) {
      const int2 pair = list[at];
      add_times(sum, __int_as_float(pair.y), in[int64_t(pair.x) * args.row + quad]);
    }
    float4* to = further < 0 ? args.table + int64_t(vertex) * args.quads : args.chunks + int64_t(further) * args.quads;
    to[quad] = sum;
  }
}

// A block for each vertex of several chunks.
__global__ void __launch_bounds__(kJoinThreads, 8) lattice_join_kernel(const __grid_constant__ SplatArgs args) {
  SharedArena arena;
  SharedArray<float4> sums = arena.take<float4>(kJoinThreads);
  const int many = args.lattice.count[kShared], groups = kJoinThreads / args.quads;
  const int group = int(threadIdx.x) / args.quads, quad = int(threadIdx.x) % args.quads;
  for (int item = int(blockIdx.x); item < many; item += int(gridDim.x)) {
    const int vertex = args.lattice.shared[item], entries = args.lattice.start[vertex + 1] - args.lattice.start[vertex];
    const int further = (entries - 1) / chunk_length(entries);
    const float4* __restrict__ chunks = args.chunks + int64_t(args.lattice.extra[vertex]) * args.quads + quad;
    float4 sum = zero4();
    if (group < groups) {
#pragma unroll 4
      for (int chunk = group; chunk < further; chunk += groups) add_to(sum, chunks[int64_t(chunk) * args.quads]);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group == 0) {
      float4* to = args.table + int64_t(vertex) * args.quads + quad;
      sum = *to;
      for (int other = 0; other < groups; ++other) add_to(sum, sums[other * args.quads + quad]);
      *to = sum;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kRowThreads, 4)
    lattice_blur_kernel(const int2* __restrict__ near, const int32_t* __restrict__ count, const float4* __restrict__ from,
                        float4* __restrict__ to, int quads) {
  const int vertices = count[kVertices], quad = int(threadIdx.x), step = int(gridDim.x * blockDim.y);
#pragma unroll 2
  for (int vertex = int(blockIdx.x * blockDim.y + threadIdx.y); vertex < vertices; vertex += step) {
    const int2 both = near[vertex];
    const int64_t at = int64_t(vertex) * quads + quad;
    float4 sum = from[at], beside = zero4();
    if (both.x >= 0) beside = from[int64_t(both.x) * quads + quad];
    if (both.y >= 0) add_to(beside, from[int64_t(both.y) * quads + quad]);
    add_times(sum, 0.5f, beside);
    to[at] = sum;
  }
}

// ---- points ----------------------------------------------------------------------------------------------------------------------

struct GatherKernel {
  const int2* corner;
  const float4* table;  // [vertices][quads]
  const float* after;
  float scale;
  int corners;
};
struct GatherArgs {
  GatherKernel kernels[kMostFused];
  const float4 *near, *base, *q, *matrix;
  float4 *out, *logits, *total;
  int64_t points;
  int count, channels, quads, row, lanes;  // row: from a point to the next; lanes: threads of a point, a power of 2
  Finish finish;
};

__device__ inline float part_of(const float4& value, int i) { return i == 0 ? value.x : i == 1 ? value.y : i == 2 ? value.z : value.w; }
// What the lanes of a point bring.
__device__ inline float lanes_sum(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
__device__ inline float lanes_max(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// near and what the kernels bring, of one quad of a point.
__device__ inline float4 gathered(const GatherArgs& args, int64_t point, int quad) {
  float4 sum = args.near ? args.near[point * args.row + quad] : zero4();
#pragma unroll 1
  for (int k = 0; k < args.count; ++k) {
    const GatherKernel& kernel = args.kernels[k];
    const int2* __restrict__ corner = kernel.corner + point * kernel.corners;
    const float4* __restrict__ table = kernel.table;
    float4 own = zero4();
#pragma unroll 3
    for (int r = 0; r < kernel.corners; ++r) {
      const int2 pair = corner[r];
      add_times(own, __int_as_float(pair.y), table[int64_t(pair.x) * args.quads + quad]);
    }
    add_times(sum, kernel.after ? kernel.scale * kernel.after[point] : kernel.scale, own);
  }
  return sum;
}

__global__ void __launch_bounds__(kRowThreads, 3) lattice_gather_kernel(const __grid_constant__ GatherArgs args) {
  SharedArena arena;
  const bool lined = args.matrix || args.finish != Finish::sum;
  const int rows = int(blockDim.x) / args.lanes, own = int(threadIdx.x) / args.lanes, lane = int(threadIdx.x) % args.lanes;
  const int quads = args.quads, lanes = args.lanes;
  SharedArray<float4> line = arena.take<float4>(lined ? rows * quads : 0) + own * (lined ? quads : 0);
  SharedArray<float4> mixed = arena.take<float4>(args.matrix ? rows * quads : 0) + own * (args.matrix ? quads : 0);
  for (int64_t first = int64_t(blockIdx.x) * rows; first < args.points; first += int64_t(gridDim.x) * rows) {
    const int64_t point = first + own, at = point * args.row;
    const int here = point < args.points ? quads : 0;  // quads to work on
#pragma unroll 1
    for (int quad = lane; quad < here; quad += lanes) {
      float4 sum = gathered(args, point, quad);
      if (args.matrix) {
        mixed[quad] = sum;
        continue;
      }
      if (args.base) add_to(sum, args.base[at + quad]);
      if (lined) line[quad] = sum;
      else args.out[at + quad] = sum;
    }
    if (!lined) continue;
    if (args.matrix) {
      __syncwarp();
#pragma unroll 1
      for (int quad = lane; quad < here; quad += lanes) {
        float4 sum = args.base ? args.base[at + quad] : zero4();
        const float4* __restrict__ matrix = args.matrix + quad;
#pragma unroll 1
        for (int from = 0; from < quads; ++from, matrix += 4 * quads) {
          const float4 value = mixed[from];
          add_times(sum, value.x, matrix[0]), add_times(sum, value.y, matrix[quads]);
          add_times(sum, value.z, matrix[2 * quads]), add_times(sum, value.w, matrix[3 * quads]);
        }
        line[quad] = sum;
      }
      __syncwarp();
    }
    if (args.finish == Finish::slope) {
      float dot = 0;
#pragma unroll 1
      for (int quad = lane; quad < here; quad += lanes) {
        const float4 q = args.q[at + quad], slope = line[quad];
        dot = fmaf(q.x, slope.x, fmaf(q.y, slope.y, fmaf(q.z, slope.z, fmaf(q.w, slope.w, dot))));
      }
      dot = lanes_sum(dot, lanes);
#pragma unroll 1
      for (int quad = lane; quad < here; quad += lanes) {
        const float4 q = args.q[at + quad], slope = line[quad];
        const float4 value = make_float4(q.x * (slope.x - dot), q.y * (slope.y - dot), q.z * (slope.z - dot), q.w * (slope.w - dot));
        float4 total = args.total[at + quad];
        add_times(total, -1.0f, value);
        args.total[at + quad] = total;
        if (args.out) args.out[at + quad] = value;
      }
      continue;
    }
    if (args.finish == Finish::sum) {
#pragma unroll 1
      for (int quad = lane; quad < here; quad += lanes) args.out[at + quad] = line[quad];
      continue;
    }
    float highest = -INFINITY, sum = 0;
#pragma unroll 1
    for (int quad = lane; quad < here; quad += lanes) {
      const float4 value = line[quad];
      if (args.logits) args.logits[at + quad] = value;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (4 * quad + i < args.channels) highest = fmaxf(highest, part_of(value, i));
    }
    highest = lanes_max(highest, lanes);
#pragma unroll 1
    for (int quad = lane; quad < here; quad += lanes) {
      float4 value = line[quad];
      value.x = __expf(__fsub_rn(value.x, highest));
      value.y = 4 * quad + 1 < args.channels ? __expf(__fsub_rn(value.y, highest)) : 0.0f;
      value.z = 4 * quad + 2 < args.channels ? __expf(__fsub_rn(value.z, highest)) : 0.0f;
      value.w = 4 * quad + 3 < args.channels ? __expf(__fsub_rn(value.w, highest)) : 0.0f;
      line[quad] = value;
      sum += value.x + value.y + (value.z + value.w);
    }
    const float inverse = 1.0f / lanes_sum(sum, lanes);
#pragma unroll 1
    for (int quad = lane; quad < here; quad += lanes) {
      const float4 value = line[quad];
      args.out[at + quad] = make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
    }
  }
}

// ---- launching -------------------------------------------------------------------------------------------------------------------

static int64_t entries_of(const CudaKernel& kernel) { return kernel.lattice.points * (kernel.lattice.dims + 1); }

// How many channels go through the tables at once, and where those are.
struct StepPlan {
  int64_t width;   // of a group of channels
  bool fused;      // one group, every kernel with a table of its own until all are gathered
  float4 *tables[kMostFused], *spare, *chunks;
  float* mixed;    // rows of what the groups gathered
  int64_t bytes;

  StepPlan(const CudaStep& step, void* workspace) {
    baseline::Arena arena(workspace);
    const int64_t row = round_up(step.channels, 4);
    int64_t most = 1, all = 0;
    for (int64_t k = 0; k < step.count; ++k) most = most < entries_of(step.kernels[k]) ? entries_of(step.kernels[k]) : most,
                                             all += entries_of(step.kernels[k]);
    width = kTableBytes / (4 * (most + all)) / 4 * 4;
    width = width < 4 ? 4 : width > kMostFiltered ? kMostFiltered : width;
    width = width < row ? width : row;
    fused = width == row && step.count <= kMostFused;
    for (int64_t k = 0; k < (fused ? step.count : 1); ++k)
      tables[k] = arena.take<float4>((fused ? entries_of(step.kernels[k]) : most) * width / 4);
    spare = arena.take<float4>(most * width / 4);
    chunks = arena.take<float4>(LatticeArrays::further(most) * width / 4);
    mixed = arena.take<float>(fused ? 0 : step.points * row);
    bytes = arena.used;
  }
};

// Of channels [first, first + 4 * quads): the vertices' values end in `table`.
static Status blur(const CudaStep& step, const CudaKernel& kernel, const StepPlan& plan, int64_t first, int quads, float4* table,
                   void* stream) {
  const LatticeArrays lattice = arrays_of(kernel.lattice);
  float4 *from = lattice.corners % 2 == 0 ? table : plan.spare, *to = from == table ? plan.spare : table;
  SplatArgs args = {lattice, kernel.list ? static_cast<const int2*>(kernel.list) : lattice.list,
                    reinterpret_cast<const float4*>(step.in + first), from, plan.chunks, int(round_up(step.channels, 4) / 4), quads};
  LaunchShape rows, joined;
  rows.block = dim3(unsigned(quads), unsigned(kRowThreads / quads));
  rows.grid = dim3(busy_blocks(blocks_for(lattice.entries, kRowThreads / quads)));
  AFA_TRY(launch(lattice_splat_kernel, rows, stream, args));
  joined.block = dim3(kJoinThreads), joined.shared_bytes = SharedArena::bytes<float4>(kJoinThreads);
  joined.grid = dim3(busy_blocks(LatticeArrays::further(lattice.entries)));
  if (lattice.points > kChunk) AFA_TRY(launch(lattice_join_kernel, joined, stream, args));
  for (int i = 0; i < lattice.corners; ++i) {
    const int axis = step.transpose ? lattice.corners - 1 - i : i;
    const int2* near = lattice.near + int64_t(axis) * lattice.entries;
    AFA_TRY(launch(lattice_blur_kernel, rows, stream, near, lattice.count, from, to, quads));
    std::swap(from, to);
  }
  return Status::ok;
}

static Status gather(GatherArgs args, void* stream) {
  args.lanes = 1;
  while (args.lanes < args.quads && args.lanes < 32) args.lanes *= 2;
  const int lines = (args.matrix || args.finish != Finish::sum) + (args.matrix != nullptr);
  int threads = kRowThreads;
  const auto bytes = [&] { return lines * SharedArena::bytes<float4>(threads / args.lanes * args.quads); };
  while (threads > 32 && bytes() > 32 * 1024) threads /= 2;
  LaunchShape shape;
  shape.block = dim3(unsigned(threads)), shape.shared_bytes = bytes();
  const int64_t blocks = blocks_for(args.points, threads / args.lanes);
  shape.grid = dim3(unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  return launch(lattice_gather_kernel, shape, stream, args);
}

static GatherKernel gathered_from(const CudaKernel& kernel, const float4* table) {
  const float alpha = 1.0f / (1.0f + std::ldexp(1.0f, -int(kernel.lattice.dims)));
  const LatticeArrays lattice = arrays_of(kernel.lattice);
  return {lattice.corner, table, kernel.after, kernel.scale * alpha, lattice.corners};
}

int64_t lattice_step_cuda_workspace(const CudaStep& step) { return StepPlan(step, nullptr).bytes; }

Status lattice_step_cuda(const CudaStep& step, void* workspace, int device, void* stream) {
  const int64_t row = round_up(step.channels, 4);
  if (step.points < 1 || step.channels < 1 || row > kMostRow) return Status::bad_argument;
  if ((step.count > 0 && !step.in) || (step.finish == Finish::slope ? !step.q || !step.total : !step.out)) return Status::bad_argument;
  for (int64_t k = 0; k < step.count; ++k) {
    AFA_TRY(check_lattice(step.kernels[k].lattice));
    if (step.kernels[k].lattice.points != step.points) return Status::bad_argument;
  }
  DeviceGuard guard(device);
  const StepPlan plan(step, workspace);
  GatherArgs last = {};
  last.near = reinterpret_cast<const float4*>(step.near), last.base = reinterpret_cast<const float4*>(step.base);
  last.q = reinterpret_cast<const float4*>(step.q), last.matrix = reinterpret_cast<const float4*>(step.matrix);
  last.out = reinterpret_cast<float4*>(step.out), last.logits = reinterpret_cast<float4*>(step.logits);
  last.total = reinterpret_cast<float4*>(step.total);
  last.points = step.points, last.channels = int(step.channels), last.quads = last.row = int(row / 4), last.finish = step.finish;
  for (int64_t k = 0; k < step.count; ++k) {
    const CudaKernel& kernel = step.kernels[k];
    if (plan.fused) {
      AFA_TRY(blur(step, kernel, plan, 0, int(row / 4), plan.tables[k], stream));
      last.kernels[last.count++] = gathered_from(kernel, plan.tables[k]);
      continue;
    }
    for (int64_t first = 0; first < row; first += plan.width) {
      const int quads = int((row - first < plan.width ? row - first : plan.width) / 4);
      AFA_TRY(blur(step, kernel, plan, first, quads, plan.tables[0], stream));
      GatherArgs group = {};
      group.kernels[0] = gathered_from(kernel, plan.tables[0]), group.count = 1;
      group.near = last.near ? last.near + first / 4 : nullptr, group.out = reinterpret_cast<float4*>(plan.mixed + first);
      group.points = step.points, group.channels = 4 * quads, group.quads = quads, group.row = int(row / 4);
      AFA_TRY(gather(group, stream));
    }
    last.near = reinterpret_cast<const float4*>(plan.mixed);
  }
  return gather(last, stream);
}

}  // namespace afa
