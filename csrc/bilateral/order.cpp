// An order of pixels in which tiles are compact. Compiled once: what the standard library makes of its templates must run anywhere.
#include <algorithm>
#include <cmath>

#include "bilateral/bilateral.h"

namespace afa {

constexpr int kDims = 5;

static int widest(const float* points, const int32_t* first, const int32_t* last) {
  float low[kDims], high[kDims];
  std::copy(points + *first * kDims, points + (*first + 1) * kDims, low);
  std::copy(low, low + kDims, high);
  for (const int32_t* at = first + 1; at < last; ++at)
    for (int k = 0; k < kDims; ++k) {
      const float value = points[int64_t(*at) * kDims + k];
      low[k] = std::min(low[k], value), high[k] = std::max(high[k], value);
    }
  int widest = 0;
  for (int k = 1; k < kDims; ++k)
    if (high[k] - low[k] > high[widest] - low[widest]) widest = k;
  return widest;
}

static void split(const float* points, int32_t* first, int32_t* last, int64_t tile) {
  while (last - first > tile) {
    const int axis = widest(points, first, last);
    int32_t* middle = first + round_up((last - first) / 2, tile);  // whole tiles but for the very last
    // The index decides between equals: the same order with every standard library.
    std::nth_element(first, middle, last, [&](int32_t a, int32_t b) {
      const float left = points[int64_t(a) * kDims + axis], right = points[int64_t(b) * kDims + axis];
      return left < right || (left == right && a < b);
    });
    split(points, first, middle, tile);
    first = middle;
  }
}

void compact_order(float* points, int64_t count, int64_t tile, int32_t* order) {
  for (int64_t i = 0; i < count * kDims; ++i)  // NaN has no place in an order
    points[i] = points[i] == points[i] ? std::clamp(points[i], -1e18f, 1e18f) : 0.0f;
  for (int64_t i = 0; i < count; ++i) order[i] = int32_t(i);
  split(points, order, order + count, tile);
  // Within a tile rows of the image, so that what is read for it is near in memory.
  for (int64_t first = 0; first < count; first += tile) std::sort(order + first, order + std::min(count, first + tile));
}

}  // namespace afa
