// What the CPU files of the random walk share: the affinity of one image, in place or copied, and the sums of its columns.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"
#include "random_walk/random_walk.h"

namespace afa {
namespace AFA_ISA {

// Sums D that may be inverted: neither 1 / D nor what is multiplied by it leaves the normal numbers.
constexpr float kLeastSum = 1e-10f, kMostSum = 1e10f;

// The window of one image, in place or copied, D, and 1 / D where that may be multiplied by.
struct Window {
  WalkArgs args;
  int64_t height, width, row, reach_y, reach_x;  // reach: of the taps that can stay inside the image
  int64_t taps, margin, line_length;
  bool in_place;        // else `copy` holds A^p, and the power left to apply is 1
  int power;
  const float *centre, *begin, *end;        // the plane of (0, 0); the bounds of the affinity's memory
  int64_t plane_y, plane_x, line;           // strides over dy, dx and y
  int32_t* inside;                          // [2 * reach_x + 1][row]: all ones where the tap's column is in the image
  float *total, *inverse;                   // [H][row]: D and 1 / D
  int32_t* odd;                             // [H]: whether some D of the row may not be inverted
  float *lines, *copy;                      // [threads][2 * reach_x + 1][line_length]; [taps][H][row] + slack

  Window(const WalkArgs& walk, int threads, bool may_read_in_place, Arena& arena) : args(walk) {
    const View<4>& view = args.affinity;
    height = view.size[2], width = view.size[3], row = round_up(width, 16);
    reach_y = std::min(args.radius, height - 1), reach_x = std::min(args.radius, width - 1);
    taps = (2 * reach_y + 1) * (2 * reach_x + 1);
    margin = round_up(reach_x, 16), line_length = row + 2 * margin;
    power = args.power == 2 ? 2 : 1;
    in_place = may_read_in_place && view.dtype == DType::f32 && view.stride[3] == 1 && (args.power == 2 || args.power == 1);
    inside = arena.take<int32_t>((2 * reach_x + 1) * row);
    total = arena.take<float>(height * row);
    inverse = arena.take<float>(height * row);
    odd = arena.take<int32_t>(height);
    lines = arena.take<float>(threads * (2 * reach_x + 1) * line_length);
    copy = arena.take<float>(in_place ? 0 : taps * height * row);
    if (!in_place) power = 1;
    if (!arena.base) return;
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

  void sum_row(int64_t y) const {
    float* own = lines + thread_number() * (2 * reach_x + 1) * line_length + margin;  // margins stay 0
    for (int64_t dx = -reach_x; dx <= reach_x; ++dx) {
      float* sums = own + (reach_x + dx) * line_length;
      power == 2 ? add_rows<2>(y, dx, sums) : add_rows<1>(y, dx, sums);
    }
    float* sums = total + y * row;
    for (int64_t x = 0; x < row; x += kLanes) {
      vfloat sum = {};
      for (int64_t dx = -reach_x; dx <= reach_x; ++dx) sum += load(own + (reach_x + dx) * line_length + x - dx);
      store(sums + x, sum + args.eps);
      store(inverse + y * row + x, 1.0f / (sum + args.eps));
    }
    odd[y] = 0;
    for (int64_t x = 0; x < width; ++x) odd[y] |= !(sums[x] >= kLeastSum && sums[x] <= kMostSum);
  }
  bool any_odd() const {
    for (int64_t y = 0; y < height; ++y)
      if (odd[y]) return true;
    return false;
  }
};

static inline bool fits(const WalkArgs& args, const View<4>& masks, int threads) {
  return same_images(args.affinity, masks) && args.radius >= 0 && args.affinity.size[1] == (2 * args.radius + 1) * (2 * args.radius + 1) && threads > 0;
}

}  // namespace AFA_ISA
}  // namespace afa
