// The random walk on the CPU: the weights T; the walk itself is diffusion.cpp's.
//
// Data flow, one image at a time: each thread takes a row of pixels, adds up the columns of A^p that end there (over dy in
// registers for each dx, then the 2r+1 sums side by side), and keeps 1 / D; then it writes its rows of T for the diffusion, reading
// A once more. Floor: A read twice. Bound: those reads, then the diffusion's multiply-adds.
#include "random_walk.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace afa {
namespace AFA_ISA {

struct Walk {
  WalkArgs args;
  int64_t height, width, row, reach_y, reach_x, side;  // reach: of the taps that can stay inside the image
  int64_t margin, line_length;
  int32_t* inside;   // [2 * reach_x + 1][row]: all ones where the tap's neighbour has a column in the image
  float* inverse;    // [H][row]: 1 / D
  float* lines;      // [threads][2 * reach_x + 1][margin + row + margin], sums of columns
  const float* end;  // of the affinity's memory, if it is float32 with unit stride; else null
  int threads;

  Walk(const WalkArgs& walk, int thread_count)
      : args(walk), height(walk.affinity.size[2]), width(walk.affinity.size[3]), row(round_up(width, 32)),
        reach_y(std::min(walk.radius, height - 1)), reach_x(std::min(walk.radius, width - 1)), side(2 * walk.radius + 1),
        margin(round_up(reach_x, 16)), line_length(row + 2 * margin), threads(thread_count) {
    const View<4>& view = walk.affinity;
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) last += std::max<int64_t>(view.stride[i], 0) * (view.size[i] - 1);
    const bool direct = view.dtype == DType::f32 && view.stride[3] == 1;
    end = direct ? static_cast<const float*>(view.data) + last + 1 : nullptr;
  }
  int64_t taps() const { return (2 * reach_y + 1) * (2 * reach_x + 1); }
  int64_t floats() const {
    return round_up((2 * reach_x + 1) * row, 16) + height * row + threads * (2 * reach_x + 1) * line_length;
  }
  float* place(float* memory) {
    inside = reinterpret_cast<int32_t*>(memory);
    inverse = memory + round_up((2 * reach_x + 1) * row, 16);
    lines = inverse + height * row;
    std::fill(lines, memory + floats(), 0.0f);
    for (int64_t dx = -reach_x; dx <= reach_x; ++dx)
      for (int64_t x = 0; x < row; ++x) inside[(reach_x + dx) * row + x] = x < width && x + dx >= 0 && x + dx < width ? -1 : 0;
    return memory + floats();
  }
  float* own_lines() const {
#ifdef _OPENMP
    return lines + omp_get_thread_num() * (2 * reach_x + 1) * line_length;
#else
    return lines;
#endif
  }
  int64_t plane(int64_t dy, int64_t dx) const { return (args.radius + dy) * side + args.radius + dx; }

  // Row y of a tap as float, readable up to `row`: in place where that stays within the tensor, else a copy.
  const float* tap_row(int64_t b, int64_t dy, int64_t dx, int64_t y, float* copy) const {
    if (end) {
      const View<4>& view = args.affinity;
      const float* at = static_cast<const float*>(view.data) + b * view.stride[0] + plane(dy, dx) * view.stride[1] + y * view.stride[2];
      if (at + row <= end) return at;
    }
    load_row(args.affinity, b, plane(dy, dx), y, copy);
    return copy;
  }
};

// A^p at kLanes pixels, 0 where the tap leaves the image.
template <int kPower>
static inline vfloat powered(const float* from, const int32_t* inside, float power) {
  vint mask;
  __builtin_memcpy(&mask, inside, sizeof mask);
  vfloat value = (vfloat)((vint)load(from) & mask);
  if (kPower == 2) value *= value;
  if (kPower == 0)
    for (int i = 0; i < kLanes; ++i) value[i] = mask[i] ? std::pow(value[i], power) : 0.0f;
  return value;
}

