// The gradient of the edge map through the path affinity, on the CPU.
//
// Data flow, one image at a time: for every row and direction the index of the path's first maximum is kept, one byte or two a
// pixel, beside the sum of the gradients of the two taps that it counts in. After a barrier every pixel of a row adds up,
// in the order of directions and points, what the paths bring of which it is the maximum: those that have it as point k start k's
// offset away from it. Nothing is scattered, and no sum depends on the threads. Floor: the window's gradient read once. Bound: five
// operations for each point of a path and vector of pixels, in both passes.
#include <type_traits>

#include "path_affinity/paths.h"

namespace afa {
namespace AFA_ISA {

// The index of the first maximum along a path from kVectors vectors of pixels.
template <int kVectors, class Code>
static inline void first_maxima(const Direction& path, const int32_t* keys, Code* to) {
  vint best[kVectors], code[kVectors];
  for (int v = 0; v < kVectors; ++v) best[v] = load_keys(keys + path.ahead[0] + v * kLanes), code[v] = vint{};
  for (int k = 1; k < path.count; ++k) {
    const int32_t* from = keys + path.ahead[k];
    const vint index = vint{} + k;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const vint value = load_keys(from + v * kLanes), better = value > best[v];
      best[v] = better ? value : best[v], code[v] = better ? index : code[v];
    }
  }
  int32_t wide[kVectors * kLanes];
  __builtin_memcpy(wide, code, sizeof wide);
  for (int i = 0; i < kVectors * kLanes; ++i) to[i] = Code(wide[i]);
}

template <class Code>
struct PathBackward {
  Paths paths;
  float *slopes, *lines;  // [directions][H][line]; [threads][2][line]
  Code* codes;            // [directions][H][line]

  PathBackward(const PathArgs& args, int threads, Arena& arena) : paths(args, 1, arena) {
    const int64_t all = paths.count * paths.height * paths.line;
    slopes = arena.take<float>(all), codes = arena.take<Code>(all);
    lines = arena.take<float>(threads * 2 * paths.line);
  }
  int64_t place(int64_t direction, int64_t y) const { return (direction * paths.height + y) * paths.line; }

  // Beyond the image no path starts: what is read there counts nothing, in any image.
  void clear_margins(int64_t y) const {
    for (int64_t d = 0; d < paths.count; ++d) {
      float* slope = slopes + place(d, y);
      Code* code = codes + place(d, y);
      std::fill(slope, slope + paths.margin + paths.left(paths.directions[d].dx), 0.0f);
      std::fill(slope + paths.margin + paths.right(paths.directions[d].dx), slope + paths.line, 0.0f);
      std::fill(code, code + paths.margin, Code(0)), std::fill(code + paths.margin + paths.row, code + paths.line, Code(0));
    }
  }
  void find_row(int64_t b, int64_t y, float* own, float* other) const {
    const int32_t* keys = paths.keys_of(0, y);
    for (int64_t d = 0; d < paths.count; ++d) {
      const Direction& path = paths.directions[d];
      if (y + path.dy >= paths.height) continue;
      load_row(paths.args.window, b, paths.channel(path.dy, path.dx), y, own);
      load_row(paths.args.window, b, paths.channel(-path.dy, -path.dx), y + path.dy, other);
      float* slope = slopes + place(d, y) + paths.margin;
      for (int64_t x = paths.left(path.dx); x < paths.right(path.dx); ++x) slope[x] = own[x] + other[x + path.dx];
      Code* code = codes + place(d, y) + paths.margin;
      along(paths.row, [&](int64_t x, auto vectors) { first_maxima<vectors>(path, keys + x, code + x); });
    }
  }
  // Adds to row y what the paths of one direction bring. A plain loop: compilers widen the codes better than vectors of them.
  void gather(int64_t d, int64_t y, float* __restrict sums) const {
    const Direction& path = paths.directions[d];
    for (int k = 0; k < path.count; ++k) {
      const int64_t from = y - path.py[k];  // the row that the path starts from
      if (from < 0 || from + path.dy >= paths.height) continue;
      const Code* __restrict code = codes + place(d, from) + paths.margin - path.px[k];
      const float* __restrict slope = slopes + place(d, from) + paths.margin - path.px[k];
      const Code index = Code(k);
      for (int64_t x = 0; x < paths.row; ++x) {
        const float value = slope[x];
        sums[x] += code[x] == index ? value : 0.0f;
      }
    }
  }
  void gather_row(const View<4>& out, int64_t b, int64_t y, float* line) const {
    std::fill(line, line + paths.row, 0.0f);
    for (int64_t d = 0; d < paths.count; ++d) gather(d, y, line);
    for (int64_t x = 0; x < paths.width; ++x) line[x] = 0.0f - line[x];
    store_row(out, b, 0, y, line);
  }
};

template <class Code>
static void run_backward(const PathBackward<Code>& backward, const View<4>& out, int threads) {
  const Paths& paths = backward.paths;
  for (int64_t b = 0; b < out.size[0]; ++b)
#pragma omp parallel num_threads(threads)
  {
    float* own = backward.lines + thread_number() * 2 * paths.line;
    if (b == 0) {
#pragma omp for schedule(static)
      for (int64_t y = 0; y < paths.height; ++y) backward.clear_margins(y);
    }
#pragma omp for schedule(static)
    for (int64_t y = 0; y < paths.height; ++y) paths.load_keys_of(b, y, 0);
#pragma omp for schedule(static)
    for (int64_t y = 0; y < paths.height; ++y) backward.find_row(b, y, own, own + paths.line);
#pragma omp for schedule(static)
    for (int64_t y = 0; y < paths.height; ++y) backward.gather_row(out, b, y, own);
  }
}

// Whether an index into a path needs two bytes, and then whether they do.
static bool wide(const PathArgs& args, int64_t most) {
  Arena arena(nullptr);
  return Paths(args, 1, arena).longest > most;
}

int64_t path_gradient_bytes(const PathArgs& args, int threads) {
  Arena arena(nullptr);
  wide(args, 256) ? (void)PathBackward<uint16_t>(args, threads, arena) : (void)PathBackward<uint8_t>(args, threads, arena);
  return arena.used;
}

Status path_gradient(const PathArgs& args, const View<4>& out, void* workspace, int threads) {
  if (!fits(args, threads) || !same_size(args.edge, out)) return Status::bad_argument;
  if (wide(args, 65536)) return Status::unsupported;
  Arena arena(workspace);
  if (wide(args, 256))
    run_backward(PathBackward<uint16_t>(args, threads, arena), out, threads);
  else
    run_backward(PathBackward<uint8_t>(args, threads, arena), out, threads);
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t path_gradient_bytes(const PathArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status path_gradient(const PathArgs& args, const View<4>& out, void* workspace, int threads))

int64_t path_affinity_gradient_cpu_workspace(const PathArgs& args, int threads) { AFA_DISPATCH(path_gradient_bytes, args, threads) }
Status path_affinity_gradient_cpu(const PathArgs& args, const View<4>& grad_edge, void* workspace, int threads) {
  AFA_DISPATCH(path_gradient, args, grad_edge, workspace, threads)
}
#endif

}  // namespace afa
