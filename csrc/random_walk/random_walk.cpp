// The random walk on the CPU.
//
// Data flow, one image at a time: rows of pixels add up the columns of A^p that end there and keep 1 / D; the cams go to rows of
// pixels with their channels side by side. A step then takes 16 pixels of a row at a time: their windows' A^p go to a table,
// zeros where a tap leaves the image, and up to 8 pixels at once take their share of every neighbour, which is loaded once for all of
// them, one broadcast weight each; 1 / D comes at the end, or, where D is so small or large that it cannot, the table already holds
// A^p / D. Unlike in diffusion/diffusion.cpp, whose vectors run along pixel rows, loads are
// aligned whatever the tap. Sums run over taps in order: the same bits for any number of threads.
// Floor: A read twice, N * (2r+1)^2 * C fused multiply-adds per step. Bound: these, and a load of a weight for every two.
#include <type_traits>
#include <utility>

#include "random_walk/window.h"

namespace afa {
namespace AFA_ISA {

// --- a step ---

template <class Visit, int... kIndex>
static inline void each(Visit visit, std::integer_sequence<int, kIndex...>) {
  (visit(std::integral_constant<int, kIndex>()), ...);
}

constexpr int kMostPixels = kLanes == 16 ? 8 : 6;  // that sum at once, two vectors each: of 32 registers or 16
constexpr int64_t kBlock = 16;                     // pixels whose weights are looked up at once

// The present channels of one image, in blocks of 2 vectors or, if one holds the last of them, 1: [H][W][lanes].
struct Lanes {
  int64_t height, row, vectors;
  Lanes(int64_t h, int64_t w, int64_t channels) : height(h), row(w), vectors((channels + kLanes - 1) / kLanes) {}
  int64_t floats() const { return height * row * vectors * kLanes; }
  int64_t width(int64_t vector) const { return std::min<int64_t>(vectors - vector / 2 * 2, 2) * kLanes; }  // of its block
  float* at(float* values, int64_t y, int64_t x, int64_t channel) const {
    const int64_t vector = channel / kLanes, block = vector / 2 * 2 * kLanes;
    return values + block * height * row + (y * row + x) * width(vector) + channel - block;
  }
};

// The table's weights of one tap, divided by D: their own pixels', or, for the adjoint, that of the neighbours they lie at.
static void divide(const Window& window, bool transpose, int64_t y, int64_t dy, int64_t dx, const int32_t* mask, float* weights) {
  const float* sums = transpose ? window.total + (y + dy) * window.row + dx : window.total + y * window.row;
  for (int64_t x = 0; x < window.width; ++x)
    if (mask[x]) weights[x / kBlock * kBlock * window.taps + x % kBlock] /= sums[x];
}

// The weights of row y, not yet divided by D unless the image is `odd`: [row / kBlock][taps][kBlock], taps whose row leaves the image
// left out.
template <int kPower>
static void look_up(const Window& window, bool transpose, bool odd, int64_t y, float* weights) {
  const int64_t side = 2 * window.reach_x + 1, step = transpose ? 1 - window.plane_x : window.plane_x;
  for (int64_t dy = std::max(-window.reach_y, -y); dy <= std::min(window.reach_y, window.height - 1 - y); ++dy) {
    // The adjoint reads, at the neighbour, the tap that points back.
    const float* from = transpose ? window.at(-dy, window.reach_x, y + dy) - window.reach_x : window.at(dy, -window.reach_x, y);
    const int32_t* mask = window.inside;
    const bool whole = window.readable(from, step, side, window.row);
    for (int64_t i = 0; i < side; ++i, from += step, mask += window.row, weights += kBlock) {
      for (int64_t x = 0; x < window.row; x += kLanes)
        store(weights + x / kBlock * kBlock * window.taps + x % kBlock, window.powered<kPower>(from + x, mask + x, whole));
      if (odd) divide(window, transpose, y, dy, i - window.reach_x, mask, weights);
    }
  }
}

// Adds one neighbour to pixels kFirst.., each by its own weight: that of pixel i lies i taps before the first's.
template <int kFirst, int kVectors, int... kPixel>
static inline void spread(vfloat (*sum)[kVectors], const float* weight, const float* from, std::integer_sequence<int, kPixel...>) {
  vfloat near[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) near[v] = load(from + v * kLanes);
  auto add = [&](vfloat* to, float share) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) to[v] += share * near[v];
  };
  (add(sum[kFirst + kPixel], weight[-(kFirst + kPixel) * (kBlock - 1)]), ...);
}