// sum_dy A^p over the taps (dy, dx) that end in row y, for one dx, at the columns they start from.
template <int kPower>
static void add_rows(const Walk& walk, int64_t b, int64_t y, int64_t dx, float* sums) {
  const int64_t low = std::max(-walk.reach_y, y - walk.height + 1), high = std::min(walk.reach_y, y);  // source rows y - dy
  const int32_t* inside = walk.inside + (walk.reach_x + dx) * walk.row;
  const float power = walk.args.power;
  float* spare = walk.inverse + y * walk.row;  // not yet in use
  const float* first = walk.tap_row(b, low, dx, y - low, spare);
  if (first != spare && walk.tap_row(b, high, dx, y - high, spare) != spare) {
    const int64_t step = walk.side * walk.args.affinity.stride[1] - walk.args.affinity.stride[2];
    for (int64_t x = 0; x < walk.row; x += kLanes) {
      vfloat sum = {};
      for (int64_t i = 0; i <= high - low; ++i) sum += powered<kPower>(first + i * step + x, inside + x, power);
      store(sums + x, sum);
    }
    return;
  }
  std::fill(sums, sums + walk.row, 0.0f);
  for (int64_t dy = low; dy <= high; ++dy) {
    const float* from = walk.tap_row(b, dy, dx, y - dy, spare);
    for (int64_t x = 0; x < walk.row; x += kLanes) store(sums + x, load(sums + x) + powered<kPower>(from + x, inside + x, power));
  }
}

// 1 / D for row y.
template <int kPower>
static void column_sums(const void* context, int64_t b, int64_t y) {
  const Walk& walk = *static_cast<const Walk*>(context);
  float* lines = walk.own_lines();  // margins stay 0
  for (int64_t dx = -walk.reach_x; dx <= walk.reach_x; ++dx)
    add_rows<kPower>(walk, b, y, dx, lines + (walk.reach_x + dx) * walk.line_length + walk.margin);
  float* inverse = walk.inverse + y * walk.row;
  for (int64_t x = 0; x < walk.row; x += kLanes) {
    vfloat sum = {};
    for (int64_t dx = -walk.reach_x; dx <= walk.reach_x; ++dx)
      sum += load(lines + (walk.reach_x + dx) * walk.line_length + walk.margin + x - dx);
    store(inverse + x, 1.0f / (sum + walk.args.eps));
  }
}

// T of row y, [taps][row].
template <int kPower>
static void weights_of_row(const void* context, int64_t b, int64_t y, int64_t row, float* weights) {
  const Walk& walk = *static_cast<const Walk*>(context);
  const float* inverse = walk.inverse + y * walk.row;
  float* to = weights;
  for (int64_t dy = -walk.reach_y; dy <= walk.reach_y; ++dy)
    for (int64_t dx = -walk.reach_x; dx <= walk.reach_x; ++dx, to += row) {
      if (y + dy < 0 || y + dy >= walk.height) {
        std::fill(to, to + row, 0.0f);
        continue;
      }
      const int32_t* inside = walk.inside + (walk.reach_x + dx) * walk.row;
      const float* from = walk.tap_row(b, dy, dx, y, to);
      for (int64_t x = 0; x < row; x += kLanes)
        store(to + x, powered<kPower>(from + x, inside + x, walk.args.power) * load(inverse + x));
    }
}

static WeightSource weight_source(const Walk& walk) {
  if (walk.args.power == 2) return WeightSource{column_sums<2>, weights_of_row<2>, &walk};
  if (walk.args.power == 1) return WeightSource{column_sums<1>, weights_of_row<1>, &walk};
  return WeightSource{column_sums<0>, weights_of_row<0>, &walk};
}

static bool fits(const WalkArgs& args, const View<4>& masks, int threads) {
  for (int i : {0, 2, 3})
    if (args.affinity.size[i] != masks.size[i] || masks.size[i] < 1) return false;
  return args.radius >= 0 && args.affinity.size[1] == (2 * args.radius + 1) * (2 * args.radius + 1) && threads > 0;
}

int64_t walk_bytes(const WalkArgs& args, int threads) { return round_up(Walk(args, threads).floats() * 4, 64); }

Status walk_over(const WalkArgs& args, const DiffusionArgs& diffusion, void* workspace, int threads) {
  if (!fits(args, diffusion.masks, threads)) return Status::bad_argument;
  Walk walk(args, threads);
  walk.place(static_cast<float*>(workspace));
  return diffuse_with(diffusion, weight_source(walk), static_cast<char*>(workspace) + walk_bytes(args, threads), threads);
}

