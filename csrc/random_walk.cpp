// The random walk on the CPU.
//
// Data flow, one image at a time: rows of pixels add up the columns of A^p that end there and keep 1 / D; the cams go to rows of
// pixels with their channels side by side. A step then takes 16 pixels of a row at a time: their windows' A^p go to a table,
// zeros where a tap leaves the image, and up to 8 pixels at once sum their neighbours, one broadcast weight each, scaled by 1 / D at
// the end. Unlike in diffusion.cpp, whose vectors run along pixel rows, loads are aligned whatever the tap: measured twice as fast
// at 289 taps and 21 channels. Sums run over taps in order: the same bits for any number of threads.
// Floor: A read twice, N * (2r+1)^2 * C fused multiply-adds per step. Bound: the loads, 3 for 2 multiply-adds.
#include "random_walk.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace afa {
namespace AFA_ISA {

static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The window of one image, in place or copied, and 1 / D.
struct Window {
  WalkArgs args;
  int64_t height, width, row, reach_y, reach_x;  // reach: of the taps that can stay inside the image
  int64_t taps, margin, line_length;
  bool in_place;        // else `copy` holds A^p, and the power left to apply is 1
  int power;
  const float *centre, *begin, *end;        // the plane of (0, 0); the bounds of the affinity's memory
  int64_t plane_y, plane_x, line;           // strides over dy, dx and y
  int32_t* inside;                          // [2 * reach_x + 1][row]: all ones where the tap's column is in the image
  float *inverse, *lines, *copy;            // [H][row]; [threads][2 * reach_x + 1][line_length]; [taps][H][row] + slack
  int64_t floats;

  Window(const WalkArgs& walk, int threads, bool may_read_in_place, float* memory) : args(walk) {
    const View<4>& view = args.affinity;
    height = view.size[2], width = view.size[3], row = round_up(width, 16);
    reach_y = std::min(args.radius, height - 1), reach_x = std::min(args.radius, width - 1);
    taps = (2 * reach_y + 1) * (2 * reach_x + 1);
    margin = round_up(reach_x, 16), line_length = row + 2 * margin;
    power = args.power == 2 ? 2 : 1;
    in_place = may_read_in_place && view.dtype == DType::f32 && view.stride[3] == 1 && (args.power == 2 || args.power == 1);
    int64_t used = 0;
    auto take = [&](int64_t count) {
      float* here = memory ? memory + used : nullptr;
      used += round_up(count, 16);
      return here;
    };
    inside = reinterpret_cast<int32_t*>(take((2 * reach_x + 1) * row));
    inverse = take(height * row);
    lines = take(threads * (2 * reach_x + 1) * line_length);
    copy = take(in_place ? 0 : taps * height * row);
    floats = used;
    if (!in_place) power = 1;
    if (!memory) return;
    std::fill(lines, lines + threads * (2 * reach_x + 1) * line_length, 0.0f);
    for (int64_t dx = -reach_x; dx <= reach_x; ++dx)
      for (int64_t x = 0; x < row; ++x) inside[(reach_x + dx) * row + x] = x < width && x + dx >= 0 && x + dx < width ? -1 : 0;
  }

  int64_t channel(int64_t dy, int64_t dx) const { return (args.radius + dy) * (2 * args.radius + 1) + args.radius + dx; }
  const float* at(int64_t dy, int64_t dx, int64_t y) const { return centre + dy * plane_y + dx * plane_x + y * line; }

  void select(int64_t b) {
    const View<4>& view = args.affinity;
    if (in_place) {
      const float* image = static_cast<const float*>(view.data) + b * view.stride[0];
      centre = image + channel(0, 0) * view.stride[1];
      plane_x = view.stride[1], plane_y = (2 * args.radius + 1) * plane_x, line = view.stride[2];
      begin = end = centre;
      for (int64_t dy : {-reach_y, reach_y})  // strides may be negative or zero
        for (int64_t dx : {-reach_x, reach_x})
          for (int64_t y : {int64_t(0), height - 1})
            begin = std::min(begin, at(dy, dx, y)), end = std::max(end, at(dy, dx, y) + width);
    } else {
      plane_x = height * row, plane_y = (2 * reach_x + 1) * plane_x, line = row;
      centre = copy + reach_y * plane_y + reach_x * plane_x;
      begin = copy, end = copy + taps * height * row;
    }
  }

