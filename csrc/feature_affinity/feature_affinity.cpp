// Affinity of features on the CPU, forward.
//
// Data flow: features go to rows of float (FeatureRows). A thread takes up to 3 neighbouring rows of pixels against one row at or
// below them: registers sum a vector of pixels of each of the 3 with as many taps of the other row as there is room for, so that
// what is loaded serves several sums, and 64 channels after one another, whose rows stay in L1 while all taps and columns pass.
// Then the function of the sums, and a copy to the tap and to its mirror image. Nothing is computed but pairs, one half of the window,
// and what fills the last vector of a row. Each sum has one thread and one order: the same bits for any number of threads.
// Floor: N * ((2r+1)^2 + 1) / 2 * C fused multiply-adds; of "exp_l1" as many differences and sums. Bound: arithmetic.
#include "feature_affinity/feature_rows.h"

namespace afa {
namespace AFA_ISA {

constexpr int kRows = 3;
constexpr int64_t kChunk = 64;  // channels

// Taps that are summed at once, by the rows that are: sums, the pixels of the rows and of a tap fill the registers.
constexpr int most_taps(bool l1, int rows) {
#if defined(__AVX512F__)
  return rows < 3 ? 10 : l1 ? 7 : 8;
#else
  return rows == 1 ? 8 : rows == 2 ? (l1 ? 5 : 6) : (l1 ? 3 : 4);
#endif
}

// The sums of a group of rows with one row: [kRows][side][length], a column of zeros left and right for every column that a tap reaches.
struct PairSums {
  int64_t margin, length, taps;
  float *values, *slopes;  // the latter: one row
  PairSums(const FeatureRows& rows, int thread, int threads, Arena& arena)
      : margin(round_up(rows.reach_x, 16)), length(rows.vectors * kLanes + margin), taps(rows.side) {
    const int64_t count = round_up(margin + kRows * taps * length, 16), line = round_up(rows.vectors * kLanes, 16);
    values = arena.take<float>(threads * count), slopes = arena.take<float>(threads * line);
    if (!arena.base) return;
    values += thread * count, slopes += thread * line;
    std::fill(values, values + count, 0.0f);
    values += margin;
  }
  float* at(int64_t i, int64_t tap) const { return values + (i * taps + tap) * length; }
};

// Adds `channels` terms to the sums of a vector of pixels: own rows `line` apart, taps one column apart.
template <bool kL1, int kOwn, int kTaps>
static void add_terms(const float* own, const float* other, int64_t line, int64_t row, int64_t channels, float* sums, int64_t length,
                      int64_t taps) {
  vfloat sum[kOwn][kTaps];
#pragma GCC unroll 3
  for (int i = 0; i < kOwn; ++i)
#pragma GCC unroll 10
    for (int t = 0; t < kTaps; ++t) sum[i][t] = load(sums + (i * taps + t) * length);
  for (int64_t c = 0; c < channels; ++c, own += row, other += row) {
    vfloat pixels[kOwn];
#pragma GCC unroll 3
    for (int i = 0; i < kOwn; ++i) pixels[i] = load(own + i * line);
#pragma GCC unroll 10
    for (int t = 0; t < kTaps; ++t) {
      const vfloat near = rounded(load(other + t));  // into a register: each sum would read it again
#pragma GCC unroll 3
      for (int i = 0; i < kOwn; ++i) sum[i][t] += kL1 ? abs_of(pixels[i] - near) : pixels[i] * near;
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kOwn; ++i)
#pragma GCC unroll 10
    for (int t = 0; t < kTaps; ++t) store(sums + (i * taps + t) * length, sum[i][t]);
}

typedef void (*AddTerms)(const float*, const float*, int64_t, int64_t, int64_t, float*, int64_t, int64_t);
template <bool kL1, int kOwn, int... kTaps>
static AddTerms terms_for(int64_t taps, std::integer_sequence<int, kTaps...>) {
  static const AddTerms table[] = {add_terms<kL1, kOwn, kTaps + 1>...};
  return table[taps - 1];
}
template <bool kL1>
static AddTerms terms_for(int64_t own, int64_t taps) {
  if (own == 1) return terms_for<kL1, 1>(taps, std::make_integer_sequence<int, most_taps(kL1, 1)>());
  if (own == 2) return terms_for<kL1, 2>(taps, std::make_integer_sequence<int, most_taps(kL1, 2)>());
  return terms_for<kL1, 3>(taps, std::make_integer_sequence<int, most_taps(kL1, 3)>());
}

// The sums of `own` rows from y on with row `other`, taps from `first` on.
template <bool kL1>
static void sum_pairs(const FeatureRows& rows, int64_t image, int64_t y, int64_t own, int64_t other, int64_t first, const PairSums& to) {
  for (int64_t i = 0; i < own; ++i)
    for (int64_t tap = first; tap < rows.side; ++tap) std::fill(to.at(i, tap), to.at(i, tap) + rows.vectors * kLanes, 0.0f);
  const int64_t count = rows.side - first, parts = parts_of(count, most_taps(kL1, int(own)));
  for (int64_t c = 0; c < rows.channels; c += kChunk)
    for (int64_t x = 0; x < rows.vectors * kLanes; x += kLanes)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t tap = first + part * count / parts, taps = first + (part + 1) * count / parts - tap;
        terms_for<kL1>(own, taps)(rows.at(image, y, c) + x, rows.at(image, other, c) + x + tap - rows.reach_x, rows.line, rows.row,
                                  std::min(kChunk, rows.channels - c), to.at(0, tap) + x, to.length, to.taps);
      }
}

// A of a row of sums in their place; with the slopes of products.
template <PairKind kKind>
static void finish_sums(float* sums, float* slopes, int64_t count, float inverse) {
  for (int64_t x = 0; x < count; x += kLanes) {
    const vfloat sum = load(sums + x);
    if (kKind == PairKind::exp_l1) {
      store(sums + x, exp_of(-(sum * inverse)));
    } else if (kKind == PairKind::abs_dot) {
      store(slopes + x, sum > 0.0f ? splat(1.0f) : sum < 0.0f ? splat(-1.0f) : sum * 0.0f);
      store(sums + x, abs_of(sum));
    } else {
      store(slopes + x, sum <= 0.0f ? splat(0.0f) : splat(1.0f));
      store(sums + x, sum <= 0.0f ? splat(0.0f) : sum);
    }
  }
}

// From the sums of row y with row y + dy to both taps.
static void write_pairs(const FeatureArgs& args, const FeatureRows& rows, int64_t b, int64_t y, int64_t dy, int64_t i, int64_t first,
                        const PairSums& from, const View<4>& out, const View<4>& slopes) {
  const int64_t wide = rows.vectors * kLanes;
  for (int64_t tap = first; tap < rows.side; ++tap) {
    const int64_t dx = tap - rows.reach_x, begin = std::max<int64_t>(-dx, 0), end = rows.width - std::max<int64_t>(dx, 0);
    float* sums = from.at(i, tap);
    if (args.kind == PairKind::exp_l1) finish_sums<PairKind::exp_l1>(sums, from.slopes, wide, 1.0f / float(rows.channels));
    if (args.kind == PairKind::abs_dot) finish_sums<PairKind::abs_dot>(sums, from.slopes, wide, 1);
    if (args.kind == PairKind::relu_dot) finish_sums<PairKind::relu_dot>(sums, from.slopes, wide, 1);
    for (float* line : {sums, from.slopes}) std::fill(line, line + begin, 0.0f), std::fill(line + end, line + wide, 0.0f);
    store_row(out, b, rows.tap(dy, dx), y, sums);
    store_row(out, b, rows.tap(-dy, -dx), y + dy, sums - dx);
    if (slopes.data) store_row(slopes, b, rows.tap(dy, dx) - rows.middle(), y, from.slopes);
  }
}

// Zeros to the taps of row y that leave the image or reach no pixel of it.
static void clear_row(const FeatureRows& rows, int64_t b, int64_t y, float* zeros, const View<4>& out, const View<4>& slopes) {
  std::fill(zeros, zeros + rows.width, 0.0f);
  for (int64_t dy = -rows.radius; dy <= rows.radius; ++dy)
    for (int64_t dx = -rows.radius; dx <= rows.radius; ++dx) {
      if (y + dy >= 0 && y + dy < rows.height && std::abs(dx) <= rows.reach_x) continue;
      store_row(out, b, rows.tap(dy, dx), y, zeros);
      if (slopes.data && rows.tap(dy, dx) >= rows.middle()) store_row(slopes, b, rows.tap(dy, dx) - rows.middle(), y, zeros);
    }
}

int64_t feature_affinity_bytes(const FeatureArgs& args, int threads) {
  Arena arena(nullptr);
  const FeatureRows rows(args, threads, arena);
  PairSums(rows, 0, threads, arena);
  return arena.used;
}

Status feature_affinity(const FeatureArgs& args, const View<4>& out, const View<4>& slopes, void* workspace, int threads) {
  if (!fits(args, threads) || !same_images(args.features, out)) return Status::bad_argument;
  Arena arena(workspace);
  const FeatureRows rows(args, threads, arena);
  const auto sum = args.kind == PairKind::exp_l1 ? sum_pairs<true> : sum_pairs<false>;
  for_each_group(args, rows, kRows, threads, [&](int64_t b, int64_t image, int64_t y, int64_t end, int thread) {
    Arena own = arena;
    const PairSums sums(rows, thread, threads, own);
    for (int64_t i = y; i < end; ++i) clear_row(rows, b, i, sums.slopes, out, slopes);
    for (int64_t other = y; other < std::min(end + rows.reach_y, rows.height); ++other) {
      if (other < end) {  // with itself: the taps to the right
        sum(rows, image, other, 1, other, rows.reach_x, sums);
        write_pairs(args, rows, b, other, 0, 0, rows.reach_x, sums, out, slopes);
      }
      const int64_t low = std::max(y, other - rows.reach_y), high = std::min(end, other);
      if (low >= high) continue;
      sum(rows, image, low, high - low, other, 0, sums);
      for (int64_t i = low; i < high; ++i) write_pairs(args, rows, b, i, other - i, i - low, 0, sums, out, slopes);
    }
  });
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t feature_affinity_bytes(const FeatureArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status feature_affinity(const FeatureArgs& args, const View<4>& out, const View<4>& slopes, void* workspace,
                                            int threads))

int64_t feature_affinity_cpu_workspace(const FeatureArgs& args, int threads) { AFA_DISPATCH(feature_affinity_bytes, args, threads) }
Status feature_affinity_cpu(const FeatureArgs& args, const View<4>& out, const View<4>& slopes, void* workspace, int threads) {
  AFA_DISPATCH(feature_affinity, args, out, slopes, workspace, threads)
}
#endif

}  // namespace afa
