// The bilateral filter as the sum that it is, on the CPU.
//
// Data flow, one image at a time: pixels are put in an order in which tiles of 64 are compact in (x, y, r, g, b), their values side by
// side. A tile then meets every other: from the boxes around both follows the most that a weight can be, and the farthest are left
// out as long as all of them together stay under 1e-6 of what the tile's weights add up to at least. For the others weights of 64 x 64 pairs
// go to a table in cache, vectors of pixels at a time (differences are squared, not squares subtracted: no digits are lost),
// and the table times the values is a small matrix product. Tiles add up in order: the same bits for any number of threads.
// Floor: pairs * (one exponential + K fused multiply-adds). Bound: these.
#include <cmath>

#include "bilateral/bilateral.h"
#include "bilateral/lattice_filter.h"

namespace afa {
namespace AFA_ISA {

constexpr int64_t kTile = 64;
constexpr int kFeatures = 5;
constexpr float kLeftOut = 1e-6f;
constexpr int kBins = 128;  // of half the squared distance: exp(-87.3) is the least that exp_of gives

struct Box {
  float low[kFeatures], high[kFeatures];
};

struct Exact {
  const BilateralArgs& args;
  int64_t height, width, count, tiles, channels, row;
  float* features;  // [tiles][5][64]
  Box* boxes;       // [tiles]
  int32_t* order;   // [tiles * 64]
  float* points;    // [N][5]
  float *values, *sums, *lines;  // [tiles * 64][row] twice, [threads][W]
  float* tables;    // [threads][64][64]
  int16_t* bins;    // [threads][tiles]
  int64_t* met;     // [tiles]

