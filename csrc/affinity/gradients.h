// G, the gradients of the scores of one image on the CPU, and where they come from: the loss, what it has kept, or a window's gradient.
#pragma once

#include "affinity/band.h"

namespace afa {
namespace AFA_ISA {

constexpr int kBackQueries = 6;  // pixels whose gradients are summed at once, over their joint window
constexpr int kMargin = kBackQueries - 1;

// G of one image.
struct PairGradients {
  int64_t height, width, radius, side, row;
  float* values;  // [N][side][row], a pixel's own column at kMargin + radius
  double* sums;   // [h]: of G over a row of pixels

  PairGradients(const Tiling& tiling, Arena& arena)
      : height(tiling.height), width(tiling.width), radius(tiling.radius), side(2 * radius + 1), row(side + 2 * kMargin) {
    values = arena.take<float>(height * width * side * row);
    sums = arena.take<double>(height);
  }
  float* at(int64_t y, int64_t x, int64_t dy) const {
    return values + ((y * width + x) * side + radius + dy) * row + kMargin + radius;
  }
  void clear() const { std::fill(values, values + height * width * side * row, 0.0f); }
  void add_up(int threads) const {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t y = 0; y < height; ++y) {
      sums[y] = 0;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t dy = -radius; dy <= radius; ++dy) {
          float line = 0;
          for (int64_t dx = -radius; dx <= radius; ++dx) line += at(y, x, dy)[dx];
          sums[y] += line;
        }
    }
  }
};

// Query i's gradients, which lie where its scores did, to both pixels of each pair.
static void keep_gradients(const BandTile& tile, const Tiling& tiling, int64_t i, const PairGradients& to) {
  for (int64_t parity = 0; parity < 2; ++parity) {
    const Line at = tiling.line(tile, i, parity);
    const int64_t dy = at.key_y - at.y;
    float *here = to.at(at.y, at.x, dy) - at.x, *there = to.at(at.key_y, 0, -dy) + at.x;
    const int64_t step = to.side * to.row - 1;  // to the next pixel's gradient at the same key
    for (int64_t k = at.begin; k < at.end; ++k) here[k] = there[k * step] = at.scores[2 * k];
  }
}

static void pair_gradients_of_loss(const BandTile& tile, const Tiling& tiling, const LaneLabels& labels, const PairGradient& gradient,
                                   float bias, const PairGradients& to) {
  const vfloat same = splat(2.0f * gradient.same), different = splat(2.0f * gradient.different);
  for (int64_t i = 0; i < 2 * tile.columns; ++i) {
    if (labels.values[tile.y * labels.row + 2 * tile.x + i] < 0) continue;
    float* scores = tile.scores + i * tile.stride;
    labelled_lanes(tile, tiling, labels, i, [&](int64_t lane, vint is_same, vint is_different) {
      const vfloat factor = (vfloat)(((vint)same & is_same) | ((vint)different & is_different));
      const vfloat slope = (vfloat)((vint)Sigmoids(load(scores + lane) + bias).slope & (is_same | is_different));
      store(scores + lane, factor * slope);
    });
    keep_gradients(tile, tiling, i, to);
  }
}

// From what the loss has kept. Queries of one row of pixels after the other; every number is written by one of them alone.
static void pair_gradients_of_kept(const Derivatives& kept, const PairGradient& gradient, const Tiling& tiling, const PairGradients& to,
                                   int threads) {
  const float same = -2.0f * gradient.same, different = 2.0f * gradient.different;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t y = 0; y < tiling.height; ++y)
    for (int64_t x = 0; x < tiling.width; ++x)
      for (int64_t dy = 0; dy <= std::min(tiling.radius, tiling.height - 1 - y); ++dy) {
        const float* from = kept.row(y, x, dy) - x;
        const int64_t begin = std::max(dy == 0 ? x : x - tiling.radius, int64_t(0)), end = std::min(x + tiling.radius + 1, tiling.width);
        float *here = to.at(y, x, dy) - x, *there = to.at(y + dy, 0, -dy) + x;
        const int64_t step = to.side * to.row - 1;
        for (int64_t k = begin; k < end; ++k)  // 0 stays 0 whatever the slopes are, NaN stays NaN
          here[k] = from[k] == 0 ? 0.0f : from[k] * (from[k] < 0 ? same : different);
        for (int64_t k = begin; k < end; ++k) there[k * step] = here[k];
      }
}

static void slopes_of_window(const BandTile& tile, const Tiling& tiling, float bias, const PairGradients& to) {
  for (int64_t i = 0; i < 2 * tile.columns; ++i) {
    float* scores = tile.scores + i * tile.stride;
    for (int64_t lane = 0; lane < 2 * tile.keys; lane += kLanes) store(scores + lane, Sigmoids(load(scores + lane) + bias).slope);
    keep_gradients(tile, tiling, i, to);
  }
}

// Slopes to gradients of row y; `lines` holds two rows of pixels.
static void times_gradients(const View<4>& grad_window, int64_t b, int64_t y, const Tiling& tiling, const PairGradients& to,
                            float* lines) {
  const int64_t side = tiling.side, centre = side / 2, width = tiling.width, r = tiling.radius;
  float *own = lines, *mirrored = lines + width;
  for (int64_t dy = std::max(-r, -y); dy <= std::min(r, tiling.height - 1 - y); ++dy)
    for (int64_t dx = -r; dx <= r; ++dx) {
      load_row(grad_window, b, (centre + dy) * side + centre + dx, y, own);
      load_row(grad_window, b, (centre - dy) * side + centre - dx, y + dy, mirrored);
      for (int64_t x = std::max(-dx, int64_t(0)); x < std::min(width - dx, width); ++x)
        to.at(y, x, dy)[dx] *= own[x] + mirrored[x + dx];
    }
}

// G of image b from the gradient of a window; `fill` computes the scores of a pair of rows, `lines` [threads][2 * width].
template <class Fill>
static void pair_gradients_of_window(const View<4>& grad_window, int64_t b, float bias, const Tiling& tiling, const PairGradients& to,
                                     float* buffers, float* lines, int threads, const Fill& fill) {
  for_each_tile(tiling, buffers, threads, fill, [&](const BandTile& tile) { slopes_of_window(tile, tiling, bias, to); });
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t y = 0; y < tiling.height; ++y)
    times_gradients(grad_window, b, y, tiling, to, lines + thread_number() * 2 * tiling.width);
}

}  // namespace AFA_ISA
}  // namespace afa