  // Row y of every plane of the copy: A^p, 0 where the tap leaves the image.
  void copy_row(int64_t b, int64_t y) const {
    for (int64_t dy = -reach_y; dy <= reach_y; ++dy)
      for (int64_t dx = -reach_x; dx <= reach_x; ++dx) {
        float* to = const_cast<float*>(at(dy, dx, y));
        const bool leaves = y + dy < 0 || y + dy >= height;
        const int32_t* mask = inside + (reach_x + dx) * row;
        if (!leaves) load_row(args.affinity, b, channel(dy, dx), y, to);
        for (int64_t x = 0; x < row; ++x) {
          if (leaves || !mask[x])
            to[x] = 0;
          else if (args.power != 1)
            to[x] = args.power == 2 ? to[x] * to[x] : std::pow(to[x], args.power);
        }
      }
  }

  // Whether `count` floats from each of `taps` addresses, `step` apart, lie within the tensor.
  bool readable(const float* from, int64_t step, int64_t taps, int64_t count) const {
    const float* last = from + (taps - 1) * step;
    return std::min(from, last) >= begin && std::max(from, last) + count <= end;
  }
  // A^p at kLanes pixels, 0 where `keep` is.
  template <int kPower>
  static vfloat powered(const float* from, const int32_t* keep, bool readable) {
    vint mask;
    __builtin_memcpy(&mask, keep, sizeof mask);
    vfloat value = {};
    if (__builtin_expect(readable, 1)) {
      value = (vfloat)((vint)load(from) & mask);
    } else {
      for (int i = 0; i < kLanes; ++i)
        if (mask[i]) value[i] = from[i];
    }
    return kPower == 2 ? value * value : value;
  }

  // sum_dy A^p over the taps (dy, dx) that end in row y, for one dx, at the columns they start from.
  template <int kPower>
  void add_rows(int64_t y, int64_t dx, float* sums) const {
    const int64_t low = std::max(-reach_y, y - height + 1), high = std::min(reach_y, y);  // source rows y - dy
    const int32_t* mask = inside + (reach_x + dx) * row;
    const float* from = at(low, dx, y - low);
    const bool whole = readable(from, plane_y - line, high - low + 1, row);
    for (int64_t x = 0; x < row; x += kLanes) {
      vfloat sum = {};
      for (int64_t i = 0; i <= high - low; ++i) sum += powered<kPower>(from + i * (plane_y - line) + x, mask + x, whole);
      store(sums + x, sum);
    }
  }

