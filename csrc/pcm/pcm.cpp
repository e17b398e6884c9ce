// The pixel correlation module on the CPU.
//
// Data flow: features are packed into panels of three vectors of pixels, channel by channel; values and what is summed up lie pixel by
// pixel, three vectors of channels together. Blocks of pixels meet in pairs. Of a pair the products of features make a
// table in cache, and the table times the values a small matrix product, both ways: a is symmetric, so each pair of pixels is multiplied
// once. All of it is one micro kernel whose sums stay in registers.
// In round r group i of some blocks meets group r - i (modulo how many there are): within a round none is met twice, so threads share
// the round out and add to the sums as they are; a barrier later the next follows. The same bits for any number of threads.
// Floor: N^2 (C + 1 + 2 K) operations forward and N^2 (3 C + 2 K) for the gradient of the features, K with the channel of ones. Bound:
// these; panels come from the second cache at a few bytes a cycle.
#include <algorithm>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/threads.h"
#include "pcm/pcm.h"

namespace afa {
namespace AFA_ISA {

constexpr int kVectors = 3;
constexpr int64_t kPanel = kVectors * kLanes;  // 12, 24 or 48
constexpr int64_t kSide = 48;                  // pixels of a block
constexpr int64_t kBlock = kSide / kPanel;     // its panels
constexpr int kRows = kLanes == 16 ? 8 : 4;    // with three vectors each: 12 or, where there are 32 registers, 24 sums
constexpr int64_t kDepth = 256;                // channels whose panel stays in the first cache

// [images][panels][channels][kPanel], pixels innermost.
struct Panels {
  int64_t channels, panels;
  float* data;
  Panels(int64_t images, int64_t panels_, int64_t channels_, Arena& arena)
      : channels(channels_), panels(panels_), data(arena.take<float>(images * panels_ * channels_ * kPanel)) {}
  float* at(int64_t b, int64_t panel) const { return data + (b * panels + panel) * channels * kPanel; }
};

// [images][runs][pixels][kPanel], channels innermost; a run is so many of them.
struct Runs {
  int64_t channels, runs, pixels;
  float* data;
  Runs(int64_t images, int64_t panels, int64_t channels_, Arena& arena)
      : channels(channels_), runs((channels_ + kPanel - 1) / kPanel), pixels(panels * kPanel),
        data(arena.take<float>(images * runs * pixels * kPanel)) {}
  float* at(int64_t b, int64_t run, int64_t pixel) const { return data + ((b * runs + run) * pixels + pixel) * kPanel; }
  int vectors(int64_t run) const { return int(std::min<int64_t>(kVectors, (channels - run * kPanel + kLanes - 1) / kLanes)); }
};

// ---- packing -------------------------------------------------------------------------------------------------------------

// Channel c of image b as a channel of panels: all its rows in `line`, behind them zeros up to whole panels. Channels behind the last
// are 1.
static void load_plane(const View<4>& from, int64_t b, int64_t c, float* line, const Panels& to, int64_t to_channel) {
  const int64_t width = from.size[3], count = from.size[2] * width;
  if (c < from.size[1])
    for (int64_t y = 0; y < from.size[2]; ++y) load_row(from, b, c, y, line + y * width);
  else
    std::fill(line, line + count, 1.0f);
  std::fill(line + count, line + to.panels * kPanel, 0.0f);
  for (int64_t panel = 0; panel < to.panels; ++panel)
    std::copy(line + panel * kPanel, line + (panel + 1) * kPanel, to.at(b, panel) + to_channel * kPanel);
}
static void store_plane(const Panels& from, int64_t b, int64_t c, float* line, const View<4>& to) {
  for (int64_t panel = 0; panel < from.panels; ++panel) {
    const float* part = from.at(b, panel) + c * kPanel;
    std::copy(part, part + kPanel, line + panel * kPanel);
  }
  for (int64_t y = 0; y < to.size[2]; ++y) store_row(to, b, c, y, line + y * to.size[3]);
}

// A panel's square of channels and pixels, turned; channels behind the last are 0 in runs, and stay away from panels.
static void turn_square(const float* from, int64_t given, float* to, int64_t wanted) {
  vfloat rows[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) rows[i] = i < given ? load(from + i * kPanel) : vfloat{};
  transpose(rows);
  for (int64_t i = 0; i < std::min<int64_t>(kLanes, wanted); ++i) store(to + i * kPanel, rows[i]);
}
template <bool kToRuns>
static void turn_panel(const Panels& panels, const Runs& runs, int64_t b, int64_t panel) {
  for (int64_t first = 0; first < runs.channels; first += kLanes)
    for (int64_t pixel = 0; pixel < kPanel; pixel += kLanes) {
      float* across = panels.at(b, panel) + first * kPanel + pixel;
      float* along = runs.at(b, first / kPanel, panel * kPanel + pixel) + first % kPanel;
      const int64_t left = runs.channels - first;
      if (kToRuns)
        turn_square(across, left, along, kLanes);
      else
        turn_square(along, kLanes, across, left);
    }
}

// ---- the micro kernel ----------------------------------------------------------------------------------------------------

// out [kRows][kN vectors] += sum over depth of x [kRows] y [kN vectors]; rows of y are kPanel apart.
template <int kN>
static inline __attribute__((always_inline)) void multiply(int64_t depth, const float* x, int64_t x_step, int64_t x_row, const float* y,
                                                           float* out, int64_t out_row) {
  vfloat sum[kRows][kN];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kN; ++v) sum[r][v] = load(out + r * out_row + v * kLanes);
  for (int64_t d = 0; d < depth; ++d, x += x_step, y += kPanel) {
    vfloat value[kN];
#pragma GCC unroll 3
    for (int v = 0; v < kN; ++v) value[v] = load(y + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kN; ++v) sum[r][v] += x[r * x_row] * value[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kN; ++v) store(out + r * out_row + v * kLanes, sum[r][v]);
}

// A block of pixels: its panels.
struct Block {
  int64_t first, panels;
  Block(int64_t block, int64_t all) : first(block * kBlock), panels(std::min(kBlock, all - first)) {}
  int64_t pixels() const { return panels * kPanel; }
  int64_t pixel() const { return first * kPanel; }
};

// table [pixels of rows][kSide] += products of the pixels of two blocks over `depth` channels, the first of a panel given of each.
static void add_products(const Panels& x, int64_t x_first, const Panels& y, int64_t y_first, int64_t depth, int64_t b, const Block& rows,
                         const Block& columns, float* table) {
  for (int64_t column = 0; column < columns.panels; ++column)
    for (int64_t c = 0; c < depth; c += kDepth)
      for (int64_t row = 0; row < rows.panels; ++row)
        for (int64_t i = 0; i < kPanel; i += kRows)
          multiply<kVectors>(std::min(kDepth, depth - c), x.at(b, rows.first + row) + (x_first + c) * kPanel + i, kPanel, 1,
                             y.at(b, columns.first + column) + (y_first + c) * kPanel,
                             table + (row * kPanel + i) * kSide + column * kPanel, kSide);
}

// A run's sums of the pixels of one block += the table, or its transpose, times the values of the other's.
template <bool kTransposed, int kN>
static void add_run(const float* table, int64_t pixels, int64_t others, const float* values, float* sums) {
  for (int64_t i = 0; i < pixels; i += kRows) {
    if (kTransposed)
      multiply<kN>(others, table + i, kSide, 1, values, sums + i * kPanel, kPanel);
    else
      multiply<kN>(others, table + i * kSide, 1, kSide, values, sums + i * kPanel, kPanel);
  }
}
template <bool kTransposed>
static void add_sums(const float* table, int64_t b, const Runs& values, const Runs& sums, const Block& to, const Block& from) {
  for (int64_t run = 0; run < sums.runs; ++run) {
    const float* source = values.at(b, run, from.pixel());
    float* target = sums.at(b, run, to.pixel());
    switch (sums.vectors(run)) {
      case 3: add_run<kTransposed, 3>(table, to.pixels(), from.pixels(), source, target); break;
      case 2: add_run<kTransposed, 2>(table, to.pixels(), from.pixels(), source, target); break;
      default: add_run<kTransposed, 1>(table, to.pixels(), from.pixels(), source, target);
    }
  }
}

// ---- pairs of blocks -----------------------------------------------------------------------------------------------------

constexpr int64_t kTable = kSide * kSide;

// Both ways, or of a block with itself one way: its table is whole.
static void add_both(const float* table, int64_t b, const Runs& values, const Runs& sums, const Block& rows, const Block& columns) {
  add_sums<true>(table, b, values, sums, columns, rows);
  if (rows.first != columns.first) add_sums<false>(table, b, values, sums, rows, columns);
}

struct Forward {
  Panels features, values;
  Runs along, sums;  // of values
  Forward(const PcmArgs& args, int64_t panels, Arena& arena)
      : features(args.features.size[0], panels, args.features.size[1], arena),
        values(args.features.size[0], panels, args.channels(), arena), along(args.features.size[0], panels, args.channels(), arena),
        sums(args.features.size[0], panels, args.channels(), arena) {}

