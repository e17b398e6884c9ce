// Diffusion on the CPU.
//
// Data flow, one image at a time, every thread owning a fixed band of rows: the weights go to float32 blocks of 32 columns whose
// taps lie together, in the order in which they are read; the masks go to [H][C][margin + row], whose horizontal margins hold the
// border, while the vertical border is a matter of pointing a tap at row 0 or H-1. An iteration then is, for each pixel row, one
// fused multiply-add per tap, channel and pixel with the sums in registers; iterations alternate two buffers. Sums run over
// taps in order and never across threads: the same bits for any thread count, and for any schedule.
//
// Where a thread's weights outgrow its core's cache (AFA_CPU_CACHE or what the system says of the second level), several iterations
// pass over them at once: in a strip of columns iteration k is at row y - k * reach, so that it finds the rows that it reads done, and
// the weights of its row still in the cache; and it is k * reach columns further left, so that the strip before has done
// those.
// At the ends of its band a thread leaves k * reach rows of iteration k for when its neighbours are there too. Nothing is done
// twice. The number of iterations and the strip's width follow from the cache's size, see choose_schedule.
// Floor: T*C*H*W fused multiply-adds and T*H*W*4 bytes of weights per iteration, per pass where they come from memory. Bound: memory
// bandwidth for few channels, the two loads per cycle for many.
#include "diffusion/diffusion.h"

#include <algorithm>

#include "common/threads.h"
#include "diffusion/gather.h"