  void invert_row(int64_t y) const {
    float* own = lines + thread_number() * (2 * reach_x + 1) * line_length + margin;  // margins stay 0
    for (int64_t dx = -reach_x; dx <= reach_x; ++dx) {
      float* sums = own + (reach_x + dx) * line_length;
      power == 2 ? add_rows<2>(y, dx, sums) : add_rows<1>(y, dx, sums);
    }
    for (int64_t x = 0; x < row; x += kLanes) {
      vfloat sum = {};
      for (int64_t dx = -reach_x; dx <= reach_x; ++dx) sum += load(own + (reach_x + dx) * line_length + x - dx);
      store(inverse + y * row + x, 1.0f / (sum + args.eps));
    }
  }
};

// --- a step ---

constexpr int kMostPixels = 8;     // that sum at once
constexpr int64_t kBlock = 16;     // pixels whose weights are looked up at once
constexpr int64_t kMargin = kMostPixels - 1;  // pixels of zeros beside each row, where a tile's pixels reach beyond it

// The present channels of one image, in blocks of 2 vectors or, if one holds the last of them, 1: [H][margin + W + margin][lanes].
struct Lanes {
  int64_t height, row, vectors;
  Lanes(int64_t h, int64_t w, int64_t channels) : height(h), row(w + 2 * kMargin), vectors((channels + kLanes - 1) / kLanes) {}
  int64_t floats() const { return height * row * vectors * kLanes; }
  int64_t width(int64_t vector) const { return std::min<int64_t>(vectors - vector / 2 * 2, 2) * kLanes; }  // of its block
  float* at(float* values, int64_t y, int64_t x, int64_t channel) const {
    const int64_t vector = channel / kLanes, block = vector / 2 * 2 * kLanes;
    return values + block * height * row + (y * row + kMargin + x) * width(vector) + channel - block;
  }
};

// The weights of row y, not yet divided by D: [row / kBlock][taps][kBlock], taps whose row leaves the image left out.
template <int kPower>
static void look_up(const Window& window, bool transpose, int64_t y, float* weights) {
  const int64_t side = 2 * window.reach_x + 1, step = transpose ? 1 - window.plane_x : window.plane_x;
  for (int64_t dy = std::max(-window.reach_y, -y); dy <= std::min(window.reach_y, window.height - 1 - y); ++dy) {
    // The adjoint reads, at the neighbour, the tap that points back.
    const float* from = transpose ? window.at(-dy, window.reach_x, y + dy) - window.reach_x : window.at(dy, -window.reach_x, y);
    const int32_t* mask = window.inside;
    const bool whole = window.readable(from, step, side, window.row);
    for (int64_t i = 0; i < side; ++i, from += step, mask += window.row, weights += kBlock)
      for (int64_t x = 0; x < window.row; x += kLanes)
        store(weights + x / kBlock * kBlock * window.taps + x % kBlock, window.powered<kPower>(from + x, mask + x, whole));
  }
}

// sum over taps of weight * neighbour, for pixels (y, x..x+kPixels-1) and one block of channels.
template <int kPixels, int kVectors>
static void sum_window(const Window& window, const float* weights, const float* cams, int64_t row, int64_t y, int64_t x, float* sums) {
  constexpr int lanes = kVectors * kLanes;
  vfloat sum[kPixels][kVectors] = {};
  const int64_t low = std::max(-window.reach_x, -(x + kPixels - 1)), high = std::min(window.reach_x, window.width - 1 - x);
  for (int64_t dy = std::max(-window.reach_y, -y); dy <= std::min(window.reach_y, window.height - 1 - y); ++dy) {
    const float* weight = weights + (low + window.reach_x) * kBlock;
    const float* from = cams + (dy * row + low) * lanes;
    for (int64_t dx = low; dx <= high; ++dx, weight += kBlock, from += lanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[i][v] += weight[i] * load(from + i * lanes + v * kLanes);
    }
    weights += (2 * window.reach_x + 1) * kBlock;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sums + i * lanes + v * kLanes, sum[i][v]);
}

typedef void (*SumWindow)(const Window&, const float*, const float*, int64_t, int64_t, int64_t, float*);
template <int kVectors>
static SumWindow sum_for(int64_t pixels) {
  static const SumWindow table[] = {sum_window<1, kVectors>, sum_window<2, kVectors>, sum_window<3, kVectors>,
                                    sum_window<4, kVectors>, sum_window<5, kVectors>, sum_window<6, kVectors>,
                                    sum_window<7, kVectors>, sum_window<8, kVectors>};
  return table[pixels - 1];
}

static void step_row(const Window& window, bool transpose, const Lanes& lanes, float* cams, int64_t y, float* weights, float* out) {
  window.power == 2 ? look_up<2>(window, transpose, y, weights) : look_up<1>(window, transpose, y, weights);
  for (int64_t block = 0; block < window.width; block += kBlock, weights += window.taps * kBlock) {
    const int64_t count = std::min(kBlock, window.width - block), half = count > kMostPixels ? (count + 1) / 2 : count;
    for (int64_t v = 0; v < lanes.vectors; v += 2)
      for (int64_t x = block; x < block + count; x += half) {
        const int64_t pixels = std::min(half, block + count - x);
        const SumWindow sum = lanes.width(v) > kLanes ? sum_for<2>(pixels) : sum_for<1>(pixels);
        sum(window, weights + x - block, lanes.at(cams, y, x, v * kLanes), lanes.row, y, x, lanes.at(out, y, x, v * kLanes));
      }
  }
}

static void scale_row(const Window& window, const Lanes& lanes, int64_t y, float* values) {
  for (int64_t v = 0; v < lanes.vectors; ++v)
    for (int64_t x = 0; x < window.width; ++x) {
      float* at = lanes.at(values, y, x, v * kLanes);
      store(at, load(at) * window.inverse[y * window.row + x]);
    }
}

// The margins of a row are 0 and stay so.
static void clear_margins(const Lanes& lanes, int64_t y, float* values) {
  for (int64_t v = 0; v < lanes.vectors; ++v)
    for (int64_t x = 0; x < kMargin; ++x)
      for (int64_t at : {x - kMargin, lanes.row - 2 * kMargin + x}) store(lanes.at(values, y, at, v * kLanes), vfloat{});
}

// Channels of one row to lanes of its pixels and back, through `line`.
static void gather_lanes(const View<4>& cams, int64_t b, const int32_t* channels, int64_t count, const Lanes& lanes, int64_t y,
                         float* line, float* to) {
  const int64_t width = cams.size[3];
  for (int64_t c = 0; c < lanes.vectors * kLanes; ++c) {
    float* at = lanes.at(to, y, 0, c);
    const int64_t step = lanes.width(c / kLanes);
    if (c < count) load_row(cams, b, channels[c], y, line);
    for (int64_t x = 0; x < width; ++x) at[x * step] = c < count ? line[x] : 0.0f;
  }
}
static void scatter_lanes(const View<4>& out, int64_t b, const int32_t* channels, int64_t count, const Lanes& lanes, int64_t y,
                          float* line, float* from) {
  const int64_t width = out.size[3];
  for (int64_t c = 0; c < count; ++c) {
    const float* at = lanes.at(from, y, 0, c);
    const int64_t step = lanes.width(c / kLanes);
    for (int64_t x = 0; x < width; ++x) line[x] = at[x * step];
    store_row(out, b, channels[c], y, line);
  }
}

static bool fits(const WalkArgs& args, const View<4>& masks, int threads) {
  for (int i : {0, 2, 3})
    if (args.affinity.size[i] != masks.size[i] || masks.size[i] < 1) return false;
  return args.radius >= 0 && args.affinity.size[1] == (2 * args.radius + 1) * (2 * args.radius + 1) && threads > 0;
}

int64_t walk_bytes(const WalkArgs& args, const WalkMasks& masks, int threads) {
  const Window window(args, threads, true, nullptr);
  const Lanes lanes(window.height, window.width, masks.cams.size[1]);
  return 4 * (window.floats + 2 * round_up(lanes.floats(), 16) + round_up(masks.cams.size[1], 16) +
              threads * window.row * (1 + window.taps));
}

Status walk(const WalkArgs& args, const WalkMasks& masks, void* workspace, int threads) {
  if (!fits(args, masks.cams, threads) || masks.num_steps < 0) return Status::bad_argument;
  Window window(args, threads, true, static_cast<float*>(workspace));
  const int64_t channels = masks.cams.size[1];
  float* from = static_cast<float*>(workspace) + window.floats;
  float* to = from + round_up(Lanes(window.height, window.width, channels).floats(), 16);
  int32_t* present = reinterpret_cast<int32_t*>(to + (to - from));
  float* lines = reinterpret_cast<float*>(present) + round_up(channels, 16);
  for (int64_t b = 0; b < masks.cams.size[0]; ++b) {
    int64_t count = 0;
    std::fill(lines, lines + window.width, 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      if (!masks.class_mask || masks.class_mask[b * channels + c])
        present[count++] = int32_t(c);
      else
        for (int64_t y = 0; y < window.height; ++y) store_row(masks.out, b, c, y, lines);
    }
    if (count == 0) continue;
    const Lanes lanes(window.height, window.width, count);
    window.select(b);
#pragma omp parallel num_threads(threads)
    {
      float *source = from, *target = to, *line = lines + thread_number() * window.row * (1 + window.taps);
      if (!window.in_place) {
#pragma omp for schedule(static)
        for (int64_t y = 0; y < window.height; ++y) window.copy_row(b, y);
      }
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) {
        window.invert_row(y);
        gather_lanes(masks.cams, b, present, count, lanes, y, line, source);
        clear_margins(lanes, y, from), clear_margins(lanes, y, to);
        if (masks.transpose && masks.num_steps > 0) scale_row(window, lanes, y, source);
      }
      for (int64_t step = 0; step < masks.num_steps; ++step) {
#pragma omp for schedule(static)
        for (int64_t y = 0; y < window.height; ++y) {
          step_row(window, masks.transpose, lanes, source, y, line + window.row, target);
          if (!masks.transpose || step + 1 < masks.num_steps) scale_row(window, lanes, y, target);
        }
        std::swap(source, target);
      }
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) scatter_lanes(masks.out, b, present, count, lanes, y, line, source);
    }
  }
  return Status::ok;
}

