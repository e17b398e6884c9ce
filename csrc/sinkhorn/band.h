// What the CPU files of the Sinkhorn normalisation share: a window of one image, copied, and sums of its products with vectors over rows
// and over columns.
//
// The copy is [taps][H][row] float and holds 0 where a tap leaves the image. Vectors are [H][line] double with zeros around them, so that
// no load is cut short. Work is shared out in blocks of rows: a pass over one visits the planes of a dy, or of a dx, together, in each of
// them the block from front to back. Sums are kept in registers, doubles side by side along x, in the order of the taps. A sum over the
// columns is one over taps that point at a pixel: for each dx the sums over dy, which lie at the x they start from, and then these, moved
// by dx.
#pragma once

#include <algorithm>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"
#include "sinkhorn/sinkhorn.h"

namespace afa {
namespace AFA_ISA {

constexpr int kDoubles = kLanes / 2;  // to a vector
constexpr int kMostSums = 8;          // vectors that are summed up at once
constexpr int64_t kBlockPixels = 4096;  // of a block of rows; a page of memory is come back to for each block
typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef float vnarrow __attribute__((vector_size(kVectorBytes / 2)));

// GCC converts half a vector at a time if it is not told the instruction.
static inline vdouble widened(vnarrow value) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_cvtps_pd((__m256)value);
#elif defined(__AVX__)
  return (vdouble)_mm256_cvtps_pd((__m128)value);
#else
  return __builtin_convertvector(value, vdouble);
#endif
}
static inline vnarrow narrow(vdouble value) {
#if defined(__AVX512F__)
  return (vnarrow)_mm512_cvtpd_ps((__m512d)value);
#elif defined(__AVX__)
  return (vnarrow)_mm256_cvtpd_ps((__m256d)value);
#else
  return __builtin_convertvector(value, vnarrow);
#endif
}
static inline vdouble wide(const float* from) {
  vnarrow value;
  __builtin_memcpy(&value, from, sizeof value);
  return widened(value);
}
static inline vdouble load(const double* from) {
  vdouble value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
static inline void store(double* to, vdouble value) { __builtin_memcpy(to, &value, sizeof value); }
static inline void store(float* to, vnarrow value) { __builtin_memcpy(to, &value, sizeof value); }

// Rows of a tensor that lie one behind the other are loaded and stored as one.
static inline View<4> joined(View<4> view, int64_t rows) {
  view.size[3] *= rows;
  return view;
}

// The layout of one image.
struct Band {
  int64_t radius, height, width, row, reach_y, reach_x;  // reach: of the taps that can stay inside the image
  int64_t side, taps, margin, line, block, blocks;       // block: rows of it
  double *sums, *lines;                                  // [threads][block][row], [threads][block][line]
  float* output;                                         // [threads][block][row]

  Band(const SinkhornArgs& args, int threads, Arena& arena) : radius(args.radius) {
    height = args.affinity.size[2], width = args.affinity.size[3], row = round_up(width, kDoubles);
    reach_y = std::min(radius, height - 1), reach_x = std::min(radius, width - 1);
    side = 2 * reach_x + 1, taps = (2 * reach_y + 1) * side;
    margin = round_up(reach_x, kDoubles), line = row + 2 * margin;
    block = std::max<int64_t>(1, std::min(kBlockPixels / row, (height + threads - 1) / threads));
    blocks = (height + block - 1) / block;
    sums = arena.take<double>(threads * block * row);
    lines = arena.take<double>(threads * block * line);
    output = arena.take<float>(threads * block * row);
    if (arena.base) std::fill(lines, lines + threads * block * line, 0.0);
  }

  int64_t channel(int64_t dy, int64_t dx) const { return (radius + dy) * (2 * radius + 1) + radius + dx; }
  int64_t first_row(int64_t part) const { return part * block; }
  int64_t end_row(int64_t part) const { return std::min(height, (part + 1) * block); }
  // Of those rows and columns the ones whose tap stays inside.
  int64_t first_y(int64_t part, int64_t dy) const { return std::max(first_row(part), -dy); }
  int64_t end_y(int64_t part, int64_t dy) const { return std::min(end_row(part), height - dy); }
  int64_t first_x(int64_t dx) const { return std::max<int64_t>(0, -dx); }
  int64_t end_x(int64_t dx) const { return std::min(width, width - dx); }

  // --- windows ---

  float* take_window(Arena& arena) const {
    const int64_t slack = round_up(reach_x, 16), size = taps * height * row;  // rows are also read at x + dx, beyond their ends
    float* memory = arena.take<float>(size + 2 * slack);
    if (!arena.base) return nullptr;
    std::fill(memory, memory + slack, 0.0f), std::fill(memory + slack + size, memory + size + 2 * slack, 0.0f);
    return memory + slack;
  }
  float* at(float* window, int64_t dy, int64_t dx, int64_t y) const {
    return window + (((reach_y + dy) * side + reach_x + dx) * height + y) * row;
  }
  void clear_outside(float* rows, int64_t count, int64_t dx) const {
    const int64_t first = first_x(dx), end = end_x(dx);
    for (int64_t y = 0; y < count; ++y, rows += row) {
      for (int64_t x = 0; x < first; ++x) rows[x] = 0;
      for (int64_t x = end; x < row; ++x) rows[x] = 0;
    }
  }
  bool joins(const View<4>& view) const { return row == width && view.stride[2] == width * view.stride[3]; }

  void copy(const View<4>& view, int64_t b, int64_t part, float* window) const {
    const bool together = joins(view);
    for (int64_t dy = -reach_y; dy <= reach_y; ++dy)
      for (int64_t dx = -reach_x; dx <= reach_x; ++dx) {
        const int64_t first = first_y(part, dy), end = std::max(first, end_y(part, dy)), last = end_row(part);
        float* plane = at(window, dy, dx, 0);
        std::fill(plane + first_row(part) * row, plane + std::min(first, last) * row, 0.0f);
        if (together && first < end) load_row(joined(view, end - first), b, channel(dy, dx), first, plane + first * row);
        for (int64_t y = first; y < end && !together; ++y) load_row(view, b, channel(dy, dx), y, plane + y * row);
        clear_outside(plane + first * row, end - first, dx);
        if (end < last) std::fill(plane + end * row, plane + last * row, 0.0f);
      }
  }
  // Calls visit(dy, dx, y, to) for every tap and row of the block and stores what that leaves; 0 where the tap leaves the image.
  template <class Visit>
  void write(const View<4>& out, int64_t b, int64_t part, const Visit& visit) const {
    const bool together = joins(out);
    const int64_t first = first_row(part), count = end_row(part) - first;
    float* rows = output + thread_number() * block * row;
    for (int64_t dy = -radius; dy <= radius; ++dy)
      for (int64_t dx = -radius; dx <= radius; ++dx) {
        for (int64_t y = first; y < first + count; ++y) {
          float* to = rows + (y - first) * row;
          if (y + dy < 0 || y + dy >= height || std::abs(dx) > reach_x)
            std::fill(to, to + row, 0.0f);
          else
            visit(dy, dx, y, to);
        }
        if (std::abs(dx) <= reach_x) clear_outside(rows, count, dx);
        if (together) store_row(joined(out, count), b, channel(dy, dx), first, rows);
        for (int64_t y = 0; y < count && !together; ++y) store_row(out, b, channel(dy, dx), first + y, rows + y * row);
      }
  }

  // --- vectors ---

  int64_t vector_size() const { return height * line; }
  template <class T>
  T* at(T* vector, int64_t y) const {
    return vector + y * line + margin;
  }
  // The arena's memory may hold anything: what is around the numbers must be 0.
  void clear(double* vector, int64_t part) const {
    std::fill(vector + first_row(part) * line, vector + end_row(part) * line, 0.0);
  }
  double* own_sums() const { return sums + thread_number() * block * row; }

  // --- sums ---

  // sum_j A_ij v_j for the pixels of a block, [block][row]; kWith: sum_j A_ij G_ij v_j.
  template <bool kWith>
  void sum_rows(float* a, float* g, const double* vector, int64_t part, double* to) const {
    std::fill(to, to + block * row, 0.0);
    for (int64_t dy = -reach_y; dy <= reach_y; ++dy)
      for (int64_t y = first_y(part, dy); y < end_y(part, dy); ++y) {
        double* total = to + (y - first_row(part)) * row;
        const float *own = at(a, dy, -reach_x, y), *with = kWith ? at(g, dy, -reach_x, y) : nullptr;
        const double* from = at(vector, y + dy) - reach_x;
        const int64_t plane = height * row, count = side;
        each_part([&](auto vectors, int64_t x) {
          constexpr int kVectors = decltype(vectors)::value;
          vdouble sum[kVectors];
#pragma GCC unroll 8
          for (int n = 0; n < kVectors; ++n) sum[n] = load(total + x + n * kDoubles);
          for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
            for (int n = 0; n < kVectors; ++n) {
              const vdouble value = wide(own + i * plane + x + n * kDoubles);
              sum[n] += (kWith ? value * wide(with + i * plane + x + n * kDoubles) : value) * load(from + i + x + n * kDoubles);
            }
#pragma GCC unroll 8
          for (int n = 0; n < kVectors; ++n) store(total + x + n * kDoubles, sum[n]);
        });
      }
  }

  // sum_i v_i A_ij for the pixels of a block; kWith: sum_i (v_i + r_i G_ij) A_ij.
  template <bool kWith>
  void sum_columns(float* a, float* g, const double* vector, const double* r, int64_t part, double* to) const {
    double* own_lines = lines + thread_number() * block * line + margin;  // whose margins stay 0
    std::fill(to, to + block * row, 0.0);
    for (int64_t dx = -reach_x; dx <= reach_x; ++dx)
      for (int64_t y = first_row(part); y < end_row(part); ++y) {
        const int64_t low = std::max(-reach_y, y - height + 1), count = std::min(reach_y, y) - low + 1;  // from rows y - dy
        const int64_t step = side * height * row - row;
        const float *from = at(a, low, dx, y - low), *with = kWith ? at(g, low, dx, y - low) : nullptr;
        const double *factor = at(vector, y - low), *scale = kWith ? at(r, y - low) : nullptr;
        double *moved = own_lines + (y - first_row(part)) * line, *total = to + (y - first_row(part)) * row;
        const int64_t pitch = line;
        each_part([&](auto vectors, int64_t x) {
          constexpr int kVectors = decltype(vectors)::value;
          vdouble sum[kVectors] = {};
          for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
            for (int n = 0; n < kVectors; ++n) {
              vdouble value = load(factor - i * pitch + x + n * kDoubles);
              if (kWith) value += load(scale - i * pitch + x + n * kDoubles) * wide(with + i * step + x + n * kDoubles);
              sum[n] += wide(from + i * step + x + n * kDoubles) * value;
            }
#pragma GCC unroll 8
          for (int n = 0; n < kVectors; ++n) store(moved + x + n * kDoubles, sum[n]);
        });
        for (int64_t x = 0; x < row; x += kDoubles) store(total + x, load(total + x) + load(moved + x - dx));
      }
  }

 private:
  // Calls visit(how many vectors, x) for parts that cover a row, as even as can be.
  template <class Visit>
  void each_part(const Visit& visit) const {
    const int64_t vectors = row / kDoubles, parts = (vectors + kMostSums - 1) / kMostSums;
    for (int64_t part = 0, first = 0; part < parts; ++part) {
      const int64_t end = vectors * (part + 1) / parts;
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