// --- gradient of the affinity ---

// With P = A^p, T_ij = P_ij / D_i and D_i = sum_k P_ki + eps:
//   dL/dT_ij = sum_c g_c,i m_c,j,   dL/dD_i = -sum_j T_ij dL/dT_ij / D_i,   dL/dA_ij = p A_ij^(p-1) (dL/dT_ij / D_i + dL/dD_j)
struct WalkGradient {
  const Walk& walk;
  View<4> states, grads;
  int64_t channels, state_row;
  float *weights, *slopes, *state, *grad, *sums;  // [H][taps][row] twice, [H][C][state_row], [H][C][row], [H][line_length]

  WalkGradient(const Walk& w, const View<4>& s, const View<4>& g)
      : walk(w), states(s), grads(g), channels(s.size[1]), state_row(w.row + 2 * w.margin) {}
  int64_t floats() const {
    return walk.height * (2 * walk.taps() * walk.row + channels * (state_row + walk.row) + walk.line_length);
  }
  void place(float* memory) {
    weights = memory;
    slopes = weights + walk.height * walk.taps() * walk.row;
    state = slopes + walk.height * walk.taps() * walk.row;
    grad = state + walk.height * channels * state_row;
    sums = grad + walk.height * channels * walk.row;
    std::fill(state, memory + floats(), 0.0f);
  }
  void load_rows(int64_t b, int64_t y) const {
    for (int64_t c = 0; c < channels; ++c) {
      load_row(states, b, c, y, state + (y * channels + c) * state_row + walk.margin);
      load_row(grads, b, c, y, grad + (y * channels + c) * walk.row);
    }
  }
  // dL/dT and dL/dD of row y.
  void slopes_of_row(int64_t y) const {
    float *to = slopes + y * walk.taps() * walk.row, *sum = sums + y * walk.line_length + walk.margin;
    const float* weight = weights + y * walk.taps() * walk.row;
    for (int64_t dy = -walk.reach_y; dy <= walk.reach_y; ++dy)
      for (int64_t dx = -walk.reach_x; dx <= walk.reach_x; ++dx, to += walk.row, weight += walk.row) {
        if (y + dy < 0 || y + dy >= walk.height) continue;
        for (int64_t x = 0; x < walk.row; x += kLanes) {
          vfloat slope = {};
          for (int64_t c = 0; c < channels; ++c)
            slope += load(grad + (y * channels + c) * walk.row + x) *
                     load(state + ((y + dy) * channels + c) * state_row + walk.margin + x + dx);
          store(to + x, slope);
          store(sum + x, load(sum + x) - load(weight + x) * slope * load(walk.inverse + y * walk.row + x));
        }
      }
  }
  // dL/dA of row y: every plane of the window, those of taps that leave the image as zeros.
  void write_row(const View<4>& out, int64_t b, int64_t y, float* line) const {
    const float p = walk.args.power;
    for (int64_t tap = 0; tap < walk.side * walk.side; ++tap) {
      const int64_t dy = tap / walk.side - walk.args.radius, dx = tap % walk.side - walk.args.radius;
      std::fill(line, line + walk.width, 0.0f);
      if (y + dy >= 0 && y + dy < walk.height && std::abs(dx) <= walk.reach_x) {
        const float* slope = slopes + (y * walk.taps() + (dy + walk.reach_y) * (2 * walk.reach_x + 1) + dx + walk.reach_x) * walk.row;
        load_row(walk.args.affinity, b, tap, y, line);
        for (int64_t x = 0; x < walk.width; ++x) {
          const float base = p == 2 ? 2 * line[x] : p == 1 ? 1.0f : p * std::pow(line[x], p - 1);
          const bool counts = x + dx >= 0 && x + dx < walk.width;
          line[x] = counts ? base * (slope[x] * walk.inverse[y * walk.row + x] +
                                     sums[(y + dy) * walk.line_length + walk.margin + x + dx])
                           : 0.0f;
        }
      }
      store_row(out, b, tap, y, line);
    }
  }
};

