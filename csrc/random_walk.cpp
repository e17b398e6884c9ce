// The random walk on the CPU.
//
// Data flow, one image at a time: rows of pixels add up the columns of A^p that end there and keep 1 / D; the cams go to rows of
// pixels with their channels side by side. A step then takes 16 pixels of a row at a time: their windows' A^p go to a table,
// zeros where a tap leaves the image, and up to 8 pixels at once sum their neighbours, one broadcast weight each, scaled by 1 / D at
// the end. Unlike in diffusion.cpp, whose vectors run along pixel rows, loads are aligned whatever the tap: measured twice as fast
// at 289 taps and 21 channels. Sums run over taps in order: the same bits for any number of threads.
// Floor: A read twice, N * (2r+1)^2 * C fused multiply-adds per step. Bound: the loads, 3 for 2 multiply-adds.
#include "random_walk_window.h"

namespace afa {
namespace AFA_ISA {

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

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t walk_bytes(const WalkArgs& args, const WalkMasks& masks, int threads))
AFA_DECLARE_PER_ISA(Status walk(const WalkArgs& args, const WalkMasks& masks, void* workspace, int threads))

int64_t random_walk_cpu_workspace(const WalkArgs& args, const WalkMasks& masks, int threads) {
  AFA_DISPATCH(walk_bytes, args, masks, threads)
}
Status random_walk_cpu(const WalkArgs& args, const WalkMasks& masks, void* workspace, int threads) {
  AFA_DISPATCH(walk, args, masks, workspace, threads)
}
#endif

}  // namespace afa