// sum over taps of weight * neighbour, for pixels (y, x..x+kPixels-1) and one block of channels; kPixels <= 2 * reach_x + 1.
// Neighbours left of the first reach_x + kPixels - 1 are near the first pixels alone, those at the other end the last.
template <int kPixels, int kVectors>
static void sum_window(const Window& window, const float* weights, const float* cams, int64_t y, int64_t x, float* sums) {
  constexpr int lanes = kVectors * kLanes;
  const int64_t row = window.width, reach = window.reach_x, taps = 2 * reach + 1;
  const int64_t absent = std::max<int64_t>(reach - x, 0);                    // neighbours before the first column
  const int64_t count = std::min(taps + kPixels - 1, row - x + reach);       // and up to the last one
  vfloat sum[kPixels][kVectors] = {};
  for (int64_t dy = std::max(-window.reach_y, -y); dy <= std::min(window.reach_y, window.height - 1 - y); ++dy, weights += taps * kBlock) {
    const float* from = cams + (dy * row - reach) * lanes;
    auto rising = [&](auto k) {
      constexpr int n = decltype(k)::value;
      if (n >= absent && n < count) spread<0, kVectors>(sum, weights + n * kBlock, from + n * lanes, std::make_integer_sequence<int, n + 1>());
    };
    auto falling = [&](auto k) {
      constexpr int first = decltype(k)::value + 1;
      const int64_t n = taps - 1 + first;
      if (n < count)
        spread<first, kVectors>(sum, weights + n * kBlock, from + n * lanes, std::make_integer_sequence<int, kPixels - first>());
    };
    each(rising, std::make_integer_sequence<int, kPixels - 1>());
    for (int64_t n = std::max<int64_t>(absent, kPixels - 1); n < std::min(taps, count); ++n)
      spread<0, kVectors>(sum, weights + n * kBlock, from + n * lanes, std::make_integer_sequence<int, kPixels>());
    each(falling, std::make_integer_sequence<int, kPixels - 1>());
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sums + i * lanes + v * kLanes, sum[i][v]);
}

typedef void (*SumWindow)(const Window&, const float*, const float*, int64_t, int64_t, float*);
template <int kVectors, int... kPixels>
static SumWindow sum_for(int64_t pixels, std::integer_sequence<int, kPixels...>) {
  static const SumWindow table[] = {sum_window<kPixels + 1, kVectors>...};
  return table[pixels - 1];
}

static void step_row(const Window& window, bool transpose, bool odd, const Lanes& lanes, float* cams, int64_t y, float* weights,
                     float* out) {
  window.power == 2 ? look_up<2>(window, transpose, odd, y, weights) : look_up<1>(window, transpose, odd, y, weights);
  for (int64_t block = 0; block < window.width; block += kBlock, weights += window.taps * kBlock) {
    const int64_t count = std::min(kBlock, window.width - block), most = std::min<int64_t>(kMostPixels, 2 * window.reach_x + 1);
    const int64_t tiles = (count + most - 1) / most, tile = (count + tiles - 1) / tiles;
    for (int64_t v = 0; v < lanes.vectors; v += 2)
      for (int64_t x = block; x < block + count; x += tile) {
        const int64_t pixels = std::min(tile, block + count - x);
        constexpr auto sizes = std::make_integer_sequence<int, kMostPixels>();
        const SumWindow sum = lanes.width(v) > kLanes ? sum_for<2>(pixels, sizes) : sum_for<1>(pixels, sizes);
        sum(window, weights + x - block, lanes.at(cams, y, x, v * kLanes), y, x, lanes.at(out, y, x, v * kLanes));
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

// Channels of one row to lanes of its pixels and back, through `lines` [kLanes][row].
static void gather_lanes(const View<4>& cams, int64_t b, const int32_t* channels, int64_t count, const Lanes& lanes, int64_t y,
                         int64_t row, float* lines, float* to) {
  for (int64_t first = 0; first < lanes.vectors * kLanes; first += kLanes) {
    for (int64_t c = 0; c < kLanes; ++c) {
      if (first + c < count)
        load_row(cams, b, channels[first + c], y, lines + c * row);
      else
        std::fill(lines + c * row, lines + (c + 1) * row, 0.0f);
    }
    const int64_t step = lanes.width(first / kLanes);
    for (int64_t x = 0; x < lanes.row; x += kLanes) {
      vfloat block[kLanes];
      for (int c = 0; c < kLanes; ++c) block[c] = load(lines + c * row + x);
      transpose(block);
      float* at = lanes.at(to, y, x, first);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, lanes.row - x); ++i) store(at + i * step, block[i]);
    }
  }
}
static void scatter_lanes(const View<4>& out, int64_t b, const int32_t* channels, int64_t count, const Lanes& lanes, int64_t y,
                          int64_t row, float* lines, float* from) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t step = lanes.width(first / kLanes);
    for (int64_t x = 0; x < lanes.row; x += kLanes) {
      vfloat block[kLanes] = {};
      const float* at = lanes.at(from, y, x, first);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, lanes.row - x); ++i) block[i] = load(at + i * step);
      transpose(block);
      for (int c = 0; c < kLanes; ++c) store(lines + c * row + x, block[c]);
    }
    for (int64_t c = 0; c < std::min<int64_t>(kLanes, count - first); ++c) store_row(out, b, channels[first + c], y, lines + c * row);
  }
}

