// An iteration of mean field on the CPU.
//
// Data flow: each kernel's lattice is splatted and blurred; then every point takes its share of all of them and its softmax at once. With
// a matrix of classes, or more channels than are filtered at once, each kernel is sliced on its own, adding to what the ones before
// left. Points keep their channels side by side from one iteration to the next. Floor: that of the filters, see lattice_filter.cpp.
#include "bilateral/lattice_filter.h"

namespace afa {
namespace AFA_ISA {

constexpr int64_t kMostClasses = 4096;

constexpr int64_t kMostFused = 4;  // kernels

static inline bool fused(const CrfStep& step) {
  bool plain = step.channels <= kMostChannels && step.count > 0 && step.count <= kMostFused;
  for (int64_t k = 0; k < step.count; ++k) plain = plain && !step.kernels[k].matrix;
  return plain;
}

// A pair of tables for each kernel, or one for all.
struct CrfTables {
  float *first[kMostFused], *second[kMostFused];
  CrfTables(const CrfStep& step, Arena& arena) {
    const int64_t row = channel_row(std::min(step.channels, kMostChannels));
    int64_t vertices = 0;
    for (int64_t k = 0; k < step.count; ++k) {
      vertices = std::max(vertices, step.kernels[k].lattice.vertices);
      if (!fused(step)) continue;
      first[k] = arena.take<float>((step.kernels[k].lattice.vertices + 1) * row);
      second[k] = arena.take<float>((step.kernels[k].lattice.vertices + 1) * row);
    }
    if (!fused(step)) first[0] = arena.take<float>((vertices + 1) * row), second[0] = arena.take<float>((vertices + 1) * row);
  }
};

int64_t crf_bytes(const CrfStep& step) {
  Arena arena(nullptr);
  CrfTables(step, arena);
  return arena.used;
}

// logits += spread times the matrix, for one point.
static inline void spread_classes(const float* matrix, const float* spread, int64_t channels, int64_t stride, float* logits) {
  for (int64_t c = 0; c < stride; c += kLanes) {
    vfloat sum = load(logits + c);
    for (int64_t from = 0; from < channels; ++from) sum += spread[from] * load(matrix + from * stride + c);
    store(logits + c, sum);
  }
}

// `width` channels are written, those behind the last as 0: all that a filter reads.
static inline void softmax(const float* logits, int64_t channels, int64_t width, float* line, float* out) {
  for (int64_t c = 0; c < channels; ++c) line[c] = logits[c];
  vfloat highest = load(line), sums = {};
  for (int64_t c = kLanes; c < width; c += kLanes) highest = max_of(highest, load(line + c));
  float top = highest[0];
  for (int i = 1; i < kLanes; ++i) top = highest[i] > top ? highest[i] : top;
  for (int64_t c = 0; c < width; c += kLanes) {
    const vfloat value = exp_of(load(line + c) - top);
    store(out + c, value);
    sums += value;
  }
  const float inverse = 1.0f / sum_of(sums);
  for (int64_t c = 0; c < width; c += kLanes) store(out + c, load(out + c) * inverse);
}

// Within a parallel region.
template <int kVectors>
static void step_fused(const CrfStep& step, const CrfTables& tables, int64_t row, int64_t stride) {
  const Row<kVectors> lanes(row);
  const float* vertices[kMostFused];
  for (int64_t k = 0; k < step.count; ++k)
    vertices[k] = blurred<kVectors>(step.kernels[k].lattice, {step.in, nullptr, nullptr, stride, row, 1.0f}, false, tables.first[k],
                                    tables.second[k]);
  float logits[kMostChannels + kLanes], line[kMostChannels + kLanes];
  const int64_t width = round_up(step.channels, std::max(kLanes, 8));
  std::fill(line, line + width, -1e30f);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < step.points; ++i) {
    vfloat sum[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = load(step.base + i * stride + lanes.at[v]);
    for (int64_t k = 0; k < step.count; ++k) {
      const CrfKernel& kernel = step.kernels[k];
      add_corners<kVectors>(kernel.lattice, vertices[k], row, lanes, i, kernel.scale * alpha(kernel.lattice), sum);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(logits + lanes.at[v], sum[v]);
    if (step.keep_logits) std::copy(logits, logits + step.channels, step.logits + i * stride);
    softmax(logits, step.channels, width, line, step.out + i * stride);
  }
}

Status crf_step(const CrfStep& step, void* workspace, int threads) {
  const int64_t channels = step.channels, stride = round_up(channels, 16);
  if (channels < 1 || stride > kMostClasses || step.points < 1) return Status::bad_argument;
  for (int64_t k = 0; k < step.count; ++k)
    if (step.kernels[k].lattice.points != step.points || (step.kernels[k].matrix && !step.spread)) return Status::bad_argument;
  Arena arena(workspace);
  const CrfTables tables(step, arena);
#pragma omp parallel num_threads(threads)
  if (fused(step)) {
    const int64_t row = channel_row(channels);
    switch ((row + kLanes - 1) / kLanes) {
      case 1: step_fused<1>(step, tables, row, stride); break;
      case 2: step_fused<2>(step, tables, row, stride); break;
      case 3: step_fused<3>(step, tables, row, stride); break;
      case 4: step_fused<4>(step, tables, row, stride); break;
      case 6: step_fused<6>(step, tables, row, stride); break;
      default: step_fused<8>(step, tables, row, stride); break;
    }
  } else {
    const float* before = step.base;
    for (int64_t k = 0; k < step.count; ++k) {
      const CrfKernel& kernel = step.kernels[k];
      for (int64_t c = 0; c < channels; c += kMostChannels) {
        Rows rows = {step.in + c, before + c, step.logits + c, stride, channel_row(std::min(channels - c, kMostChannels)), kernel.scale};
        if (kernel.matrix) rows.base = nullptr, rows.out = step.spread + c, rows.scale = 1;
        filter_rows(kernel.lattice, rows, false, tables.first[0], tables.second[0]);
      }
      if (kernel.matrix) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < step.points; ++i) {
          if (before != step.logits) std::copy(before + i * stride, before + (i + 1) * stride, step.logits + i * stride);
          spread_classes(kernel.matrix, step.spread + i * stride, channels, stride, step.logits + i * stride);
        }
      }
      before = step.logits;
    }
    const int64_t width = round_up(channels, std::max(kLanes, 8));
    float line[kMostClasses];
    std::fill(line, line + width, -1e30f);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < step.points; ++i) softmax(before + i * stride, channels, width, line, step.out + i * stride);
  }
  return Status::ok;
}

}  // namespace AFA_ISA

#if AFA_ISA_IS_BASELINE
AFA_DECLARE_PER_ISA(int64_t crf_bytes(const CrfStep& step))
AFA_DECLARE_PER_ISA(Status crf_step(const CrfStep& step, void* workspace, int threads))

int64_t dense_crf_cpu_workspace(const CrfStep& step) { AFA_DISPATCH(crf_bytes, step) }
Status dense_crf_cpu(const CrfStep& step, void* workspace, int threads) { AFA_DISPATCH(crf_step, step, workspace, threads) }
#endif

}  // namespace afa
