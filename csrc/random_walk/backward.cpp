// The gradient of the affinity through the random walk, on the CPU.
//
// With P = A^p, T_ij = P_ij / D_i and D_i = sum_k P_ki + eps:
//   dL/dT_ij = sum_c g_c,i m_c,j,   dL/dD_i = -sum_j T_ij dL/dT_ij / D_i,   dL/dA_ij = p A_ij^(p-1) (dL/dT_ij / D_i + dL/dD_j)
// Data flow, one image at a time: P is copied, rows of pixels form their slopes and their part of D's, and after a barrier every row
// writes its gradient, reading its neighbours' dL/dD. In an `odd` image some 1 / D is no number to multiply by: there the division by D
// is left to the end, where p A^(p-1) is divided first. Floor: N * (2r+1)^2 * C fused multiply-adds. Bound: unaligned loads.
#include "random_walk/window.h"

namespace afa {
namespace AFA_ISA {

struct WalkGradient {
  const Window& window;  // a copy, so that P is at hand
  View<4> states, grads;
  int64_t channels, state_row;
  float *slopes, *state, *grad, *sums;  // [taps][H][row], [H][C][state_row], [H][C][row], [H][line_length]
  float* lines;                         // [threads][row]

  WalkGradient(const Window& w, const View<4>& s, const View<4>& g, int threads, Arena& arena)
      : window(w), states(s), grads(g), channels(s.size[1]), state_row(w.row + 2 * w.margin) {
    slopes = arena.take<float>(w.taps * w.height * w.row);
    state = arena.take<float>(w.height * channels * state_row);
    grad = arena.take<float>(w.height * channels * w.row);
    sums = arena.take<float>(w.height * w.line_length);
    lines = arena.take<float>(threads * w.row);
  }
  void clear() const {
    std::fill(state, state + window.height * channels * state_row, 0.0f);
    std::fill(grad, grad + window.height * channels * window.row, 0.0f);
    std::fill(sums, sums + window.height * window.line_length, 0.0f);
  }
  float* slope_at(int64_t dy, int64_t dx, int64_t y) const { return slopes + (window.at(dy, dx, y) - window.copy); }
  void load_rows(int64_t b, int64_t y) const {
    for (int64_t c = 0; c < channels; ++c) {
      load_row(states, b, c, y, state + (y * channels + c) * state_row + window.margin);
      load_row(grads, b, c, y, grad + (y * channels + c) * window.row);
    }
  }
  // dL/dT / D and dL/dD of row y; both times D if odd.
  void slopes_of_row(int64_t y, bool odd) const {
    float* sum = sums + y * window.line_length + window.margin;
    for (int64_t dy = std::max(-window.reach_y, -y); dy <= std::min(window.reach_y, window.height - 1 - y); ++dy)
      for (int64_t dx = -window.reach_x; dx <= window.reach_x; ++dx)
        for (int64_t x = 0; x < window.row; x += kLanes) {
          vfloat slope = {};
          for (int64_t c = 0; c < channels; ++c)
            slope += load(grad + (y * channels + c) * window.row + x) *
                     load(state + ((y + dy) * channels + c) * state_row + window.margin + x + dx);
          const vfloat powered = load(window.at(dy, dx, y) + x);
          if (odd) {
            store(slope_at(dy, dx, y) + x, slope);
            store(sum + x, load(sum + x) - powered / load(window.total + y * window.row + x) * slope);
          } else {
            const vfloat inverse = load(window.inverse + y * window.row + x);
            store(slope_at(dy, dx, y) + x, slope * inverse);
            store(sum + x, load(sum + x) - powered * slope * inverse * inverse);
          }
        }
  }
  // dL/dA of row y: every plane of the window, those of taps that leave the image as zeros.
  void write_row(const View<4>& out, int64_t b, int64_t y, bool odd, float* line) const {
    const float p = window.args.power;
    const int64_t radius = window.args.radius;
    for (int64_t dy = -radius; dy <= radius; ++dy)
      for (int64_t dx = -radius; dx <= radius; ++dx) {
        const int64_t tap = window.channel(dy, dx);
        const bool leaves = y + dy < 0 || y + dy >= window.height || std::abs(dx) > window.reach_x;
        load_row(window.args.affinity, b, tap, y, line);
        const auto slope = [p](float value) { return p == 2 ? 2 * value : p == 1 ? 1.0f : p * std::pow(value, p - 1); };
        const auto reaches = [&](int64_t x) { return !leaves && x + dx >= 0 && x + dx < window.width; };
        const float *of_weight = slope_at(dy, dx, y), *of_sum = sums + (y + dy) * window.line_length + window.margin + dx;
        const float *own = window.total + y * window.row, *other = window.total + (y + dy) * window.row + dx;
        for (int64_t x = 0; x < window.width && !odd; ++x) line[x] = reaches(x) ? slope(line[x]) * (of_weight[x] + of_sum[x]) : 0.0f;
        for (int64_t x = 0; x < window.width && odd; ++x)
          line[x] = reaches(x) ? slope(line[x]) / own[x] * of_weight[x] + slope(line[x]) / other[x] * of_sum[x] : 0.0f;
        store_row(out, b, tap, y, line);
      }
  }
};

int64_t walk_gradient_bytes(const WalkArgs& args, const View<4>& states, int threads) {
  Arena arena(nullptr);
  const Window window(args, threads, false, arena);
  WalkGradient(window, states, states, threads, arena);
  return arena.used;
}

Status walk_gradient(const WalkArgs& args, const View<4>& states, const View<4>& grads, const View<4>& out, void* workspace,
                     int threads) {
  if (!fits(args, states, threads) || states.size[1] != grads.size[1]) return Status::bad_argument;
  Arena arena(workspace);
  Window window(args, threads, false, arena);
  const WalkGradient gradient(window, states, grads, threads, arena);
  for (int64_t b = 0; b < states.size[0]; ++b) {
    window.select(b);
    gradient.clear();
#pragma omp parallel num_threads(threads)
    {
      float* line = gradient.lines + thread_number() * window.row;
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) window.copy_row(b, y), gradient.load_rows(b, y);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) window.sum_row(y);
      const bool odd = window.any_odd();
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) gradient.slopes_of_row(y, odd);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) gradient.write_row(out, b, y, odd, line);
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t walk_gradient_bytes(const WalkArgs& args, const View<4>& states, int threads))
AFA_DECLARE_PER_ISA(Status walk_gradient(const WalkArgs& args, const View<4>& states, const View<4>& grads, const View<4>& out,
                                         void* workspace, int threads))

int64_t random_walk_affinity_gradient_cpu_workspace(const WalkArgs& args, const View<4>& states, int threads) {
  AFA_DISPATCH(walk_gradient_bytes, args, states, threads)
}
Status random_walk_affinity_gradient_cpu(const WalkArgs& args, const View<4>& states, const View<4>& grads,
                                         const View<4>& grad_affinity, void* workspace, int threads) {
  AFA_DISPATCH(walk_gradient, args, states, grads, grad_affinity, workspace, threads)
}
#endif

}  // namespace afa