  int64_t planes() const { return features.channels + values.channels; }
  void load(const PcmArgs& args, int64_t b, int64_t plane, float* line) const {
    const int64_t c = plane - features.channels;
    c < 0 ? load_plane(args.features, b, plane, line, features, plane) : load_plane(args.values, b, c, line, values, c);
  }
  void turn(int64_t b, int64_t panel) const { turn_panel<true>(values, along, b, panel); }
  void meet(int64_t b, const Block& rows, const Block& columns, float* table) const {
    std::fill(table, table + kTable, 0.0f);
    add_products(features, 0, features, 0, features.channels, b, rows, columns, table);
    for (int64_t at = 0; at < kTable; at += kLanes) {
      const vfloat value = afa::AFA_ISA::load(table + at);
      store(table + at, value < 0.0f ? vfloat{} : value);  // NaN stays
    }
    add_both(table, b, along, sums, rows, columns);
  }
  const Panels& results() const { return values; }
  const View<4>& out(const PcmArgs& args) const { return args.sums; }
};

// Values and g lie as values, g, values: from the first channel on they are a row's factors, from the first of g on a column's.
struct Gradient {
  int64_t channels;
  Panels features, both;
  Runs along, sums;  // of features
  Gradient(const PcmArgs& args, int64_t panels, Arena& arena)
      : channels(args.channels()), features(args.features.size[0], panels, args.features.size[1], arena),
        both(args.features.size[0], panels, 3 * channels, arena), along(args.features.size[0], panels, args.features.size[1], arena),
        sums(args.features.size[0], panels, args.features.size[1], arena) {}

