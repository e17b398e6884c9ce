// Affinity and its loss on the CPU, forward.
//
// Data flow, one image at a time: queries and keys go to channel-major rows of float32 (Channels), weights folded in; then, for
// each pair of image rows, tiles of up to 8 queries x 3 vectors of keys sum their products in registers, chunk of channels after
// chunk, and are finished while in L1: sigmoid, then either both mirrored taps of the window, or the pair's share of the loss, and with
// it the sigmoid's derivative if a backward will want it. Loss sums are taken row by row in a fixed order: the same bits for any number
// of threads.
// Floor: N * (2r+1)^2 * heads * d fused multiply-adds. Bound: arithmetic; a tile also computes what lies beside its band, which at
// r = 8 makes up to 1.7 times as many.
#include "affinity/band.h"

namespace afa {
namespace AFA_ISA {

// --- finishing a tile ---

template <class T>
static void write_window(const BandTile& tile, const Tiling& tiling, T* window) {
  const int64_t plane = tiling.height * tiling.width, side = tiling.side, r = side / 2;
  tiling.lines(tile, [&](const Line& at) {
    const int64_t dy = at.key_y - at.y;
    for (int64_t k = at.begin; k < at.end; ++k) {
      const int64_t dx = k - at.x;
      T* here = window + ((r + dy) * side + r + dx) * plane + at.y * tiling.width + at.x;
      from_float(at.scores[2 * k], here);
      window[((r - dy) * side + r - dx) * plane + at.key_y * tiling.width + k] = *here;
    }
  });
}

static inline int64_t count_of(vint masks) {
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count -= masks[i];
  return count;
}

// Query i's derivatives, which lie where its scores did.
static void keep_derivatives(const BandTile& tile, const Tiling& tiling, int64_t i, const Derivatives& to) {
  for (int64_t parity = 0; parity < 2; ++parity) {
    const Line at = tiling.line(tile, i, parity);
    if (at.begin >= at.end) continue;
    float* row = to.row(at.y, at.x, at.key_y - at.y) - at.x;
    for (int64_t k = at.begin; k < at.end; ++k) row[k] = at.scores[2 * k];
  }
}

// Adds the tile's pairs, both orders of each, to the sums of its rows, and keeps their derivatives if asked.
static void add_pairs(const BandTile& tile, const Tiling& tiling, const LaneLabels& labels, float bias, PairSums* sums,
                      const Derivatives* kept) {
  vfloat same = {}, different = {};
  vint same_count = {}, different_count = {};
  for (int64_t i = 0; i < 2 * tile.columns; ++i) {
    if (labels.values[tile.y * labels.row + 2 * tile.x + i] < 0) continue;
    float* scores = tile.scores + i * tile.stride;
    if (tile.below == 0) {  // a pixel's pair with itself comes once
      sums->same -= Sigmoids(splat(scores[2 * (tile.x - tile.first) + i]) + bias).negated[0];
      sums->same_count -= 1;
    }
    labelled_lanes(tile, tiling, labels, i, [&](int64_t lane, vint is_same, vint is_different) {
      // A of pairs with different labels, and, for those with the same one, 1 - A: that of the score with its sign changed.
      const vint sign = is_same & INT32_MIN;
      const Sigmoids of((vfloat)((vint)(load(scores + lane) + bias) ^ sign));
      const vint term = (vint)of.value;
      same += (vfloat)(term & is_same), different += (vfloat)(term & is_different);
      same_count += is_same, different_count += is_different;
      if (kept) store(scores + lane, (vfloat)(((vint)of.slope & (is_same | is_different)) | sign));
    });
    if (kept) keep_derivatives(tile, tiling, i, *kept);
  }
  sums->same += 2.0 * sum_of(same), sums->different += 2.0 * sum_of(different);
  sums->same_count += 2 * count_of(same_count), sums->different_count += 2 * count_of(different_count);
}

template <class T, class Fill>
static void window_of(const Tiling& tiling, int64_t b, float bias, T* out, float* buffers, int threads, const Fill& fill) {
  T* window = out + b * tiling.side * tiling.side * tiling.height * tiling.width;
  for_each_tile(tiling, buffers, threads, fill, [&](const BandTile& tile) {
    for (int64_t i = 0; i < 2 * tile.columns; ++i)
      for (int64_t lane = 0; lane < 2 * tile.keys; lane += kLanes) {
        float* at = tile.scores + i * tile.stride + lane;
        store(at, Sigmoids(load(at) + bias).value);
      }
    write_window(tile, tiling, window);
  });
}

// `out` is contiguous. Taps that leave the image are not visited and must be 0.
template <class Fill>
static void window_of_any(const Tiling& tiling, int64_t b, float bias, const View<4>& out, float* buffers, int threads,
                          const Fill& fill) {
  switch (out.dtype) {
    case DType::f32: return window_of(tiling, b, bias, static_cast<float*>(out.data), buffers, threads, fill);
    case DType::f16: return window_of(tiling, b, bias, static_cast<F16*>(out.data), buffers, threads, fill);
    case DType::bf16: return window_of(tiling, b, bias, static_cast<Bf16*>(out.data), buffers, threads, fill);
  }
}

static Status clear(const View<4>& out) {
  const int64_t bytes = contiguous_bytes(out);
  if (bytes < 0) return Status::bad_argument;
  std::memset(out.data, 0, bytes);
  return Status::ok;
}

// --- from queries and keys ---

static bool fits(const AttentionArgs& args, int threads) {
  if (!same_size(args.query, args.key) || is_empty(args.query)) return false;
  return args.query.size[2] == args.height * args.width && args.radius >= 0 && threads > 0;
}

int64_t attention_bytes(const AttentionArgs& args, int threads) {
  Arena arena(nullptr);
  const Tiling tiling(args.height, args.width, args.radius);
  Channels(args, arena, threads);
  arena.take<float>(threads * tiling.floats());
  arena.take<PairSums>(tiling.pairs);
  LaneLabels(tiling, arena);
  return arena.used;
}

Status window_from_attention(const AttentionArgs& args, const View<4>& out, void* workspace, int threads) {
  if (!fits(args, threads) || clear(out) != Status::ok) return Status::bad_argument;
  Arena arena(workspace);
  const Channels channels(args, arena, threads);
  const Tiling tiling(args.height, args.width, args.radius);
  float* buffers = arena.take<float>(threads * tiling.floats());
  for (int64_t b = 0; b < args.query.size[0]; ++b) {
    pack_channels(args, b, channels, threads);
    window_of_any(tiling, b, args.head_bias, out, buffers, threads,
                  [&](int64_t y, float* row) { fill_products(channels, tiling, y, row); });
  }
  return Status::ok;
}

Status loss_from_attention(const AttentionArgs& args, const int32_t* labels, PairSums* sums, float* kept, void* workspace, int threads) {
  if (!fits(args, threads)) return Status::bad_argument;
  Arena arena(workspace);
  const Channels channels(args, arena, threads);
  const Tiling tiling(args.height, args.width, args.radius);
  float* buffers = arena.take<float>(threads * tiling.floats());
  PairSums* rows = arena.take<PairSums>(tiling.pairs);
  const LaneLabels lanes(tiling, arena);
  *sums = PairSums();
  for (int64_t b = 0; b < args.query.size[0]; ++b) {
    lanes.load(labels + b * args.height * args.width, tiling);
    pack_channels(args, b, channels, threads);
    std::fill(rows, rows + tiling.pairs, PairSums());
    const Derivatives derivatives(tiling, kept ? kept + b * Derivatives::size(tiling) : nullptr);
    if (kept) std::fill_n(derivatives.values, Derivatives::size(tiling), 0.0f);
    for_each_tile(
        tiling, buffers, threads, [&](int64_t y, float* row) { fill_products(channels, tiling, y, row); },
        [&](const BandTile& tile) { add_pairs(tile, tiling, lanes, args.head_bias, rows + tile.y, kept ? &derivatives : nullptr); });
    for (int64_t y = 0; y < tiling.pairs; ++y) add_sums(rows[y], sums);
  }
  return Status::ok;
}

// --- from score maps ---

int64_t maps_bytes(const MapsArgs& args, int threads) {
  Arena arena(nullptr);
  const Tiling tiling(args.height, args.width, args.radius);
  arena.take<float>(threads * tiling.floats());
  arena.take<float>(threads * tiling.stride);
  return arena.used;
}

Status window_from_maps(const MapsArgs& args, const View<4>& out, void* workspace, int threads) {
  if (args.maps.size[2] != args.height * args.width || args.maps.size[3] != args.height * args.width || args.radius < 0 ||
      threads < 1 || clear(out) != Status::ok)
    return Status::bad_argument;
  Arena arena(workspace);
  const Tiling tiling(args.height, args.width, args.radius);
  float* buffers = arena.take<float>(threads * tiling.floats());
  float* lines = arena.take<float>(threads * tiling.stride);
  for (int64_t b = 0; b < args.maps.size[0]; ++b)
    window_of_any(tiling, b, args.head_bias, out, buffers, threads,
                  [&](int64_t y, float* row) { fill_maps(args, b, tiling, y, lines, row); });
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t attention_bytes(const AttentionArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status window_from_attention(const AttentionArgs& args, const View<4>& out, void* workspace, int threads))
AFA_DECLARE_PER_ISA(Status loss_from_attention(const AttentionArgs& args, const int32_t* labels, PairSums* sums, float* kept,
                                               void* workspace, int threads))
AFA_DECLARE_PER_ISA(int64_t maps_bytes(const MapsArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status window_from_maps(const MapsArgs& args, const View<4>& out, void* workspace, int threads))

int64_t window_affinity_cpu_workspace(const AttentionArgs& args, int threads) {
  AFA_DISPATCH(attention_bytes, args, threads)
}
Status window_affinity_cpu(const AttentionArgs& args, const View<4>& out, void* workspace, int threads) {
  AFA_DISPATCH(window_from_attention, args, out, workspace, threads)
}
Status attention_affinity_loss_cpu(const AttentionArgs& args, const int32_t* labels, PairSums* sums, float* kept, void* workspace,
                                   int threads) {
  AFA_DISPATCH(loss_from_attention, args, labels, sums, kept, workspace, threads)
}
int64_t affinity_from_maps_cpu_workspace(const MapsArgs& args, int threads) { AFA_DISPATCH(maps_bytes, args, threads) }
Status affinity_from_maps_cpu(const MapsArgs& args, const View<4>& out, void* workspace, int threads) {
  AFA_DISPATCH(window_from_maps, args, out, workspace, threads)
}
#endif

}  // namespace afa
