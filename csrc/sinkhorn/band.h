// What the CPU files of the Sinkhorn normalisation share: a window of one image, copied row by row, and sums of its products with
// vectors over rows and over columns.
//
// The copy is [H][taps][row] float: all taps of a row of pixels lie one behind the other, so a pass reads it from front to back. Sums
// are kept in registers, doubles side by side along x, in the order of the taps. A sum over the columns is one over taps that point at a
// pixel: for each dx the sums over dy, which lie at the x they start from, and then these, moved by dx. Vectors are [H][line] with zeros
// around them, so that no load is cut short, and the copy holds 0 where a tap leaves the image.
#pragma once

#include <algorithm>
#include <utility>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"
#include "sinkhorn/sinkhorn.h"

namespace afa {
namespace AFA_ISA {

constexpr int kDoubles = kLanes / 2;  // to a vector
constexpr int kMostSums = 8;          // vectors that are summed up at once
typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef float vnarrow __attribute__((vector_size(kVectorBytes / 2)));

static inline vdouble wide(const float* from) {
  vnarrow value;
  __builtin_memcpy(&value, from, sizeof value);
  return __builtin_convertvector(value, vdouble);
}
static inline vdouble load(const double* from) {
  vdouble value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
static inline void store(double* to, vdouble value) { __builtin_memcpy(to, &value, sizeof value); }
static inline vnarrow narrow(vdouble value) { return __builtin_convertvector(value, vnarrow); }
static inline void store(float* to, vnarrow value) { __builtin_memcpy(to, &value, sizeof value); }

// The layout of one image.
struct Band {
  int64_t radius, height, width, row, reach_y, reach_x;  // reach: of the taps that can stay inside the image
  int64_t side, taps, margin, line;
  double *lines, *sums;  // [threads][side][line], [threads][row]
  float* output;         // [threads][row]

  Band(const SinkhornArgs& args, int threads, Arena& arena) : radius(args.radius) {
    height = args.affinity.size[2], width = args.affinity.size[3], row = round_up(width, kDoubles);
    reach_y = std::min(radius, height - 1), reach_x = std::min(radius, width - 1);
    side = 2 * reach_x + 1, taps = (2 * reach_y + 1) * side;
    margin = round_up(reach_x, kDoubles), line = row + 2 * margin;
    lines = arena.take<double>(threads * side * line);
    sums = arena.take<double>(threads * row);
    output = arena.take<float>(threads * row);
    if (arena.base) std::fill(lines, lines + threads * side * line, 0.0);
  }

  int64_t channel(int64_t dy, int64_t dx) const { return (radius + dy) * (2 * radius + 1) + radius + dx; }
  int64_t first_dy(int64_t y) const { return std::max(-reach_y, -y); }
  int64_t last_dy(int64_t y) const { return std::min(reach_y, height - 1 - y); }
  int64_t first_x(int64_t dx) const { return std::max<int64_t>(0, -dx); }  // of the pixels whose tap stays inside
  int64_t end_x(int64_t dx) const { return std::min(width, width - dx); }

  // --- windows ---

  float* take_window(Arena& arena) const {
    const int64_t slack = round_up(reach_x, 16);  // a row is also read at x + dx, within the row or not
    float* memory = arena.take<float>(height * taps * row + 2 * slack);
    if (arena.base) std::fill(memory, memory + slack, 0.0f), std::fill(memory + slack + height * taps * row, memory + 2 * slack + height * taps * row, 0.0f);
    return arena.base ? memory + slack : nullptr;
  }
  template <class T>
  T* at(T* window, int64_t dy, int64_t dx, int64_t y) const {
    return window + (y * taps + (reach_y + dy) * side + reach_x + dx) * row;
  }
  void copy_row(const View<4>& view, int64_t b, int64_t y, float* window) const {
    for (int64_t dy = -reach_y; dy <= reach_y; ++dy)
      for (int64_t dx = -reach_x; dx <= reach_x; ++dx) {
        float* to = at(window, dy, dx, y);
        if (y + dy < 0 || y + dy >= height) {
          std::fill(to, to + row, 0.0f);
          continue;
        }
        load_row(view, b, channel(dy, dx), y, to);
        std::fill(to, to + first_x(dx), 0.0f);
        std::fill(to + end_x(dx), to + row, 0.0f);
      }
  }
  // Calls visit(dy, dx, to) for every tap of the window and stores the row that this leaves there; 0 where the tap leaves the image.
  template <class Visit>
  void write_row(const View<4>& out, int64_t b, int64_t y, Visit visit) const {
    float* to = output + thread_number() * row;
    for (int64_t dy = -radius; dy <= radius; ++dy)
      for (int64_t dx = -radius; dx <= radius; ++dx) {
        if (y + dy < 0 || y + dy >= height || std::abs(dx) > reach_x) {
          std::fill(to, to + width, 0.0f);
        } else {
          visit(dy, dx, to);
          std::fill(to, to + first_x(dx), 0.0f);
          std::fill(to + end_x(dx), to + width, 0.0f);
        }
        store_row(out, b, channel(dy, dx), y, to);
      }
  }

  // --- vectors ---

  int64_t vector_size() const { return height * line; }
  template <class T>
  T* at(T* vector, int64_t y) const {
    return vector + y * line + margin;
  }
  // The arena's memory may hold anything: what is around the numbers must be 0.
  void clear(double* vector, int64_t y) const { std::fill(vector + y * line, vector + (y + 1) * line, 0.0); }
  double* own_sums() const { return sums + thread_number() * row; }

  // --- sums ---

  // sum_j A_ij v_j for the pixels of row y; kWith: sum_j A_ij G_ij v_j.
  template <bool kWith>
  void sum_row(const float* a, const float* g, const double* vector, int64_t y, double* to) const {
    each_block([&](auto count, int64_t x) {
      constexpr int kCount = decltype(count)::value;
      vdouble sum[kCount] = {};
      for (int64_t dy = first_dy(y); dy <= last_dy(y); ++dy) {
        const double* from = at(vector, y + dy) - reach_x + x;
        const float *own = at(a, dy, -reach_x, y) + x, *with = kWith ? at(g, dy, -reach_x, y) + x : nullptr;
        for (int64_t i = 0; i < side; ++i, ++from, own += row, with += kWith ? row : 0)
#pragma GCC unroll 8
          for (int n = 0; n < kCount; ++n) {
            const vdouble value = wide(own + n * kDoubles);
            sum[n] += (kWith ? value * wide(with + n * kDoubles) : value) * load(from + n * kDoubles);
          }
      }
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) store(to + x + n * kDoubles, sum[n]);
    });
  }

  // sum_i v_i A_ij for the pixels of row y; kWith: sum_i (v_i + r_i G_ij) A_ij.
  template <bool kWith>
  void sum_column(const float* a, const float* g, const double* vector, const double* r, int64_t y, double* to) const {
    double* own_lines = lines + thread_number() * side * line;  // whose margins stay 0
    const int64_t low = std::max(-reach_y, y - height + 1), high = std::min(reach_y, y);  // from rows y - dy
    each_block([&](auto count, int64_t x) {
      constexpr int kCount = decltype(count)::value;
      for (int64_t dx = -reach_x; dx <= reach_x; ++dx) {
        vdouble sum[kCount] = {};
        for (int64_t dy = low; dy <= high; ++dy) {
          const double *factor = at(vector, y - dy) + x, *scale = kWith ? at(r, y - dy) + x : nullptr;
          const float *from = at(a, dy, dx, y - dy) + x, *with = kWith ? at(g, dy, dx, y - dy) + x : nullptr;
#pragma GCC unroll 8
          for (int n = 0; n < kCount; ++n) {
            vdouble value = load(factor + n * kDoubles);
            if (kWith) value += load(scale + n * kDoubles) * wide(with + n * kDoubles);
            sum[n] += wide(from + n * kDoubles) * value;
          }
        }
#pragma GCC unroll 8
        for (int n = 0; n < kCount; ++n) store(own_lines + (reach_x + dx) * line + margin + x + n * kDoubles, sum[n]);
      }
    });
    for (int64_t x = 0; x < row; x += kDoubles) {
      vdouble sum = {};
      for (int64_t dx = -reach_x; dx <= reach_x; ++dx) sum += load(own_lines + (reach_x + dx) * line + margin + x - dx);
      store(to + x, sum);
    }
  }

 private:
  // Calls visit(how many vectors, x) for blocks that cover a row, as even as can be.
  template <class Visit>
  void each_block(const Visit& visit) const {
    const int64_t vectors = row / kDoubles, blocks = (vectors + kMostSums - 1) / kMostSums;
    for (int64_t block = 0, first = 0; block < blocks; ++block) {
      const int64_t end = vectors * (block + 1) / blocks;
      call(visit, end - first, first * kDoubles, std::make_integer_sequence<int, kMostSums>());
      first = end;
    }
  }
  template <class Visit, int... kLess>
  static void call(const Visit& visit, int64_t count, int64_t x, std::integer_sequence<int, kLess...>) {
    ((count == kLess + 1 ? visit(std::integral_constant<int, kLess + 1>(), x) : void()), ...);
  }
};

}  // namespace AFA_ISA
}  // namespace afa