// --- gradient of the affinity ---

// With P = A^p, T_ij = P_ij / D_i and D_i = sum_k P_ki + eps:
//   dL/dT_ij = sum_c g_c,i m_c,j,   dL/dD_i = -sum_j T_ij dL/dT_ij / D_i,   dL/dA_ij = p A_ij^(p-1) (dL/dT_ij / D_i + dL/dD_j)
struct WalkGradient {
  const Window& window;  // a copy, so that P is at hand
  View<4> states, grads;
  int64_t channels, state_row;
  float *slopes, *state, *grad, *sums;  // [taps][H][row], [H][C][state_row], [H][C][row], [H][line_length]

  WalkGradient(const Window& w, const View<4>& s, const View<4>& g)
      : window(w), states(s), grads(g), channels(s.size[1]), state_row(w.row + 2 * w.margin) {}
  int64_t floats() const {
    return window.height * (window.taps * window.row + channels * (state_row + window.row) + window.line_length);
  }
  void place(float* memory) {
    slopes = memory;
    state = slopes + window.height * window.taps * window.row;
    grad = state + window.height * channels * state_row;
    sums = grad + window.height * channels * window.row;
    std::fill(state, memory + floats(), 0.0f);
  }
  float* slope_at(int64_t dy, int64_t dx, int64_t y) const { return slopes + (window.at(dy, dx, y) - window.copy); }
  void load_rows(int64_t b, int64_t y) const {
    for (int64_t c = 0; c < channels; ++c) {
      load_row(states, b, c, y, state + (y * channels + c) * state_row + window.margin);
      load_row(grads, b, c, y, grad + (y * channels + c) * window.row);
    }
  }
  // dL/dT and dL/dD of row y.
  void slopes_of_row(int64_t y) const {
    float* sum = sums + y * window.line_length + window.margin;
    for (int64_t dy = std::max(-window.reach_y, -y); dy <= std::min(window.reach_y, window.height - 1 - y); ++dy)
      for (int64_t dx = -window.reach_x; dx <= window.reach_x; ++dx)
        for (int64_t x = 0; x < window.row; x += kLanes) {
          vfloat slope = {};
          for (int64_t c = 0; c < channels; ++c)
            slope += load(grad + (y * channels + c) * window.row + x) *
                     load(state + ((y + dy) * channels + c) * state_row + window.margin + x + dx);
          const vfloat inverse = load(window.inverse + y * window.row + x);
          store(slope_at(dy, dx, y) + x, slope * inverse);
          store(sum + x, load(sum + x) - load(window.at(dy, dx, y) + x) * slope * inverse * inverse);
        }
  }
  // dL/dA of row y: every plane of the window, those of taps that leave the image as zeros.
  void write_row(const View<4>& out, int64_t b, int64_t y, float* line) const {
    const float p = window.args.power;
    const int64_t radius = window.args.radius;
    for (int64_t dy = -radius; dy <= radius; ++dy)
      for (int64_t dx = -radius; dx <= radius; ++dx) {
        const int64_t tap = window.channel(dy, dx);
        const bool leaves = y + dy < 0 || y + dy >= window.height || std::abs(dx) > window.reach_x;
        load_row(window.args.affinity, b, tap, y, line);
        for (int64_t x = 0; x < window.width; ++x) {
          const float slope = p == 2 ? 2 * line[x] : p == 1 ? 1.0f : p * std::pow(line[x], p - 1);
          line[x] = leaves || x + dx < 0 || x + dx >= window.width
                        ? 0.0f
                        : slope * (slope_at(dy, dx, y)[x] + sums[(y + dy) * window.line_length + window.margin + x + dx]);
        }
        store_row(out, b, tap, y, line);
      }
  }
};