  int64_t planes() const { return features.channels + 3 * channels; }
  void load(const PcmArgs& args, int64_t b, int64_t plane, float* line) const {
    const int64_t c = plane - features.channels;
    if (c < 0)
      load_plane(args.features, b, plane, line, features, plane);
    else
      load_plane(c / channels == 1 ? args.sums : args.values, b, c % channels, line, both, c);
  }
  void turn(int64_t b, int64_t panel) const { turn_panel<true>(features, along, b, panel); }
  void meet(int64_t b, const Block& rows, const Block& columns, float* table) const {
    float* slopes = table + kTable;
    std::fill(table, table + 2 * kTable, 0.0f);
    add_products(features, 0, features, 0, features.channels, b, rows, columns, table);
    add_products(both, 0, both, channels, 2 * channels, b, rows, columns, slopes);
    for (int64_t at = 0; at < kTable; at += kLanes) {
      const vfloat value = afa::AFA_ISA::load(table + at), slope = afa::AFA_ISA::load(slopes + at);
      store(table + at, value <= 0.0f ? vfloat{} : slope);
    }
    add_both(table, b, along, sums, rows, columns);
  }
  const Panels& results() const { return features; }
  const View<4>& out(const PcmArgs& args) const { return args.grad_features; }
};

// ---- entry points --------------------------------------------------------------------------------------------------------

constexpr int64_t kMostBlocks = 4, kLeastGroups = 16;

static int64_t panels_of(const PcmArgs& args) { return (args.count() + kPanel - 1) / kPanel; }

template <class Pass>
static int64_t bytes_of(const PcmArgs& args, int threads) {
  Arena arena(nullptr);
  Pass(args, panels_of(args), arena);
  arena.take<float>(threads * panels_of(args) * kPanel), arena.take<float>(threads * 2 * kTable);
  return arena.used;
}

template <class Pass>
static void run(const PcmArgs& args, void* workspace, int threads) {
  const int64_t images = args.features.size[0], panels = panels_of(args), blocks = (panels + kBlock - 1) / kBlock;
  // Blocks that go together, to be met again while they are in the second cache, as long as there are many such groups.
  const int64_t group = std::max<int64_t>(1, std::min<int64_t>(kMostBlocks, blocks / kLeastGroups));
  const int64_t groups = (blocks + group - 1) / group;
  Arena arena(workspace);
  const Pass pass(args, panels, arena);
  float* lines = arena.take<float>(threads * panels * kPanel);
  float* tables = arena.take<float>(threads * 2 * kTable);
#pragma omp parallel num_threads(threads)
  {
    float* line = lines + thread_number() * panels * kPanel;
    float* table = tables + thread_number() * 2 * kTable;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < images * pass.planes(); ++at) pass.load(args, at / pass.planes(), at % pass.planes(), line);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < images * panels; ++at) {
      const int64_t b = at / panels, panel = at % panels;
      pass.turn(b, panel);
      for (int64_t run = 0; run < pass.sums.runs; ++run) {
        float* sums = pass.sums.at(b, run, panel * kPanel);
        std::fill(sums, sums + kPanel * kPanel, 0.0f);
      }
    }
    for (int64_t round = 0; round < groups; ++round) {
#pragma omp for schedule(dynamic)
      for (int64_t at = 0; at < images * groups; ++at) {
        const int64_t b = at / groups, one = at % groups, other = (round - one + groups) % groups;
        if (one > other) continue;
        for (int64_t row = one * group; row < std::min(blocks, (one + 1) * group); ++row)
          for (int64_t column = std::max(row, other * group); column < std::min(blocks, (other + 1) * group); ++column)
            pass.meet(b, Block(row, panels), Block(column, panels), table);
      }
    }
#pragma omp for schedule(static)
    for (int64_t at = 0; at < images * panels; ++at) turn_panel<false>(pass.results(), pass.sums, at / panels, at % panels);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < images * pass.results().channels; ++at)
      store_plane(pass.results(), at / pass.results().channels, at % pass.results().channels, line, pass.out(args));
  }
}

