// An iteration of mean field on the CPU.
//
// Data flow: each kernel's lattice adds its filtered distribution, times a number, to what the ones before left, at the end of its last
// pass; times a matrix of classes it goes through a table of its own. Then a softmax over the channels of each point. Points keep
// their channels side by side from one iteration to the next. Floor: that of the filters, see lattice_filter.cpp.
#include "bilateral/lattice_filter.h"

namespace afa {
namespace AFA_ISA {

constexpr int64_t kMostClasses = 4096;

struct CrfTables {
  float *first, *second;
  CrfTables(const CrfStep& step, Arena& arena) {
    int64_t vertices = 0;
    for (int64_t k = 0; k < step.count; ++k) vertices = std::max(vertices, step.kernels[k].lattice.vertices);
    const int64_t floats = (vertices + 1) * channel_row(std::min(step.channels, kMostChannels));
    first = arena.take<float>(floats), second = arena.take<float>(floats);
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

static inline void softmax(const float* logits, int64_t channels, int64_t stride, float* line, float* out) {
  for (int64_t c = 0; c < channels; ++c) line[c] = logits[c];
  for (int64_t c = channels; c < stride; ++c) line[c] = -1e30f;
  vfloat highest = load(line), sums = {};
  for (int64_t c = kLanes; c < stride; c += kLanes) highest = max_of(highest, load(line + c));
  float top = highest[0];
  for (int i = 1; i < kLanes; ++i) top = highest[i] > top ? highest[i] : top;
  for (int64_t c = 0; c < stride; c += kLanes) {
    const vfloat value = exp_of(load(line + c) - top);
    store(line + c, value);
    sums += value;
  }
  const float inverse = 1.0f / sum_of(sums);
  for (int64_t c = 0; c < stride; c += kLanes) store(out + c, load(line + c) * inverse);
}

Status crf_step(const CrfStep& step, void* workspace, int threads) {
  const int64_t channels = step.channels, stride = round_up(channels, 16);
  if (channels < 1 || stride > kMostClasses || step.points < 1) return Status::bad_argument;
  for (int64_t k = 0; k < step.count; ++k)
    if (step.kernels[k].lattice.points != step.points || (step.kernels[k].matrix && !step.spread)) return Status::bad_argument;
  Arena arena(workspace);
  const CrfTables tables(step, arena);
#pragma omp parallel num_threads(threads)
  {
    const float* before = step.base;
    for (int64_t k = 0; k < step.count; ++k) {
      const CrfKernel& kernel = step.kernels[k];
      for (int64_t c = 0; c < channels; c += kMostChannels) {
        Rows rows = {step.in + c, before + c, step.logits + c, stride, channel_row(std::min(channels - c, kMostChannels)), kernel.scale};
        if (kernel.matrix) rows.base = nullptr, rows.out = step.spread + c, rows.scale = 1;
        filter_rows(kernel.lattice, rows, false, tables.first, tables.second);
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
    float line[kMostClasses];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < step.points; ++i) softmax(before + i * stride, channels, stride, line, step.out + i * stride);
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
