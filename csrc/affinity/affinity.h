// Affinity from attention within a square window of radius r, and the loss that teaches it.
//
//   z_ij = sum_h w_h (q_h,i . k_h,j + q_h,j . k_h,i) + bias,   A_ij = sigmoid(z_ij)   for |dy| <= r, |dx| <= r
//   L    = 1/2 sum_{y=1} (1 - A) / (N+ + 1) + 1/2 sum_{y=0} A / (N- + 1)              y_ij: labels of i and j agree
//
// With u = [w q, k] and v = [k, w q] side by side, length 2 * heads * d, z_ij = u_i . v_j + bias: one product for each unordered
// pair. A window is an image with one channel per tap, [B, (2r+1)^2, h, w], taps row-major in (dy, dx); taps that leave the
// image hold 0. Labels are int32, negative where ignored; on a GPU they are what the caller has, see DeviceLabels.
#pragma once

#include "common/common.h"
#include "common/cpu.h"

namespace afa {

struct AttentionArgs {
  View<4> query, key;               // [B, heads, N, d], N = height * width
  const float* head_weight = nullptr;  // [heads]
  float head_bias = 0;
  int64_t height = 0, width = 0, radius = 0;
};

struct MapsArgs {
  View<4> maps;                     // [B, heads, N, N]
  const float* head_weight = nullptr;
  float head_bias = 0;
  int64_t height = 0, width = 0, radius = 0;
};

// What a loss comes to: sums over ordered pairs.
struct PairSums {
  double same = 0, different = 0;   // of 1 - A over pairs of equal labels, of A over pairs of different ones
  int64_t same_count = 0, different_count = 0;
};
static inline void add_sums(const PairSums& from, PairSums* to) {
  to->same += from.same, to->different += from.different;
  to->same_count += from.same_count, to->different_count += from.different_count;
}

// How the gradient enters a backward pass: either from the loss, as the derivative of L by A for pairs with equal and with
// different labels, or from a window's gradient.
struct PairGradient {
  const int32_t* labels = nullptr;  // [B, h, w]
  float same = 0, different = 0;
  const float* kept = nullptr;      // what the loss has kept; null: the scores are computed again
  View<4> grad_window;              // [B, taps, h, w], used if labels is null
};

// Gradients to be written; a null `data` or pointer means: not wanted.
struct AttentionGradients {
  View<4> query, key;
  double* head = nullptr;           // [heads + 1]: the weights', then the bias's
};

// Bytes of scratch memory, 64-byte aligned.
int64_t window_affinity_cpu_workspace(const AttentionArgs& args, int threads);
Status window_affinity_cpu(const AttentionArgs& args, const View<4>& out, void* workspace, int threads);
// `kept`, if not null: [B, N, r + 1, 2r + 1], r at most the longer side, what the backward needs of the scores, see Derivatives.
Status attention_affinity_loss_cpu(const AttentionArgs& args, const int32_t* labels, PairSums* sums, float* kept, void* workspace,
                                   int threads);

int64_t attention_backward_cpu_workspace(const AttentionArgs& args, int threads);
Status attention_backward_cpu(const AttentionArgs& args, const PairGradient& gradient, const AttentionGradients& out,
                              void* workspace, int threads);

int64_t affinity_from_maps_cpu_workspace(const MapsArgs& args, int threads);
Status affinity_from_maps_cpu(const MapsArgs& args, const View<4>& out, void* workspace, int threads);
int64_t affinity_from_maps_backward_cpu_workspace(const MapsArgs& args, int threads);
// grad_maps is written in full, zeros outside the window; head [heads + 1] as above.
Status affinity_from_maps_backward_cpu(const MapsArgs& args, const PairGradient& gradient, const View<4>& grad_maps, double* head,
                                       void* workspace, int threads);

Status affinity_loss_cpu(const View<4>& window, const int32_t* labels, int64_t radius, PairSums* sums, int threads);
// The derivative of L by A at every tap, zeros where it does not count.
Status affinity_loss_backward_cpu(const View<4>& grad_window, const int32_t* labels, int64_t radius, float same, float different,
                                  int threads);

// The same on a GPU: every pointer is the device's. Asynchronous on the stream, nothing allocated, capturable in a CUDA graph. Inputs
// are read as they are, whatever their types, and results written as they are wanted: a tensor that had to be made for a kernel would
// cost more than the kernel. A loss's results and its gradient stay on the device.
struct DeviceHead {
  View<1> weight, bias;  // [heads], [1]
};
enum class LabelType : int { u8 = 0, i8 = 1, i16 = 2, i32 = 3, i64 = 4 };
// Integers in 0..255, or `ignore`; any other ends in an assertion on the device.
struct DeviceLabels {
  const void* data = nullptr;  // [B, h, w]
  LabelType type = LabelType::i64;
  int64_t stride[3] = {};
  int64_t ignore = 255;
};
struct PairResults {
  float* loss = nullptr;
  int64_t *pos_count = nullptr, *neg_count = nullptr;  // N+ + 1 and N- + 1
};
struct DeviceSlopes {  // dL/dA is -grad / (2 pos_count) for pairs with the same label, grad / (2 neg_count) for others
  DeviceLabels labels;
  const float* grad = nullptr;
  const int64_t *pos_count = nullptr, *neg_count = nullptr;
  View<4> kept;         // what the loss has kept; null data: the scores are computed again
  View<4> grad_window;  // used if the labels' data is null
};
struct DeviceGradients {
  View<4> query, key;  // or maps in query; null data: not wanted
  DeviceHead head;
};

// A loss may keep what its backward needs of the scores: [B, pairs of tiles, 64, 64], the sigmoid's derivatives, negative where labels
// agree, 0 where a pair does not count; for float32 queries in float32, else in float16 times 2^17. Null data: nothing is kept.
int64_t attention_cuda_workspace(const AttentionArgs& args);
Status window_affinity_cuda(const AttentionArgs& args, const DeviceHead& head, const View<4>& out, int device, void* stream);
Status attention_affinity_loss_cuda(const AttentionArgs& args, const DeviceHead& head, const DeviceLabels& labels, const PairResults& results,
                                    const View<4>& kept, void* workspace, int device, void* stream);
int64_t attention_backward_cuda_workspace(const AttentionArgs& args, int device);
Status attention_backward_cuda(const AttentionArgs& args, const DeviceHead& head, const DeviceSlopes& slopes, const DeviceGradients& out,
                               void* workspace, int device, void* stream);

Status affinity_from_maps_cuda(const MapsArgs& args, const DeviceHead& head, const View<4>& out, int device, void* stream);
int64_t affinity_from_maps_backward_cuda_workspace(const MapsArgs& args);
Status affinity_from_maps_backward_cuda(const MapsArgs& args, const DeviceHead& head, const DeviceSlopes& slopes,
                                        const DeviceGradients& out, void* workspace, int device, void* stream);

int64_t affinity_loss_cuda_workspace(const View<4>& window);
Status affinity_loss_cuda(const View<4>& window, const DeviceLabels& labels, int64_t radius, const PairResults& results, void* workspace,
                          int device, void* stream);
Status affinity_loss_backward_cuda(const View<4>& grad_window, const DeviceSlopes& slopes, int64_t radius, int device, void* stream);

}  // namespace afa