int64_t walk_gradient_bytes(const WalkArgs& args, const View<4>& states, int threads) {
  const Walk walk(args, threads);
  return walk_bytes(args, threads) + 4 * (WalkGradient(walk, states, states).floats() + threads * walk.width);
}

Status walk_gradient(const WalkArgs& args, const View<4>& states, const View<4>& grads, const View<4>& out, void* workspace,
                     int threads) {
  if (!fits(args, states, threads) || states.size[1] != grads.size[1]) return Status::bad_argument;
  Walk walk(args, threads);
  float* rest = walk.place(static_cast<float*>(workspace));
  WalkGradient gradient(walk, states, grads);
  float* lines = rest + gradient.floats();
  const WeightSource source = weight_source(walk);
  for (int64_t b = 0; b < states.size[0]; ++b) {
    gradient.place(rest);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t y = 0; y < walk.height; ++y) source.prepare(&walk, b, y), gradient.load_rows(b, y);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < walk.height; ++y) {
        source.fill(&walk, b, y, walk.row, gradient.weights + y * walk.taps() * walk.row);
        gradient.slopes_of_row(y);
      }
#ifdef _OPENMP
      float* line = lines + omp_get_thread_num() * walk.width;
#else
      float* line = lines;
#endif
#pragma omp for schedule(static)
      for (int64_t y = 0; y < walk.height; ++y) gradient.write_row(out, b, y, line);
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA
}  // namespace afa

#if AFA_ISA_IS_BASELINE
#include <vector>

namespace afa {

AFA_DECLARE_PER_ISA(int64_t walk_bytes(const WalkArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status walk_over(const WalkArgs& args, const DiffusionArgs& diffusion, void* workspace, int threads))
AFA_DECLARE_PER_ISA(int64_t walk_gradient_bytes(const WalkArgs& args, const View<4>& states, int threads))
AFA_DECLARE_PER_ISA(Status walk_gradient(const WalkArgs& args, const View<4>& states, const View<4>& grads, const View<4>& out,
                                         void* workspace, int threads))

// (dy, dx) of the taps that can stay inside the image, row-major.
static std::vector<int32_t> window_offsets(const WalkArgs& args) {
  const int64_t reach_y = std::min(args.radius, args.affinity.size[2] - 1);
  const int64_t reach_x = std::min(args.radius, args.affinity.size[3] - 1);
  std::vector<int32_t> offsets;
  for (int64_t dy = -reach_y; dy <= reach_y; ++dy)
    for (int64_t dx = -reach_x; dx <= reach_x; ++dx) offsets.push_back(int32_t(dy)), offsets.push_back(int32_t(dx));
  return offsets;
}

static DiffusionArgs with_window(DiffusionArgs diffusion, const std::vector<int32_t>& offsets) {
  diffusion.offsets = offsets.data(), diffusion.taps = int64_t(offsets.size()) / 2, diffusion.border = Border::zero;
  return diffusion;
}

static int64_t own_bytes(const WalkArgs& args, int threads) { AFA_DISPATCH(walk_bytes, args, threads) }

int64_t random_walk_cpu_workspace(const WalkArgs& args, const DiffusionArgs& diffusion, int threads) {
  const auto offsets = window_offsets(args);
  return own_bytes(args, threads) + diffuse_cpu_workspace(with_window(diffusion, offsets), threads);
}

static Status dispatch(const WalkArgs& args, const DiffusionArgs& diffusion, void* workspace, int threads) {
  AFA_DISPATCH(walk_over, args, diffusion, workspace, threads)
}

Status random_walk_cpu(const WalkArgs& args, const DiffusionArgs& diffusion, void* workspace, int threads) {
  const auto offsets = window_offsets(args);
  return dispatch(args, with_window(diffusion, offsets), workspace, threads);
}

int64_t random_walk_affinity_gradient_cpu_workspace(const WalkArgs& args, const View<4>& states, int threads) {
  AFA_DISPATCH(walk_gradient_bytes, args, states, threads)
}

Status random_walk_affinity_gradient_cpu(const WalkArgs& args, const View<4>& states, const View<4>& grads,
                                         const View<4>& grad_affinity, void* workspace, int threads) {
  AFA_DISPATCH(walk_gradient, args, states, grads, grad_affinity, workspace, threads)
}

}  // namespace afa
#endif
