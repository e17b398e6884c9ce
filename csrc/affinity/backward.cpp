// Affinity on the CPU, backward.
//
// Data flow, one image at a time. First G_ij = dL/dz_ij + dL/dz_ji for every pair of the window (gradients.h): from what the fused loss
// has kept, or by computing the scores again (a sigmoid that has been rounded no longer tells its slope), from the loss or from the
// gradient of a window. Then, since z = u v^T + bias,
//   dL/dq_h = w_h G k_h,   dL/dk_h = w_h G q_h,   dL/dw_h = sum q_h . (G k_h),   dL/dbias = 1/2 sum G :
// each thread takes up to 4 vectors of one head's channels at a time, copies them for all pixels (which then stay in L2), and
// sums 6 pixels' gradients in registers over their joint window; G is 0 in the margins, where a pixel's neighbour has run ahead.
// A query or key that is no finite number counts as 0 there, lest 0 times it reach pixels outside its window, or, where its label is
// ignored, any: the pairs that it does count in have a G that is NaN, or 0 at the sigmoid's ends.
// Floor: 2 * N * (2r+1)^2 * heads * d fused multiply-adds, beside the forward's where the scores are computed again. Bound: arithmetic.
#include "affinity/gradients.h"

namespace afa {
namespace AFA_ISA {

#if defined(__AVX512F__)
constexpr int kBackVectors = 4;
#else
constexpr int kBackVectors = 2;
#endif
constexpr int kPanel = kBackVectors * kLanes;  // channels of one head that a thread takes at a time

// --- G times queries or keys ---

template <int kQueries>
static void multiply_tile(const PairGradients& from, int64_t y, int64_t x, const float* panel, float* out) {
  const int64_t step = from.side * from.row - 1;  // to the next query's gradient at the same key
  const int64_t low = std::max(x - from.radius, int64_t(0)), high = std::min(x + kQueries + from.radius, from.width);
  vfloat sum[kQueries][kBackVectors] = {};
  for (int64_t dy = std::max(-from.radius, -y); dy <= std::min(from.radius, from.height - 1 - y); ++dy) {
    const float* gradient = from.at(y, x, dy) - x;
    const float* values = panel + (y + dy) * from.width * kPanel;
    for (int64_t key = low; key < high; ++key) {
      vfloat value[kBackVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kBackVectors; ++v) value[v] = load(values + key * kPanel + v * kLanes);
#pragma GCC unroll 6
      for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < kBackVectors; ++v) sum[q][v] += gradient[q * step + key] * value[v];
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < kQueries; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < kBackVectors; ++v) store(out + q * kPanel + v * kLanes, sum[q][v]);
}

typedef void (*MultiplyTile)(const PairGradients&, int64_t, int64_t, const float*, float*);
static const MultiplyTile kMultiply[] = {nullptr,          multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                         multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// One thread's share: channels [begin, begin + count) of one head, of the gradient of the queries or of the keys.
struct Share {
  bool of_query;
  int64_t head, begin, count;
  Share(const AttentionArgs& args, int64_t number) {
    const int64_t panels = (args.query.size[3] + kPanel - 1) / kPanel;
    of_query = number / (panels * args.query.size[1]) == 0;
    head = number / panels % args.query.size[1];
    begin = number % panels * kPanel;
    count = std::min<int64_t>(args.query.size[3] - begin, kPanel);
  }
  static int64_t total(const AttentionArgs& args) {
    return 2 * args.query.size[1] * ((args.query.size[3] + kPanel - 1) / kPanel);
  }
};

static inline vfloat finite_or_zero(vfloat value) {
  const vint exponent = (vint)value & 0x7f800000;
  return (vfloat)((vint)value & (exponent != 0x7f800000));
}
static bool all_finite(const float* values, int64_t count) {
  vint odd = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) odd |= ((vint)load(values + i) & 0x7f800000) == 0x7f800000;
  for (; i < count; ++i) odd[0] |= (to_bits(values[i]) & 0x7f800000u) == 0x7f800000u;
  int32_t any = 0;
  for (int l = 0; l < kLanes; ++l) any |= odd[l];
  return any == 0;
}

// Returns this share's part of the head weight's gradient. `panel` [N][kPanel], `lines` [kBackQueries + 1][kPanel].
static double multiply_share(const AttentionArgs& args, const PairGradients& from, const Share& share, int64_t b,
                             const View<4>& out, float* panel, float* lines) {
  const View<4> other = line_of(share.of_query ? args.key : args.query, share.begin, share.count);
  const View<4> own = line_of(args.query, share.begin, share.count);
  const View<4> to = out.data ? line_of(out, share.begin, share.count) : out;
  float *result = lines, *line = lines + kBackQueries * kPanel;
  const int64_t pixels = from.height * from.width;
  const float* values = panel;
  bool in_place = other.dtype == DType::f32 && other.stride[3] == 1 && other.stride[2] == kPanel && share.count == kPanel;
  if (in_place) {
    values = static_cast<const float*>(other.data) + b * other.stride[0] + share.head * other.stride[1];
    in_place = all_finite(values, pixels * kPanel);
  }
  if (!in_place) {
    values = panel;
    for (int64_t n = 0; n < pixels; ++n) {
      float* row = panel + n * kPanel;
      std::fill(row + share.count, row + kPanel, 0.0f);
      load_row(other, b, share.head, n, row);
      for (int64_t c = 0; c < kPanel; c += kLanes) store(row + c, finite_or_zero(load(row + c)));
    }
  }
  std::fill(line, line + kPanel, 0.0f);
  const int64_t tiles = (from.width + kBackQueries - 1) / kBackQueries, queries = (from.width + tiles - 1) / tiles;
  double dot = 0;
  for (int64_t y = 0; y < from.height; ++y)
    for (int64_t x = 0; x < from.width; x += queries) {
      const int64_t count = std::min(queries, from.width - x);
      kMultiply[count](from, y, x, values, result);
      for (int64_t q = 0; q < count; ++q) {
        float* sums = result + q * kPanel;
        if (share.of_query) {
          load_row(own, b, share.head, y * from.width + x + q, line);
          vfloat products = {};
          for (int64_t c = 0; c < kPanel; c += kLanes) products += finite_or_zero(load(line + c)) * load(sums + c);
          dot += sum_of(products);
        }
        if (!to.data) continue;
        for (int64_t c = 0; c < kPanel; c += kLanes) store(sums + c, load(sums + c) * args.head_weight[share.head]);
        store_row(to, b, share.head, y * from.width + x + q, sums);
      }
    }
  return dot;
}

static void multiply(const AttentionArgs& args, const PairGradients& from, int64_t b, const AttentionGradients& out, Arena arena,
                     int threads) {
  const int64_t shares = Share::total(args), pixels = from.height * from.width;
  float* panels = arena.take<float>(threads * pixels * kPanel);
  float* lines = arena.take<float>(threads * (kBackQueries + 1) * kPanel);
  double* dots = arena.take<double>(shares);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t number = 0; number < shares; ++number) {
    const Share share(args, number);
    const View<4>& to = share.of_query ? out.query : out.key;
    dots[number] = 0;
    if (to.data || (share.of_query && out.head))
      dots[number] = multiply_share(args, from, share, b, to, panels + thread_number() * pixels * kPanel,
                                    lines + thread_number() * (kBackQueries + 1) * kPanel);
  }
  if (!out.head) return;
  for (int64_t number = 0; number < shares; ++number) out.head[Share(args, number).head] += dots[number];
  for (int64_t y = 0; y < from.height; ++y) out.head[args.query.size[1]] += 0.5 * from.sums[y];
}

// The two phases use the same memory one after the other.
int64_t backward_bytes(const AttentionArgs& args, int threads) {
  const Tiling tiling(args.height, args.width, args.radius);
  Arena first(nullptr), second(nullptr);
  PairGradients(tiling, first), PairGradients(tiling, second);
  Channels(args, first, threads);
  LaneLabels(tiling, first);
  first.take<float>(threads * tiling.floats());
  first.take<float>(threads * 2 * args.width);
  second.take<float>(threads * args.height * args.width * kPanel);
  second.take<float>(threads * (kBackQueries + 1) * kPanel);
  second.take<double>(Share::total(args));
  return std::max(first.used, second.used);
}

Status backward_of_attention(const AttentionArgs& args, const PairGradient& gradient, const AttentionGradients& out,
                             void* workspace, int threads) {
  if (args.query.size[2] != args.height * args.width || args.radius < 0 || threads < 1) return Status::bad_argument;
  const Tiling tiling(args.height, args.width, args.radius);
  Arena arena(workspace);
  const PairGradients pairs(tiling, arena);
  if (out.head) std::fill(out.head, out.head + args.query.size[1] + 1, 0.0);
  for (int64_t b = 0; b < args.query.size[0]; ++b) {
    Arena rest = arena;
    const Channels channels(args, rest, threads);
    const LaneLabels labels(tiling, rest);
    float *buffers = rest.take<float>(threads * tiling.floats()), *lines = rest.take<float>(threads * 2 * args.width);
    const auto fill = [&](int64_t y, float* row) { fill_products(channels, tiling, y, row); };
    pairs.clear();
    if (gradient.kept) {
      const Derivatives kept(tiling, const_cast<float*>(gradient.kept) + b * Derivatives::size(tiling));
      pair_gradients_of_kept(kept, gradient, tiling, pairs, threads);
      pairs.add_up(threads);
      multiply(args, pairs, b, out, arena, threads);
      continue;
    }
    pack_channels(args, b, channels, threads);
    if (gradient.labels) {
      labels.load(gradient.labels + b * args.height * args.width, tiling);
      for_each_tile(tiling, buffers, threads, fill, [&](const BandTile& tile) {
        pair_gradients_of_loss(tile, tiling, labels, gradient, args.head_bias, pairs);
      });
    } else {
      pair_gradients_of_window(gradient.grad_window, b, args.head_bias, tiling, pairs, buffers, lines, threads, fill);
    }
    pairs.add_up(threads);
    multiply(args, pairs, b, out, arena, threads);
  }
  return Status::ok;
}

// --- of score maps ---

// Floats of a thread's lines, which hold a tile's, then two rows of pixels, then two images.
static int64_t maps_line(const Tiling& tiling) { return std::max(tiling.stride, 2 * tiling.height * tiling.width); }

int64_t maps_backward_bytes(const MapsArgs& args, int threads) {
  const Tiling tiling(args.height, args.width, args.radius);
  Arena arena(nullptr);
  PairGradients(tiling, arena);
  arena.take<float>(threads * tiling.floats());
  arena.take<float>(threads * maps_line(tiling));
  arena.take<double>(args.height * args.maps.size[1]);
  return arena.used;
}

// dL/dS_h,ij = w_h G_ij and dL/dw_h = sum G_ij S_h,ij, for the queries of image row y; `lines` holds 2 N floats.
static void maps_row(const MapsArgs& args, const PairGradients& from, int64_t b, int64_t y, const View<4>& out, double* dots,
                     float* lines) {
  const int64_t pixels = from.height * from.width;
  float *dense = lines, *line = lines + pixels;
  for (int64_t x = 0; x < from.width; ++x) {
    const int64_t low = std::max(x - from.radius, int64_t(0)), high = std::min(x + from.radius + 1, from.width);
    const int64_t top = std::max(y - from.radius, int64_t(0)), bottom = std::min(y + from.radius + 1, from.height);
    std::fill(dense, dense + pixels, 0.0f);
    for (int64_t head = 0; head < args.maps.size[1]; ++head) {
      for (int64_t row = top; row < bottom; ++row) {
        const float* gradient = from.at(y, x, row - y) - x;
        load_row(line_of(args.maps, row * from.width + low, high - low), b, head, y * from.width + x, line);
        float part = 0;
        for (int64_t k = low; k < high; ++k) {
          part += gradient[k] != 0 ? gradient[k] * line[k - low] : 0.0f;  // an infinite score's gradient is 0
          dense[row * from.width + k] = gradient[k] * args.head_weight[head];
        }
        dots[head] += part;
      }
      if (out.data) store_row(out, b, head, y * from.width + x, dense);
    }
  }
}

Status backward_of_maps(const MapsArgs& args, const PairGradient& gradient, const View<4>& grad_maps, double* head, void* workspace,
                        int threads) {
  if (args.maps.size[2] != args.height * args.width || gradient.labels || threads < 1) return Status::bad_argument;
  const Tiling tiling(args.height, args.width, args.radius);
  const int64_t heads = args.maps.size[1], line = maps_line(tiling);
  Arena arena(workspace);
  const PairGradients pairs(tiling, arena);
  float* buffers = arena.take<float>(threads * tiling.floats());
  float* lines = arena.take<float>(threads * line);
  double* dots = arena.take<double>(args.height * heads);
  std::fill(head, head + heads + 1, 0.0);
  for (int64_t b = 0; b < args.maps.size[0]; ++b) {
    pairs.clear();
    std::fill(dots, dots + args.height * heads, 0.0);
    pair_gradients_of_window(gradient.grad_window, b, args.head_bias, tiling, pairs, buffers, lines, threads,
                             [&](int64_t y, float* row) { fill_maps(args, b, tiling, y, lines, row); });
    pairs.add_up(threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t y = 0; y < args.height; ++y)
      maps_row(args, pairs, b, y, grad_maps, dots + y * heads, lines + thread_number() * line);
    for (int64_t y = 0; y < args.height; ++y) {
      for (int64_t h = 0; h < heads; ++h) head[h] += dots[y * heads + h];
      head[heads] += 0.5 * pairs.sums[y];
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t backward_bytes(const AttentionArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status backward_of_attention(const AttentionArgs& args, const PairGradient& gradient,
                                                 const AttentionGradients& out, void* workspace, int threads))
AFA_DECLARE_PER_ISA(int64_t maps_backward_bytes(const MapsArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status backward_of_maps(const MapsArgs& args, const PairGradient& gradient, const View<4>& grad_maps,
                                            double* head, void* workspace, int threads))

int64_t attention_backward_cpu_workspace(const AttentionArgs& args, int threads) { AFA_DISPATCH(backward_bytes, args, threads) }
Status attention_backward_cpu(const AttentionArgs& args, const PairGradient& gradient, const AttentionGradients& out,
                              void* workspace, int threads) {
  AFA_DISPATCH(backward_of_attention, args, gradient, out, workspace, threads)
}
int64_t affinity_from_maps_backward_cpu_workspace(const MapsArgs& args, int threads) {
  AFA_DISPATCH(maps_backward_bytes, args, threads)
}
Status affinity_from_maps_backward_cpu(const MapsArgs& args, const PairGradient& gradient, const View<4>& grad_maps, double* head,
                                       void* workspace, int threads) {
  AFA_DISPATCH(backward_of_maps, args, gradient, grad_maps, head, workspace, threads)
}
#endif

}  // namespace afa