  Exact(const BilateralArgs& a, int threads, Arena& arena)
      : args(a), height(a.images.size[2]), width(a.images.size[3]), count(height * width), tiles((count + kTile - 1) / kTile),
        channels(a.values.size[1]), row(round_up(channels, kLanes)) {
    features = arena.take<float>(tiles * kTile * kFeatures);
    boxes = arena.take<Box>(tiles);
    order = arena.take<int32_t>(tiles * kTile);
    points = arena.take<float>(count * kFeatures);
    values = arena.take<float>(tiles * kTile * row);
    sums = arena.take<float>(tiles * kTile * row);
    lines = arena.take<float>(threads * width);
    tables = arena.take<float>(threads * kTile * kTile);
    bins = arena.take<int16_t>(threads * tiles);
    met = arena.take<int64_t>(tiles);
  }
  float scale(int k) const { return k < 2 ? args.scale_xy : args.scale_rgb; }
};

// The pixels of a row as points, not scaled.
static void load_points(const Exact& exact, int64_t b, int64_t y, float* line) {
  float* to = exact.points + y * exact.width * kFeatures;
  for (int64_t x = 0; x < exact.width; ++x) to[x * kFeatures] = float(x), to[x * kFeatures + 1] = float(y);
  for (int64_t c = 0; c < 3; ++c) {
    load_row(exact.args.images, b, c, y, line);
    for (int64_t x = 0; x < exact.width; ++x) to[x * kFeatures + 2 + c] = line[x];
  }
}
static void scale_points(const Exact& exact) {
  for (int k = 0; k < kFeatures; ++k) {
    const float root = std::sqrt(exact.scale(k));
    for (int64_t i = 0; i < exact.count; ++i) exact.points[i * kFeatures + k] *= root;
  }
}

// Features and box of a tile; places behind the last pixel repeat it, their values are 0. A tile with a value or a feature that is not
// finite gets a box of everything: it must meet all others.
static void load_tile(const Exact& exact, int64_t tile, const float* points, bool finite) {
  float* to = exact.features + tile * kFeatures * kTile;
  Box& box = exact.boxes[tile];
  for (int k = 0; k < kFeatures; ++k) {
    float low = 0, high = 0;
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t at = exact.order[std::min(tile * kTile + i, exact.count - 1)];
      const float value = points[at * kFeatures + k];
      to[k * kTile + i] = value;
      low = i == 0 ? value : std::min(low, value), high = i == 0 ? value : std::max(high, value);
      finite = finite && value * 0.0f == 0.0f;
    }
    box.low[k] = low, box.high[k] = high;
  }
  if (!finite)
    for (int k = 0; k < kFeatures; ++k) box.low[k] = -INFINITY, box.high[k] = INFINITY;
}

// Half the squared distance of the nearest points of two boxes, and of the farthest.
static inline void distances(const Exact& exact, const Box& a, const Box& b, float* nearest, float* farthest) {
  float near = 0, far = 0;
  for (int k = 0; k < kFeatures; ++k) {
    const float gap = std::max(0.0f, std::max(b.low[k] - a.high[k], a.low[k] - b.high[k]));
    const float reach = std::max(b.high[k] - a.low[k], a.high[k] - b.low[k]);
    near += gap * gap * exact.scale(k), far += reach * reach * exact.scale(k);
  }
  *nearest = near, *farthest = far;
}

// The bins from which on tiles may be left out, for one tile; fills the tile's list of bins.
static int first_left_out(const Exact& exact, int64_t tile, int16_t* bins) {
  double per_bin[kBins + 1] = {};
  double least = 0;  // what the weights of any of the tile's pixels add up to at least: itself, and all others at their farthest
  for (int64_t other = 0; other < exact.tiles; ++other) {
    float near, far;
    distances(exact, exact.boxes[tile], exact.boxes[other], &near, &far);
    const int bin = near < float(kBins) ? int(near) : near >= float(kBins) ? kBins : 0;
    bins[other] = int16_t(bin);
    per_bin[bin] += double(std::min(kTile, exact.count - other * kTile));
    if (far < 16) least += double(std::exp(-far)) * double(std::min(kTile, exact.count - other * kTile));
  }
  double left_out = per_bin[kBins] * std::exp(-double(kBins));
  int from = kBins;
  while (from > 1) {
    left_out += per_bin[from - 1] * std::exp(-double(from - 1));
    if (left_out > double(kLeftOut) * std::max(1.0, least)) break;
    --from;
  }
  return from;
}

static void weigh(const Exact& exact, const float* a, const float* b, float* table) {
  const float xy = exact.args.scale_xy, rgb = exact.args.scale_rgb;
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t j = 0; j < kTile; j += kLanes) {
      const vfloat dx = load(b + j) - a[i], dy = load(b + kTile + j) - a[kTile + i];
      const vfloat dr = load(b + 2 * kTile + j) - a[2 * kTile + i], dg = load(b + 3 * kTile + j) - a[3 * kTile + i],
                   db = load(b + 4 * kTile + j) - a[4 * kTile + i];
      store(table + i * kTile + j, exp_of(-((dx * dx + dy * dy) * xy + (dr * dr + dg * dg + db * db) * rgb)));
    }
}

// sums [64][row] += table [64][64] values [64][row], kVectors vectors of channels and 4 pixels at a time.
template <int kVectors>
static void multiply(const float* table, const float* values, int64_t row, float* sums) {
  constexpr int kPixels = 4;
  for (int64_t i = 0; i < kTile; i += kPixels) {
    vfloat sum[kPixels][kVectors] = {};
    for (int64_t j = 0; j < kTile; ++j) {
      vfloat value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) value[v] = load(values + j * row + v * kLanes);
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[p][v] += table[(i + p) * kTile + j] * value[v];
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + (i + p) * row + v * kLanes;
        store(to, load(to) + sum[p][v]);
      }
  }
}

static void filter_tile(const Exact& exact, int64_t tile, int16_t* bins, float* table) {
  float* sums = exact.sums + tile * kTile * exact.row;
  std::fill(sums, sums + kTile * exact.row, 0.0f);
  const int from = first_left_out(exact, tile, bins);
  int64_t met = 0;
  for (int64_t other = 0; other < exact.tiles; ++other) {
    if (bins[other] >= from) continue;
    ++met;
    weigh(exact, exact.features + tile * kFeatures * kTile, exact.features + other * kFeatures * kTile, table);
    const float* values = exact.values + other * kTile * exact.row;
    for (int64_t c = 0; c < exact.row;) {
      const int64_t left = (exact.row - c) / kLanes;
      if (left >= 3 && left != 4)
        multiply<3>(table, values + c, exact.row, sums + c), c += 3 * kLanes;
      else if (left >= 2)
        multiply<2>(table, values + c, exact.row, sums + c), c += 2 * kLanes;
      else
        multiply<1>(table, values + c, exact.row, sums + c), c += kLanes;
    }
  }
  exact.met[tile] = met;
}