int64_t pcm_bytes(const PcmArgs& args, int threads) { return bytes_of<Forward>(args, threads); }
int64_t pcm_gradient_bytes(const PcmArgs& args, int threads) { return bytes_of<Gradient>(args, threads); }

Status pcm_sums(const PcmArgs& args, void* workspace, int threads) {
  if (!pcm_fits(args, false)) return Status::bad_argument;
  run<Forward>(args, workspace, threads);
  return Status::ok;
}
Status pcm_gradient(const PcmArgs& args, void* workspace, int threads) {
  if (!pcm_fits(args, true)) return Status::bad_argument;
  run<Gradient>(args, workspace, threads);
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t pcm_bytes(const PcmArgs& args, int threads))
AFA_DECLARE_PER_ISA(int64_t pcm_gradient_bytes(const PcmArgs& args, int threads))
AFA_DECLARE_PER_ISA(Status pcm_sums(const PcmArgs& args, void* workspace, int threads))
AFA_DECLARE_PER_ISA(Status pcm_gradient(const PcmArgs& args, void* workspace, int threads))

int64_t pcm_cpu_workspace(const PcmArgs& args, int threads) { AFA_DISPATCH(pcm_bytes, args, threads) }
Status pcm_cpu(const PcmArgs& args, void* workspace, int threads) { AFA_DISPATCH(pcm_sums, args, workspace, threads) }
int64_t pcm_features_gradient_cpu_workspace(const PcmArgs& args, int threads) { AFA_DISPATCH(pcm_gradient_bytes, args, threads) }
Status pcm_features_gradient_cpu(const PcmArgs& args, void* workspace, int threads) {
  AFA_DISPATCH(pcm_gradient, args, workspace, threads)
}
#endif

}  // namespace afa
