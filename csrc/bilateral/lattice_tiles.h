// Pixels in tiles: what a tile needs of a lattice stays in a core's own caches while the tile is worked on. The points of a tile lie
// one behind the other, row by row, tiles band by band. Which tiles there are follows from the image's size alone, never from threads.
#pragma once

#include <algorithm>

#include "common/common.h"
#include "common/cpu.h"

namespace afa {
namespace AFA_ISA {

// A tile numbers the corners of all its points in 16 bits.
constexpr int64_t kTileSide = 64, kTilePoints = kTileSide * kTileSide;
constexpr int64_t kTileSideOfMany = 32, kMostDimsOfTile = 15;
static_assert(kTilePoints * (kMostDimsOfTile + 1) <= 1 << 16, "");

struct Tile {
  int64_t y, x, height, width;
  int64_t first;  // point
  int64_t points() const { return height * width; }
  // Some of its rows of pixels.
  Tile part(int64_t from, int64_t rows) const {
    return {y + from, x, std::min(rows, height - from), width, first + from * width};
  }
};

struct Tiles {
  int64_t height, width, tall, wide, across, count;

  Tiles(int64_t h, int64_t w, int64_t dims) : height(h), width(w) {
    const int64_t side = dims <= kMostDimsOfTile ? kTileSide : kTileSideOfMany;
    wide = std::min(w, std::max(side, side * side / std::max<int64_t>(h, 1)));
    tall = std::min(h, side * side / std::max<int64_t>(wide, 1));
    across = wide ? (w + wide - 1) / wide : 0;
    count = tall ? (h + tall - 1) / tall * across : 0;
  }
  Tile operator[](int64_t t) const {
    Tile tile;
    tile.y = t / across * tall, tile.x = t % across * wide;
    tile.height = std::min(tall, height - tile.y), tile.width = std::min(wide, width - tile.x);
    tile.first = tile.y * width + tile.x * tile.height;
    return tile;
  }
};

}  // namespace AFA_ISA
}  // namespace afa