int64_t walk_gradient_bytes(const WalkArgs& args, const View<4>& states, int threads) {
  const Window window(args, threads, false, nullptr);
  return 4 * (window.floats + WalkGradient(window, states, states).floats() + threads * window.row);
}

Status walk_gradient(const WalkArgs& args, const View<4>& states, const View<4>& grads, const View<4>& out, void* workspace,
                     int threads) {
  if (!fits(args, states, threads) || states.size[1] != grads.size[1]) return Status::bad_argument;
  Window window(args, threads, false, static_cast<float*>(workspace));
  float* rest = static_cast<float*>(workspace) + window.floats;
  WalkGradient gradient(window, states, grads);
  for (int64_t b = 0; b < states.size[0]; ++b) {
    window.select(b);
    gradient.place(rest);
#pragma omp parallel num_threads(threads)
    {
      float* line = rest + gradient.floats() + thread_number() * window.row;
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) window.copy_row(b, y), gradient.load_rows(b, y);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) window.invert_row(y), gradient.slopes_of_row(y);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) gradient.write_row(out, b, y, line);
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t walk_bytes(const WalkArgs& args, const WalkMasks& masks, int threads))
AFA_DECLARE_PER_ISA(Status walk(const WalkArgs& args, const WalkMasks& masks, void* workspace, int threads))
AFA_DECLARE_PER_ISA(int64_t walk_gradient_bytes(const WalkArgs& args, const View<4>& states, int threads))
AFA_DECLARE_PER_ISA(Status walk_gradient(const WalkArgs& args, const View<4>& states, const View<4>& grads, const View<4>& out,
                                         void* workspace, int threads))

int64_t random_walk_cpu_workspace(const WalkArgs& args, const WalkMasks& masks, int threads) {
  AFA_DISPATCH(walk_bytes, args, masks, threads)
}
Status random_walk_cpu(const WalkArgs& args, const WalkMasks& masks, void* workspace, int threads) {
  AFA_DISPATCH(walk, args, masks, workspace, threads)
}
int64_t random_walk_affinity_gradient_cpu_workspace(const WalkArgs& args, const View<4>& states, int threads) {
  AFA_DISPATCH(walk_gradient_bytes, args, states, threads)
}
Status random_walk_affinity_gradient_cpu(const WalkArgs& args, const View<4>& states, const View<4>& grads,
                                         const View<4>& grad_affinity, void* workspace, int threads) {
  AFA_DISPATCH(walk_gradient, args, states, grads, grad_affinity, workspace, threads)
}
#endif

}  // namespace afa