namespace afa {
namespace AFA_ISA {

// --- how iterations pass over the image ---

constexpr int64_t kDeepest = 8;
// Of a core's cache, what the weights and masks of a pass may take: the rest is for the rows that come in ahead.
// Timed on one machine only, a virtual one of 2.8 GHz: there passes of two iterations took as
// long as one at a time (0.73 and 0.76 s of 20 at 1x3x1024x2048 on two threads, 1.45 and 1.37 s on one).
constexpr double kCacheShare = 0.7;
// A pass of several iterations has more to set up; it must save at least this part of the bytes.
constexpr double kWorthwhile = 0.8;

static Schedule choose_schedule(const DiffusionArgs& args, const Layout& at, int64_t channels, int threads) {
  const double cache = kCacheShare * double(core_cache_bytes()), band = double(at.height) / threads;
  const int64_t skew = round_up(at.reach_x, kWeightBlock);
  Schedule best{1, at.row};
  if (args.transpose || 4.0 * band * double(at.taps * at.row) <= cache) return best;
  double least = kWorthwhile;
  for (int64_t depth = 2; depth <= std::min(args.num_iter, kDeepest); ++depth) {
    const int64_t behind = (depth - 1) * at.reach_y;  // rows
    const double column = 4.0 * double((behind + 1) * at.taps + (behind + 2 * at.reach_y + 1) * 2 * channels);
    const int64_t strip = std::min(int64_t(cache / column) / kWeightBlock * kWeightBlock, at.row);
    if (strip < kWeightBlock) break;
    // What is read of the weights in a pass: every strip begins with columns of the strip before, every band is left with rows.
    const double columns = strip == at.row ? 1.0 : 1.0 + double((depth - 1) * skew) / double(strip);
    const double rows = threads == 1 ? 1.0 : 1.0 + double(depth * behind) / band;
    // Masks are read and written all the same, and read once more where a strip's neighbours begin.
    const double weights = 4.0 * double(at.taps), masks = 8.0 * double(channels);
    const double halo = strip == at.row ? 1.0 : 1.0 + 2.0 * double(at.reach_x) / double(strip);
    const double bytes = (weights * columns * rows / double(depth) + masks * halo) / (weights + masks);
    if (bytes < least) least = bytes, best = Schedule{depth, strip};
  }
  return best;
}

// Adds what row `from_y` of the incoming gradient sends through tap (dx) into `sum`, a row with margins.
static void scatter_row(const float* weights, const float* from, int64_t dx, const Layout& at, int64_t channels, float* sum) {
  for (int64_t c = 0; c < channels; ++c) {
    const float* source = from + c * at.mask_row;
    float* target = sum + c * at.mask_row + dx;
    for (int64_t x = 0; x < at.width; x += kLanes)
      store(target + x, load(target + x) + load(weights + x) * load(source + x));
  }
}

// One row of the adjoint: every (row, tap) whose neighbour is row y, in a fixed order, then the margins folded back.
static void adjoint_row(const float* all_weights, const float* from, const DiffusionArgs& args, const Layout& at,
                        int64_t channels, int64_t y, float* sum, float* out) {
  const int64_t channel_rows = channels * at.mask_row;
  std::fill(sum, sum + channel_rows, 0.0f);
  float* pixels = sum + at.margin;
  for (int64_t t = 0; t < at.taps; ++t) {
    const int64_t dy = args.offsets[2 * t], dx = limit(args.offsets[2 * t + 1], at.width);
    int64_t low = y - dy, high = y - dy;
    if (args.border == Border::replicate) {
      if (y == 0) low = 0;
      if (y == at.height - 1) high = at.height - 1;
      if (y == 0 && at.height > 1) high = std::min(-dy, at.height - 1);
      if (y == at.height - 1 && at.height > 1) low = std::max(at.height - 1 - dy, int64_t(0));
    }
    for (int64_t source = std::max(low, int64_t(0)); source <= std::min(high, at.height - 1); ++source)
      scatter_row(all_weights + (source * at.taps + t) * at.row, from + source * channel_rows + at.margin, dx, at, channels,
                  pixels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    float* line = pixels + c * at.mask_row;
    if (args.border == Border::replicate) {
      for (int64_t x = -at.margin; x < 0; ++x) line[0] += line[x];
      for (int64_t x = at.width; x < at.width + at.margin; ++x) line[at.width - 1] += line[x];
    }
    std::copy(line, line + at.width, out + c * at.mask_row + at.margin);
  }
}

// --- one thread's part of one image ---

struct Worker {
  const DiffusionArgs& args;
  const WeightSource& source;
  const Layout& at;
  int64_t b, channels, thread, begin, end;  // of `channels` present channels, rows [begin, end)
  Schedule schedule;
  const float** tap;

  int64_t row_floats() const { return channels * at.mask_row; }
  // What iteration i reads, and i - 1 has written.
  float* state(int64_t i) const { return i % 2 == 0 ? at.first : at.second; }
  // The adjoint must not pick up columns past the width; the forward replicates into its margins.
  bool replicates() const { return args.border == Border::replicate && !args.transpose; }

  // Writes the horizontal border of one row, where its columns [left, right) end at it: the first or last pixel, or zeros.
  void fill_margins(float* row, int64_t left, int64_t right) const {
    for (int64_t c = 0; c < channels; ++c) {
      float* pixels = row + c * at.mask_row + at.margin;
      if (left == 0) std::fill(pixels - at.margin, pixels, replicates() ? pixels[0] : 0.0f);
      if (right == at.row)
        std::fill(pixels + at.width, pixels + at.row + at.margin, replicates() ? pixels[at.width - 1] : 0.0f);
    }
  }

  // Columns [left, right) of row y in iteration i.
  void step(int64_t i, int64_t y, int64_t left, int64_t right, const float* ahead = nullptr) const {
    const float* from = state(i);
    float* to = state(i + 1) + y * row_floats();
    if (y >= at.reach_y && y + at.reach_y < at.height) {
      const float* pixels = from + y * row_floats();
      for (int64_t t = 0; t < at.taps; ++t) tap[t] = pixels + at.tap_steps[t];
    } else {
      for (int64_t t = 0; t < at.taps; ++t) {
        const int64_t wanted = y + args.offsets[2 * t], row = std::clamp(wanted, int64_t(0), at.height - 1);
        const float* base = row == wanted || args.border == Border::replicate ? from + row * row_floats() : at.zeros;
        tap[t] = base + at.margin + limit(args.offsets[2 * t + 1], at.width);
      }
    }
    gather_row(tap, at, channels, y, left, right, ahead, to + at.margin);
    fill_margins(to, left, right);
  }

  // Rows of iteration k of a pass that need nothing of other bands but what was there before the pass.
  int64_t first_row(int64_t k) const { return begin == 0 ? 0 : std::min(begin + k * at.reach_y, end); }
  int64_t last_row(int64_t k) const { return end == at.height ? end : std::max(end - k * at.reach_y, first_row(k)); }

  // Iterations [i, i + depth). The weights are written on the way in the first one.
  void pass(int64_t i, int64_t depth) const {
    const int64_t skew = round_up(at.reach_x, kWeightBlock), strip = schedule.strip;
    for (int64_t x = 0; x < at.row; x += strip) {
      const bool last = x + strip >= at.row;
      for (int64_t front = begin; front < end + (depth - 1) * at.reach_y; ++front)
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t y = front - k * at.reach_y;
          if (y < first_row(k) || y >= last_row(k)) continue;
          if (i + k == 0) source.fill(source.context, b, y, x, std::min(strip, at.row - x), kWeightBlock, at.weights_at(y, x));
          const int64_t left = std::max(x - k * skew, int64_t(0)), right = last ? at.row : x + strip - k * skew;
          const float* ahead = depth > 1 && k < 2 && front + 1 < end ? at.weights_at(front + 1, x) + 16 * k : nullptr;
          if (left < right) step(i + k, y, left, right, ahead);
        }
    }
#pragma omp barrier
    for (int64_t k = 1; k < depth; ++k) {
      for (int64_t y = begin; y < first_row(k); ++y) step(i + k, y, 0, at.row);
      for (int64_t y = last_row(k); y < end; ++y) step(i + k, y, 0, at.row);
#pragma omp barrier
    }
  }

  // All iterations of the adjoint, whose weights are [H][taps][row].
  void adjoint() const {
    float* sum = at.accumulators + thread * at.channels * at.mask_row;
    for (int64_t y = begin; y < end; ++y)
      source.fill(source.context, b, y, 0, at.row, at.row, at.weights + y * at.taps * at.row);
#pragma omp barrier  // rows of other threads' weights are read
    for (int64_t i = 0; i < args.num_iter; ++i) {
      for (int64_t y = begin; y < end; ++y) {
        float* to = state(i + 1) + y * row_floats();
        adjoint_row(at.weights, state(i), args, at, channels, y, sum, to);
        fill_margins(to, 0, at.row);
      }
#pragma omp barrier
    }
  }

  void run() const {
    if (source.prepare)
      for (int64_t y = begin; y < end; ++y) source.prepare(source.context, b, y);
    for (int64_t y = begin; y < end; ++y) {
      float* row = state(0) + y * row_floats();
      for (int64_t c = 0; c < channels; ++c) load_row(args.masks, b, at.present[c], y, row + c * at.mask_row + at.margin);
      fill_margins(row, 0, at.row);
    }
#pragma omp barrier
    if (args.transpose && args.num_iter > 0)
      adjoint();
    else
      for (int64_t i = 0; i < args.num_iter; i += schedule.depth) pass(i, std::min(schedule.depth, args.num_iter - i));
    for (int64_t y = begin; y < end; ++y)
      for (int64_t c = 0; c < channels; ++c)
        store_row(args.out, b, at.present[c], y, state(args.num_iter) + y * row_floats() + c * at.mask_row + at.margin);
  }
};

Status diffuse_with(const DiffusionArgs& args, const WeightSource& source, void* workspace, int threads) {
  if (args.taps < 1 || args.num_iter < 0 || threads < 1) return Status::bad_argument;
  if (!same_size(args.masks, args.out) || is_empty(args.masks)) return Status::bad_argument;
  const Layout at(args, threads, workspace);
  if (args.num_iter > 0) prefer_large_pages(at.weights, 4 * at.height * at.taps * at.row);
  std::fill(at.zeros, at.zeros + at.channels * at.mask_row, 0.0f);
  for (int64_t b = 0; b < args.masks.size[0]; ++b) {
    const int64_t channels = present_channels(args.class_mask, b, args.out, at.zeros, at.present);
    if (channels == 0) continue;
    const Schedule schedule = choose_schedule(args, at, channels, threads);
    at.place_strips(schedule.strip);
    at.place_taps(args.offsets, channels);
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = thread_number(), team = team_size();
      Worker{args, source, at, b, channels, thread, at.height * thread / team, at.height * (thread + 1) / team, schedule,
             at.tap_rows + thread * at.taps}
          .run();
    }
  }
  return Status::ok;
}

// Weights given as a tensor, of any type and strides.
static void fill_from_tensor(const void* context, int64_t b, int64_t y, int64_t x, int64_t columns, int64_t block, float* weights) {
  View<4> part = *static_cast<const View<4>*>(context);
  const int64_t taps = part.size[1], width = part.size[3];
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t begin = x; begin < x + columns; begin += block) {
      float* to = weights + (begin - x) * taps + t * block;
      part.size[3] = std::min(block, width - begin);
      load_row(from_column(part, begin), b, t, y, to);
      std::fill(to + part.size[3], to + block, 0.0f);
    }
}

Schedule diffuse_schedule(const DiffusionArgs& args, int threads) {
  return choose_schedule(args, Layout(args, threads, nullptr), args.masks.size[1], threads);
}

int64_t diffuse_bytes(const DiffusionArgs& args, int threads) { return Layout(args, threads, nullptr).bytes; }

Status diffuse_tensor(const DiffusionArgs& args, void* workspace, int threads) {
  if (args.weights.size[1] != args.taps || !same_images(args.weights, args.masks)) return Status::bad_argument;
  return diffuse_with(args, WeightSource{nullptr, fill_from_tensor, &args.weights}, workspace, threads);
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
int64_t diffuse_cpu_workspace(const DiffusionArgs& args, int threads) { return baseline::diffuse_bytes(args, threads); }
Schedule diffuse_cpu_schedule(const DiffusionArgs& args, int threads) { return baseline::diffuse_schedule(args, threads); }
Status diffuse_cpu(const DiffusionArgs& args, void* workspace, int threads) {
  AFA_DISPATCH(diffuse_tensor, args, workspace, threads)
}
#endif

}  // namespace afa