int64_t exact_bytes(const BilateralArgs& args, int threads) {
  Arena arena(nullptr);
  Exact(args, threads, arena);
  return arena.used;
}

// Pixels of one image with their values in the tiles' order; `places` (in sums, which are free) says where each pixel is.
static void gather(const Exact& exact, int64_t b, int32_t* places, int threads) {
#pragma omp parallel num_threads(threads)
  {
    float* line = exact.lines + thread_number() * exact.width;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < exact.tiles * kTile; ++at) {
      if (at < exact.count) places[exact.order[at]] = int32_t(at);
      std::fill(exact.values + at * exact.row, exact.values + (at + 1) * exact.row, 0.0f);
    }
#pragma omp for schedule(static)
    for (int64_t y = 0; y < exact.height; ++y) {
      load_points(exact, b, y, line);
      for (int64_t c = 0; c < exact.channels; ++c) {
        load_row(exact.args.values, b, c, y, line);
        for (int64_t x = 0; x < exact.width; ++x) exact.values[places[y * exact.width + x] * exact.row + c] = line[x];
      }
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < exact.tiles; ++tile) {
      float zero = 0;
      for (int64_t i = 0; i < kTile * exact.row; ++i) zero += exact.values[tile * kTile * exact.row + i] * 0.0f;
      load_tile(exact, tile, exact.points, zero == 0.0f);
    }
  }
}

Status filter_exact(const BilateralArgs& args, void* workspace, int threads) {
  if (!same_images(args.images, args.values) || !same_size(args.values, args.out) || args.images.size[1] != 3 ||
      args.values.size[1] < 1 || args.images.size[2] * args.images.size[3] >= (int64_t(1) << 31) - kTile)
    return Status::bad_argument;
  Arena arena(workspace);
  const Exact exact(args, threads, arena);
  for (int64_t b = 0; b < args.images.size[0]; ++b) {
    for (int64_t y = 0; y < exact.height; ++y) load_points(exact, b, y, exact.lines);
    scale_points(exact);
    compact_order(exact.points, exact.count, kTile, exact.order);
    gather(exact, b, reinterpret_cast<int32_t*>(exact.sums), threads);
#pragma omp parallel num_threads(threads)
    {
      const int thread = thread_number();
#pragma omp for schedule(dynamic) nowait
      for (int64_t tile = 0; tile < exact.tiles; ++tile)
        filter_tile(exact, tile, exact.bins + thread * exact.tiles, exact.tables + thread * kTile * kTile);
#pragma omp barrier
      float* line = exact.lines + thread * exact.width;
      int32_t* places = reinterpret_cast<int32_t*>(exact.values);  // which are done with
#pragma omp for schedule(static)
      for (int64_t at = 0; at < exact.count; ++at) places[exact.order[at]] = int32_t(at);
#pragma omp for schedule(static)
      for (int64_t y = 0; y < exact.height; ++y)
        for (int64_t c = 0; c < exact.channels; ++c) {
          for (int64_t x = 0; x < exact.width; ++x) line[x] = exact.sums[places[y * exact.width + x] * exact.row + c];
          store_row(args.out, b, c, y, line);
        }
    }
    if (args.counted) {
      for (int64_t tile = 0; tile < exact.tiles; ++tile) args.counted[0] += exact.met[tile];
      args.counted[1] += exact.tiles * exact.tiles;
    }
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t exact_bytes(const BilateralArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status filter_exact(const BilateralArgs& args, void* workspace, int threads))

int64_t bilateral_exact_cpu_workspace(const BilateralArgs& args, int threads) { AFA_DISPATCH(exact_bytes, args, threads) }
Status bilateral_exact_cpu(const BilateralArgs& args, void* workspace, int threads) {
  AFA_DISPATCH(filter_exact, args, workspace, threads)
}
#endif

}  // namespace afa
