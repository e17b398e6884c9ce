// What the CPU files of the affinity of features share: the features as rows of float, and which rows a thread takes.
#pragma once

#include <algorithm>
#include <utility>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"
#include "feature_affinity/feature_affinity.h"

namespace afa {
namespace AFA_ISA {

// The features of as many images as there are threads, [image][H][C][row], float32. Behind every row, and before the first, lie as
// many zeros as a tap reaches to the side.
struct FeatureRows {
  int64_t channels, height, width, radius, reach_y, reach_x, side;  // reach: of the taps that can stay inside; side of these
  int64_t vectors, row, line, image, images;
  float* values;

  FeatureRows(const FeatureArgs& args, int threads, Arena& arena) {
    const View<4>& view = args.features;
    channels = view.size[1], height = view.size[2], width = view.size[3], radius = args.radius;
    reach_y = std::min(radius, height - 1), reach_x = std::min(radius, width - 1), side = 2 * reach_x + 1;
    vectors = (width + kLanes - 1) / kLanes;
    row = round_up(width + reach_x, 16) | 16;  // an odd number of cache lines: channels do not compete for a few sets of the cache
    line = channels * row, image = height * line, images = std::min<int64_t>(view.size[0], threads);
    const int64_t lead = round_up(reach_x, 16), total = lead + images * image + 16;  // the last vector may run past its row
    values = arena.take<float>(total);
    if (!arena.base) return;
    std::fill(values, values + lead, 0.0f);
    std::fill(values + total - 16, values + total, 0.0f);
    values += lead;
  }
  const float* at(int64_t image_number, int64_t y, int64_t c) const { return values + image_number * image + y * line + c * row; }
  void load(const View<4>& view, int64_t b, int64_t image_number, int64_t y) const {
    for (int64_t c = 0; c < channels; ++c) {
      float* to = values + image_number * image + y * line + c * row;
      load_row(view, b, c, y, to);
      std::fill(to + width, to + row, 0.0f);
    }
  }
  // The channel of a whole window of this radius.
  int64_t tap(int64_t dy, int64_t dx) const { return (radius + dy) * (2 * radius + 1) + radius + dx; }
  int64_t middle() const { return tap(0, 0); }
};

static inline bool fits(const FeatureArgs& args, int threads) { return !is_empty(args.features) && args.radius >= 0 && threads > 0; }

// Parts of `count` things, none larger than `most`, as even as can be: part i of n begins at count * i / n.
static inline int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

// For some images at a time: their features are loaded, then visit(image, its place in `rows`, first row, last row + 1, thread) for
// every group of at most kRows rows of each.
template <class Visit>
static void for_each_group(const FeatureArgs& args, const FeatureRows& rows, int64_t most, int threads, const Visit& visit) {
  const int64_t groups = parts_of(rows.height, most);
  for (int64_t first = 0; first < args.features.size[0]; first += rows.images) {
    const int64_t images = std::min(rows.images, args.features.size[0] - first);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < images * rows.height; ++i)
        rows.load(args.features, first + i / rows.height, i / rows.height, i % rows.height);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < images * groups; ++i) {
        const int64_t group = i % groups;
        visit(first + i / groups, i / groups, group * rows.height / groups, (group + 1) * rows.height / groups, thread_number());
      }
    }
  }
}

}  // namespace AFA_ISA
}  // namespace afa
