// What the CPU files of the path affinity share: the directions' paths as offsets, and the rows of the edge map as keys.
#pragma once

#include <algorithm>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"
#include "path_affinity/path_affinity.h"

namespace afa {
namespace AFA_ISA {

constexpr int kBlock = 4;  // vectors of pixels whose maxima are in registers at once

struct Direction {
  int32_t dy, dx, count;   // of the path's points
  const int32_t* ahead;    // [count]: a point's place among the keys, from that of its pixel
  const int32_t *py, *px;  // [count]
};

static inline vint load_keys(const int32_t* from) {
  vint value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// Calls run(x, std::integral_constant<int, vectors>) for every pixel of a row, a block or a vector of them at a time.
template <class Run>
static inline void along(int64_t row, const Run& run) {
  int64_t x = 0;
  for (; x + kBlock * kLanes <= row; x += kBlock * kLanes) run(x, std::integral_constant<int, kBlock>());
  for (; x < row; x += kLanes) run(x, std::integral_constant<int, 1>());
}

// Rows have margins on both sides, as wide as a path reaches.
struct Paths {
  PathArgs args;
  int64_t height, width, row, margin, line;
  int64_t reach_y, reach_x;  // of the taps that some pixel has
  int64_t count, points, longest;
  Direction* directions;     // [count], row-major
  int32_t* offsets;          // [3][points]: ahead, py, px
  int32_t* keys;             // [images][height][line]

  Paths(const PathArgs& path_args, int64_t images, Arena& arena) : args(path_args), count(0), points(0), longest(0) {
    height = args.edge.size[2], width = args.edge.size[3], row = round_up(width, 16);
    reach_y = std::min(args.reach, height - 1), reach_x = std::min(args.reach, width - 1);
    margin = round_up(reach_x, 16), line = row + 2 * margin;
    each([&](int64_t dy, int64_t dx) {
      const int64_t most = 2 * (dy + std::abs(dx) + 1);
      ++count, points += most, longest = std::max(longest, most);
    });
    directions = arena.take<Direction>(count);
    offsets = arena.take<int32_t>(3 * points);
    keys = arena.take<int32_t>(images * height * line);
    if (arena.base) find();
  }

  bool in_disc(int64_t dy, int64_t dx) const { return dy * dy + dx * dx < args.radius * args.radius; }
  int64_t channel(int64_t dy, int64_t dx) const { return (args.reach + dy) * (2 * args.reach + 1) + args.reach + dx; }
  // The columns whose neighbour at dx is in the image: from the first up to the second.
  int64_t left(int64_t dx) const { return std::max<int64_t>(0, -dx); }
  int64_t right(int64_t dx) const { return std::min(width, width - dx); }
  const int32_t* keys_of(int64_t image, int64_t y) const { return keys + (image * height + y) * line + margin; }

  template <class Visit>
  void each(const Visit& visit) const {
    for (int64_t dy = 0; dy <= reach_y; ++dy)
      for (int64_t dx = dy ? -reach_x : 1; dx <= reach_x; ++dx)
        if (in_disc(dy, dx)) visit(dy, dx);
  }
  void find() {
    int32_t *ahead = offsets, *py = ahead + points, *px = py + points;
    Direction* to = directions;
    each([&](int64_t dy, int64_t dx) {
      *to = {int32_t(dy), int32_t(dx), 0, ahead, py, px};
      auto add = [&](int y, int x) {
        x = dx < 0 ? -x : x;
        *py++ = y, *px++ = x, *ahead++ = int32_t(y * line + x), ++to->count;
      };
      for (PathLevels path(to->dy, to->dx); path.more(); path.next()) {
        add(path.lower, path.level - path.lower);
        if (path.two()) add(path.lower + 1, path.level - path.lower - 1);
      }
      ++to;
    });
  }

  // Row y of image b, to the keys of `image`; outside of it there is nothing.
  void load_keys_of(int64_t b, int64_t y, int64_t image) const {
    int32_t* to = keys + (image * height + y) * line;
    float* values = reinterpret_cast<float*>(to + margin);
    load_row(args.edge, b, 0, y, values);
    for (int64_t x = 0; x < width; ++x) {
      float value;
      __builtin_memcpy(&value, values + x, 4);
      to[margin + x] = path_key(value);
    }
    std::fill(to, to + margin, INT32_MIN);
    std::fill(to + margin + width, to + line, INT32_MIN);
  }
};

static inline bool fits(const PathArgs& args, int threads) {
  const int64_t side = 2 * args.reach + 1;
  return same_images(args.edge, args.window) && args.edge.size[1] == 1 && args.radius > 0 && args.reach >= 0 &&
         args.window.size[1] == side * side && threads > 0;
}

}  // namespace AFA_ISA
}  // namespace afa