// What a walk keeps in the workspace.
struct WalkMemory {
  Window window;
  float *first, *second;  // the cams, and what a step makes of them
  int32_t* present;       // channels of the image at hand
  int64_t table;          // floats of a thread: its table of weights, or the lines of a vector of channels
  float* tables;

  WalkMemory(const WalkArgs& args, const WalkMasks& masks, int threads, Arena& arena)
      : window(args, threads, true, arena), table(window.row * std::max<int64_t>(window.taps, kLanes)) {
    const int64_t channels = masks.cams.size[1], floats = Lanes(window.height, window.width, channels).floats();
    first = arena.take<float>(floats), second = arena.take<float>(floats);
    present = arena.take<int32_t>(channels);
    tables = arena.take<float>(threads * table);
  }
};

int64_t walk_bytes(const WalkArgs& args, const WalkMasks& masks, int threads) {
  Arena arena(nullptr);
  WalkMemory(args, masks, threads, arena);
  return arena.used;
}

Status walk(const WalkArgs& args, const WalkMasks& masks, void* workspace, int threads) {
  if (!fits(args, masks.cams, threads) || masks.num_steps < 0) return Status::bad_argument;
  Arena arena(workspace);
  WalkMemory memory(args, masks, threads, arena);
  Window& window = memory.window;
  const int32_t* present = memory.present;
  for (int64_t b = 0; b < masks.cams.size[0]; ++b) {
    std::fill(memory.tables, memory.tables + window.width, 0.0f);
    const int64_t count = present_channels(masks.class_mask, b, masks.out, memory.tables, memory.present);
    if (count == 0) continue;
    const Lanes lanes(window.height, window.width, count);
    window.select(b);
#pragma omp parallel num_threads(threads)
    {
      float *source = memory.first, *target = memory.second, *table = memory.tables + thread_number() * memory.table;
      if (!window.in_place) {
#pragma omp for schedule(static)
        for (int64_t y = 0; y < window.height; ++y) window.copy_row(b, y);
      }
#pragma omp for schedule(static)
      for (int64_t y = 0; y < window.height; ++y) {
        window.sum_row(y);
        gather_lanes(masks.cams, b, present, count, lanes, y, window.row, table, source);
        if (masks.num_steps == 0) scatter_lanes(masks.out, b, present, count, lanes, y, window.row, table, source);
      }
      const bool odd = window.any_odd();
      if (!odd && masks.transpose && masks.num_steps > 0) {
#pragma omp for schedule(static)
        for (int64_t y = 0; y < window.height; ++y) scale_row(window, lanes, y, source);
      }
      for (int64_t step = 0; step < masks.num_steps; ++step) {
        const bool last = step + 1 == masks.num_steps;
#pragma omp for schedule(static)
        for (int64_t y = 0; y < window.height; ++y) {
          step_row(window, masks.transpose, odd, lanes, source, y, table, target);
          if (!odd && (!masks.transpose || !last)) scale_row(window, lanes, y, target);
          if (last) scatter_lanes(masks.out, b, present, count, lanes, y, window.row, table, target);
        }
        std::swap(source, target);
      }
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
