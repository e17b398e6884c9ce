// Affinity of features on the CPU, backward.
//
//   dL/df_i = sum_j w_ij f_j   or   sum_j w_ij sign(f_i - f_j),        w_ij = (G_ij + G_ji) dA_ij/ds_ij
//
// Data flow: features go to rows of float (FeatureRows). A thread takes 2 neighbouring rows of pixels (of "exp_l1" one) and looks up
// their w, a vector of pixels behind the other, 0 where a tap leaves the image. Then registers sum a vector of pixels of several
// channels over the taps in 4 rows at a time, whose w stay in L1 while all channels pass: what is loaded of w serves all channels, what
// is loaded of f both rows. Rows that only one of them reaches it takes alone, so that nothing which is no finite number gets further
// than its window. Each sum has one thread and one order: the same bits for any number of threads.
// Floor: N * (2r+1)^2 * C fused multiply-adds; of "exp_l1" as many differences, signs and sums. Bound: arithmetic.
#include "feature_affinity/feature_rows.h"

namespace afa {
namespace AFA_ISA {

constexpr int64_t kNearRows = 4;  // at a time

constexpr int most_rows(bool l1) { return l1 ? 1 : 2; }
constexpr int most_channels(bool l1) {
#if defined(__AVX512F__)
  return l1 ? 8 : 12;
#else
  return l1 ? 4 : 6;
#endif
}

// w sign(d), bit by bit: where w is 0, what d is does not matter.
static inline vfloat with_sign_of(vfloat w, vfloat d) {
  return (vfloat)(((vint)w ^ ((vint)d & INT32_MIN)) & ~(vint)(d == 0.0f));
}

// What a thread keeps of its rows y..end-1.
struct GroupMemory {
  int64_t own, near, wide;
  float* weights;  // [vectors][near][side][own][kLanes], only the rows within reach of `near` one behind the other
  float* sums;     // [own][C][wide]
  float* lines;    // [4][wide]
  GroupMemory(const FeatureRows& rows, int64_t most, int thread, int threads, Arena& arena)
      : own(std::min(most, rows.height)), near(std::min(own + 2 * rows.reach_y, rows.height)), wide(rows.vectors * kLanes) {
    const int64_t of_weights = rows.vectors * near * rows.side * own * kLanes, of_sums = own * rows.channels * wide;
    weights = arena.take<float>(threads * round_up(of_weights, 16));
    sums = arena.take<float>(threads * round_up(of_sums, 16));
    lines = arena.take<float>(threads * round_up(4 * wide, 16));
    if (!arena.base) return;
    weights += thread * round_up(of_weights, 16), sums += thread * round_up(of_sums, 16), lines += thread * round_up(4 * wide, 16);
  }
  float* weight(const FeatureRows& rows, int64_t vector, int64_t row) const {
    return weights + (vector * near + row) * rows.side * own * kLanes;
  }
};

// Which rows of y..end-1 are within reach of row `near`.
struct Reached {
  int64_t low, high;
  Reached(const FeatureRows& rows, int64_t y, int64_t end, int64_t near)
      : low(std::max(y, near - rows.reach_y)), high(std::min(end, near + rows.reach_y + 1)) {}
  bool operator==(const Reached& other) const { return low == other.low && high == other.high; }
};

// A row of float: in place, or in `line`.
static inline const float* row_at(const View<4>& view, int64_t b, int64_t c, int64_t y, float* line) {
  if (view.dtype == DType::f32 && view.stride[3] == 1)
    return static_cast<const float*>(view.data) + b * view.stride[0] + c * view.stride[1] + y * view.stride[2];
  load_row(view, b, c, y, line);
  return line;
}

// w of row y towards row y + dy, for all taps there; `to` is the first's, the next lies `step` behind it.
static void look_up(const FeatureRows& rows, const View<4>& slopes, const View<4>& grad, int64_t b, int64_t y, int64_t dy, float factor,
                    const GroupMemory& memory, float* to, int64_t step) {
  const int64_t wide = memory.wide, next = memory.near * rows.side * memory.own * kLanes;
  float* weights = memory.lines + 3 * wide;
  for (int64_t tap = 0; tap < rows.side; ++tap, to += step) {
    const int64_t dx = tap - rows.reach_x, here = rows.tap(dy, dx) - rows.middle(), end = rows.width - std::max<int64_t>(dx, 0);
    const float* own = row_at(grad, b, rows.tap(dy, dx), y, memory.lines);
    const float* mirrored = row_at(grad, b, rows.tap(-dy, -dx), y + dy, memory.lines + wide) + dx;
    const float* slope = here >= 0 ? row_at(slopes, b, here, y, memory.lines + 2 * wide)
                                   : row_at(slopes, b, -here, y + dy, memory.lines + 2 * wide) + dx;
    std::fill(weights, weights + wide, 0.0f);
    for (int64_t x = std::max<int64_t>(-dx, 0); x < end; ++x) weights[x] = (own[x] + mirrored[x]) * slope[x] * factor;
    for (int64_t vector = 0; vector < rows.vectors; ++vector) store(to + vector * next, load(weights + vector * kLanes));
  }
}

// Adds the taps of some rows to the sums of a vector of pixels in kOwn rows and kChannels channels.
template <bool kL1, int kOwn, int kChannels>
static void add_taps(const FeatureRows& rows, const float* weight, int64_t weight_step, const float* own, const float* near, int64_t count,
                     float* sums, int64_t sums_row, int64_t sums_channel) {
  vfloat sum[kOwn][kChannels], pixel[kOwn][kChannels];
#pragma GCC unroll 2
  for (int i = 0; i < kOwn; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChannels; ++c) {
      sum[i][c] = load(sums + i * sums_row + c * sums_channel);
      if (kL1) pixel[i][c] = load(own + i * rows.line + c * rows.row);
    }
  for (int64_t k = 0; k < count; ++k, weight += weight_step, near += rows.line)
    for (int64_t tap = 0; tap < rows.side; ++tap) {
      vfloat share[kOwn];
#pragma GCC unroll 2
      for (int i = 0; i < kOwn; ++i) share[i] = load(weight + (tap * kOwn + i) * kLanes);
#pragma GCC unroll 12
      for (int c = 0; c < kChannels; ++c) {
        const vfloat value = rounded(load(near + c * rows.row + tap));  // into a register: each sum would read it again
#pragma GCC unroll 2
        for (int i = 0; i < kOwn; ++i) sum[i][c] += kL1 ? with_sign_of(share[i], pixel[i][c] - value) : share[i] * value;
      }
    }
#pragma GCC unroll 2
  for (int i = 0; i < kOwn; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChannels; ++c) store(sums + i * sums_row + c * sums_channel, sum[i][c]);
}

typedef void (*AddTaps)(const FeatureRows&, const float*, int64_t, const float*, const float*, int64_t, float*, int64_t, int64_t);
template <bool kL1, int kOwn, int... kChannels>
static AddTaps taps_for(int64_t channels, std::integer_sequence<int, kChannels...>) {
  static const AddTaps table[] = {add_taps<kL1, kOwn, kChannels + 1>...};
  return table[channels - 1];
}
template <bool kL1>
static AddTaps taps_for(int64_t own, int64_t channels) {
  constexpr auto counts = std::make_integer_sequence<int, most_channels(kL1)>();
  return own == 1 ? taps_for<kL1, 1>(channels, counts) : taps_for<kL1, most_rows(kL1)>(channels, counts);
}

// The gradients of rows y..end-1 from their w.
template <bool kL1>
static void sum_taps(const FeatureRows& rows, int64_t image, int64_t y, int64_t end, int64_t first, int64_t last,
                     const GroupMemory& memory) {
  const int64_t parts = parts_of(rows.channels, most_channels(kL1)), row_sums = rows.channels * memory.wide;
  std::fill(memory.sums, memory.sums + (end - y) * row_sums, 0.0f);
  for (int64_t near = first, next; near < last; near = next) {
    const Reached reached(rows, y, end, near);
    for (next = near + 1; next < std::min(last, near + kNearRows) && Reached(rows, y, end, next) == reached;) ++next;
    for (int64_t vector = 0; vector < rows.vectors; ++vector)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t c = part * rows.channels / parts, channels = (part + 1) * rows.channels / parts - c, x = vector * kLanes;
        taps_for<kL1>(reached.high - reached.low, channels)(
            rows, memory.weight(rows, vector, near - first), rows.side * memory.own * kLanes, rows.at(image, reached.low, c) + x,
            rows.at(image, near, c) + x - rows.reach_x, next - near, memory.sums + (reached.low - y) * row_sums + c * memory.wide + x,
            row_sums, memory.wide);
      }
  }
}

int64_t feature_affinity_backward_bytes(const FeatureArgs& args, int threads) {
  Arena arena(nullptr);
  const FeatureRows rows(args, threads, arena);
  GroupMemory(rows, most_rows(args.kind == PairKind::exp_l1), 0, threads, arena);
  return arena.used;
}

Status feature_affinity_backward(const FeatureArgs& args, const View<4>& slopes, const View<4>& grad, const View<4>& out, void* workspace,
                                 int threads) {
  if (!fits(args, threads) || !same_images(args.features, grad) || !same_images(grad, slopes)) return Status::bad_argument;
  if (!same_size(args.features, out) || slopes.size[1] != (grad.size[1] + 1) / 2) return Status::bad_argument;
  const bool l1 = args.kind == PairKind::exp_l1;
  Arena arena(workspace);
  const FeatureRows rows(args, threads, arena);
  const float factor = l1 ? -1.0f / float(rows.channels) : 1.0f;
  for_each_group(args, rows, most_rows(l1), threads, [&](int64_t b, int64_t image, int64_t y, int64_t end, int thread) {
    Arena own = arena;
    const GroupMemory memory(rows, most_rows(l1), thread, threads, own);
    const int64_t first = std::max<int64_t>(y - rows.reach_y, 0), last = std::min(end + rows.reach_y, rows.height);
    for (int64_t near = first; near < last; ++near) {
      const Reached reached(rows, y, end, near);
      for (int64_t i = reached.low; i < reached.high; ++i)
        look_up(rows, slopes, grad, b, i, near - i, factor, memory, memory.weight(rows, 0, near - first) + (i - reached.low) * kLanes,
                (reached.high - reached.low) * kLanes);
    }
    l1 ? sum_taps<true>(rows, image, y, end, first, last, memory) : sum_taps<false>(rows, image, y, end, first, last, memory);
    for (int64_t i = y; i < end; ++i)
      for (int64_t c = 0; c < rows.channels; ++c) store_row(out, b, c, i, memory.sums + ((i - y) * rows.channels + c) * memory.wide);
  });
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t feature_affinity_backward_bytes(const FeatureArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status feature_affinity_backward(const FeatureArgs& args, const View<4>& slopes, const View<4>& grad,
                                                     const View<4>& out, void* workspace, int threads))

int64_t feature_affinity_backward_cpu_workspace(const FeatureArgs& args, int threads) {
  AFA_DISPATCH(feature_affinity_backward_bytes, args, threads)
}
Status feature_affinity_backward_cpu(const FeatureArgs& args, const View<4>& slopes, const View<4>& grad, const View<4>& grad_features,
                                     void* workspace, int threads) {
  AFA_DISPATCH(feature_affinity_backward, args, slopes, grad, grad_features, workspace, threads)
}
#endif

}  // namespace afa
