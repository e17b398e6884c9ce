// The path affinity on the CPU, forward.
//
// Data flow: the edge map becomes keys, whole numbers in the order of its values, in rows with margins. Then for every row and
// direction the maxima of the path's points, each a row of keys moved by an offset, stay in registers while the points pass, and go out
// as a row of the tap's plane and, moved, of the opposite tap's in the row that the path leads to: every row of every plane is
// written once, by one thread. Floor: the window written once. Bound: that, and a load and a maximum for each point of a path and
// vector of pixels: less than the stores at radius 5, as much at radius 10.
#include <type_traits>

#include "path_affinity/paths.h"

namespace afa {
namespace AFA_ISA {

// 1 - the maxima along a path from kVectors vectors of pixels.
template <int kVectors>
static inline void affinities(const Direction& path, const int32_t* keys, float* to) {
  vint best[kVectors];
  for (int v = 0; v < kVectors; ++v) best[v] = load_keys(keys + path.ahead[0] + v * kLanes);
  for (int k = 1; k < path.count; ++k) {
    const int32_t* from = keys + path.ahead[k];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const vint value = load_keys(from + v * kLanes);
      best[v] = value > best[v] ? value : best[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, 1.0f - (vfloat)(best[v] ^ ((best[v] >> 31) & 0x7fffffff)));
}

struct PathForward {
  Paths paths;
  float *lines, *none, *one;  // [threads][line]: a row of affinities; rows of 0 and 1

  PathForward(const PathArgs& args, int threads, Arena& arena) : paths(args, args.edge.size[0], arena) {
    lines = arena.take<float>(threads * paths.line);
    none = arena.take<float>(paths.row), one = arena.take<float>(paths.row);
    if (!arena.base) return;
    std::fill(lines, lines + threads * paths.line, 0.0f);
    std::fill(none, none + paths.row, 0.0f), std::fill(one, one + paths.row, 1.0f);
  }

  void write(int64_t b, int64_t dy, int64_t dx, int64_t y, const float* line) const {
    store_row(paths.args.window, b, paths.channel(dy, dx), y, line);
  }
  // Row y of all planes (dy, dx) of the half plane, and row y + dy of the opposite ones.
  void write_row(int64_t b, int64_t y, float* line) const {
    const Direction* direction = paths.directions;
    write(b, 0, 0, y, one);
    for (int64_t dy = 0; dy <= paths.reach_y; ++dy)
      for (int64_t dx = dy ? -paths.reach_x : 1; dx <= paths.reach_x; ++dx) {
        const bool has_path = paths.in_disc(dy, dx), inside = y + dy < paths.height;
        if (has_path && inside) {
          const int32_t* keys = paths.keys_of(b, y);
          along(paths.row, [&](int64_t x, auto vectors) { affinities<vectors>(*direction, keys + x, line + x); });
          std::fill(line, line + paths.left(dx), 0.0f);
          std::fill(line + paths.right(dx), line + paths.row, 0.0f);
          write(b, -dy, -dx, y + dy, line - dx);  // the margins hold 0
        }
        write(b, dy, dx, y, has_path && inside ? line : none);
        if (!has_path || y < dy) write(b, -dy, -dx, y, none);
        direction += has_path;
      }
  }
};

int64_t path_bytes(const PathArgs& args, int threads) {
  Arena arena(nullptr);
  PathForward(args, threads, arena);
  return arena.used;
}

Status path_forward(const PathArgs& args, void* workspace, int threads) {
  if (!fits(args, threads)) return Status::bad_argument;
  Arena arena(workspace);
  const PathForward forward(args, threads, arena);
  const Paths& paths = forward.paths;
  const int64_t rows = args.edge.size[0] * paths.height;
#pragma omp parallel num_threads(threads)
  {
    float* line = forward.lines + thread_number() * paths.line + paths.margin;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) paths.load_keys_of(i / paths.height, i % paths.height, i / paths.height);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) forward.write_row(i / paths.height, i % paths.height, line);
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t path_bytes(const PathArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status path_forward(const PathArgs& args, void* workspace, int threads))

int64_t path_affinity_cpu_workspace(const PathArgs& args, int threads) { AFA_DISPATCH(path_bytes, args, threads) }
Status path_affinity_cpu(const PathArgs& args, void* workspace, int threads) { AFA_DISPATCH(path_forward, args, workspace, threads) }
#endif

}  // namespace afa
