#include "affinity/affinity.h"

#include <algorithm>
#include <array>

#include "bind/bind.h"

namespace py = pybind11;

namespace afa {

// The affinity head travels as [weights..., bias], the grid as (height, width, radius).
typedef std::vector<float> Head;
typedef std::array<int64_t, 3> Grid;

static AttentionArgs attention_args(const View<4>& query, const View<4>& key, const Head& head, const Grid& grid) {
  if (int64_t(head.size()) != query.size[1] + 1) throw std::runtime_error("head: one weight for each head, and a bias");
  AttentionArgs args;
  args.query = query, args.key = key, args.head_weight = head.data(), args.head_bias = head.back();
  args.height = grid[0], args.width = grid[1], args.radius = grid[2];
  return args;
}

static MapsArgs maps_args(const View<4>& maps, const Head& head, const Grid& grid) {
  if (int64_t(head.size()) != maps.size[1] + 1) throw std::runtime_error("head: one weight for each head, and a bias");
  MapsArgs args;
  args.maps = maps, args.head_weight = head.data(), args.head_bias = head.back();
  args.height = grid[0], args.width = grid[1], args.radius = grid[2];
  return args;
}

// What a loss keeps, of the size that its kernels take it to have; or null.
static float* kept_at(const AttentionArgs& args, const View<4>& kept) {
  if (kept.data == nullptr) return nullptr;
  const int64_t radius = std::min(args.radius, std::max(args.height, args.width));
  const int64_t wanted = args.query.size[0] * args.height * args.width * (radius + 1) * (2 * radius + 1) * int64_t(sizeof(float));
  if (kept.dtype != DType::f32 || contiguous_bytes(kept) != wanted) throw std::runtime_error("kept: sizes or strides contradict each other");
  return static_cast<float*>(kept.data);
}

static PairGradient of_loss(uint64_t labels, float same, float different, const float* kept) {
  PairGradient gradient;
  gradient.labels = pointer<int32_t>(labels), gradient.same = same, gradient.different = different, gradient.kept = kept;
  return gradient;
}

static PairGradient of_window(const View<4>& grad_window) {
  PairGradient gradient;
  gradient.grad_window = grad_window;
  return gradient;
}

static py::tuple as_tuple(const PairSums& sums) {
  return py::make_tuple(sums.same, sums.different, sums.same_count, sums.different_count);
}

static std::vector<double> attention_backward(const AttentionArgs& args, const PairGradient& gradient, const View<4>& grad_query,
                                              const View<4>& grad_key, uint64_t workspace, int threads) {
  std::vector<double> head(args.query.size[1] + 1);
  AttentionGradients out;
  out.query = grad_query, out.key = grad_key, out.head = head.data();
  py::gil_scoped_release release;
  check(attention_backward_cpu(args, gradient, out, pointer<void>(workspace), threads), "attention_backward_cpu");
  return head;
}

static void bind_attention(py::module_& module) {
  module.def("attention_cpu_workspace",
             [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid, int threads) {
               return window_affinity_cpu_workspace(attention_args(query, key, head, grid), threads);
             });
  module.def("window_affinity_cpu", [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid,
                                       const View<4>& out, uint64_t workspace, int threads) {
    const AttentionArgs args = attention_args(query, key, head, grid);
    py::gil_scoped_release release;
    check(window_affinity_cpu(args, out, pointer<void>(workspace), threads), "window_affinity_cpu");
  });
  module.def("attention_affinity_loss_cpu", [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid,
                                               uint64_t labels, const View<4>& kept, uint64_t workspace, int threads) {
    const AttentionArgs args = attention_args(query, key, head, grid);
    float* derivatives = kept_at(args, kept);
    PairSums sums;
    {
      py::gil_scoped_release release;
      check(attention_affinity_loss_cpu(args, pointer<int32_t>(labels), &sums, derivatives, pointer<void>(workspace), threads),
            "attention_affinity_loss_cpu");
    }
    return as_tuple(sums);
  });
  module.def("attention_backward_cpu_workspace",
             [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid, int threads) {
               return attention_backward_cpu_workspace(attention_args(query, key, head, grid), threads);
             });
  module.def("window_affinity_backward_cpu", [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid,
                                                const View<4>& grad_window, const View<4>& grad_query, const View<4>& grad_key,
                                                uint64_t workspace, int threads) {
    return attention_backward(attention_args(query, key, head, grid), of_window(grad_window), grad_query, grad_key, workspace,
                              threads);
  });
  module.def("attention_affinity_loss_backward_cpu",
             [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid, uint64_t labels, float same,
                float different, const View<4>& kept, const View<4>& grad_query, const View<4>& grad_key, uint64_t workspace,
                int threads) {
               const AttentionArgs args = attention_args(query, key, head, grid);
               return attention_backward(args, of_loss(labels, same, different, kept_at(args, kept)), grad_query, grad_key, workspace,
                                         threads);
             });
}

static void bind_maps(py::module_& module) {
  module.def("affinity_from_maps_cpu_workspace", [](const View<4>& maps, const Head& head, const Grid& grid, int threads) {
    return affinity_from_maps_cpu_workspace(maps_args(maps, head, grid), threads);
  });
  module.def("affinity_from_maps_cpu", [](const View<4>& maps, const Head& head, const Grid& grid, const View<4>& out,
                                          uint64_t workspace, int threads) {
    const MapsArgs args = maps_args(maps, head, grid);
    py::gil_scoped_release release;
    check(affinity_from_maps_cpu(args, out, pointer<void>(workspace), threads), "affinity_from_maps_cpu");
  });
  module.def("affinity_from_maps_backward_cpu_workspace",
             [](const View<4>& maps, const Head& head, const Grid& grid, int threads) {
               return affinity_from_maps_backward_cpu_workspace(maps_args(maps, head, grid), threads);
             });
  module.def("affinity_from_maps_backward_cpu", [](const View<4>& maps, const Head& head, const Grid& grid,
                                                   const View<4>& grad_window, const View<4>& grad_maps, uint64_t workspace,
                                                   int threads) {
    const MapsArgs args = maps_args(maps, head, grid);
    std::vector<double> grad_head(head.size());
    py::gil_scoped_release release;
    check(affinity_from_maps_backward_cpu(args, of_window(grad_window), grad_maps, grad_head.data(),
                                          pointer<void>(workspace), threads),
          "affinity_from_maps_backward_cpu");
    return grad_head;
  });
}

static void bind_loss(py::module_& module) {
  module.def("affinity_loss_cpu", [](const View<4>& window, uint64_t labels, int64_t radius, int threads) {
    PairSums sums;
    {
      py::gil_scoped_release release;
      check(affinity_loss_cpu(window, pointer<int32_t>(labels), radius, &sums, threads), "affinity_loss_cpu");
    }
    return as_tuple(sums);
  });
  module.def("affinity_loss_backward_cpu", [](const View<4>& grad_window, uint64_t labels, int64_t radius, float same,
                                              float different, int threads) {
    py::gil_scoped_release release;
    check(affinity_loss_backward_cpu(grad_window, pointer<int32_t>(labels), radius, same, different, threads),
          "affinity_loss_backward_cpu");
  });
}

#if AFA_WITH_CUDA
// On a GPU the head's weight and bias are tensors there, and so are a loss's results: addresses (loss, pos_count, neg_count). Labels
// travel as other tensors do, their element type by LabelType.
static AttentionArgs device_args(const View<4>& query, const View<4>& key, const Grid& grid) {
  AttentionArgs args;
  args.query = query, args.key = key, args.height = grid[0], args.width = grid[1], args.radius = grid[2];
  return args;
}
static MapsArgs device_args(const View<4>& maps, const Grid& grid) {
  MapsArgs args;
  args.maps = maps, args.height = grid[0], args.width = grid[1], args.radius = grid[2];
  return args;
}
static DeviceLabels labels_at(const View<3>& view, int64_t ignore) {
  DeviceLabels labels;
  labels.data = view.data, labels.type = static_cast<LabelType>(view.dtype), labels.ignore = ignore;
  for (int i = 0; i < 3; ++i) labels.stride[i] = view.stride[i];
  return labels;
}
typedef std::array<uint64_t, 3> Addresses;
static PairResults results_at(const Addresses& at) {
  PairResults results;
  results.loss = pointer<float>(at[0]), results.pos_count = pointer<int64_t>(at[1]), results.neg_count = pointer<int64_t>(at[2]);
  return results;
}
// Addresses of the loss's gradient, pos_count and neg_count.
static DeviceSlopes slopes_at(const DeviceLabels& labels, const Addresses& at, const View<4>& kept = View<4>()) {
  DeviceSlopes slopes;
  slopes.labels = labels, slopes.kept = kept, slopes.grad = pointer<float>(at[0]);
  slopes.pos_count = pointer<int64_t>(at[1]), slopes.neg_count = pointer<int64_t>(at[2]);
  return slopes;
}
static DeviceSlopes slopes_of(const View<4>& grad_window) {
  DeviceSlopes slopes;
  slopes.grad_window = grad_window;
  return slopes;
}

typedef const View<4>& V;
typedef const View<1>& W;  // of the head
typedef const View<3>& L;  // labels

static void bind_attention_cuda(py::module_& module) {
  module.def("attention_cuda_workspace",
             [](V query, V key, const Grid& grid) { return attention_cuda_workspace(device_args(query, key, grid)); });
  module.def("window_affinity_cuda", [](V query, V key, W weight, W bias, const Grid& grid, V out, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(window_affinity_cuda(device_args(query, key, grid), {weight, bias}, out, device, pointer<void>(stream)),
               "window_affinity_cuda");
  });
  module.def("attention_affinity_loss_cuda",
             [](V query, V key, W weight, W bias, const Grid& grid, L labels, int64_t ignore, const Addresses& results, V kept,
                uint64_t workspace, int device, uint64_t stream) {
               py::gil_scoped_release release;
               check_cuda(attention_affinity_loss_cuda(device_args(query, key, grid), {weight, bias}, labels_at(labels, ignore),
                                                       results_at(results), kept, pointer<void>(workspace), device,
                                                       pointer<void>(stream)),
                          "attention_affinity_loss_cuda");
             });
  module.def("attention_backward_cuda_workspace", [](V query, V key, const Grid& grid, int device) {
    return attention_backward_cuda_workspace(device_args(query, key, grid), device);
  });
  module.def("window_affinity_backward_cuda",
             [](V query, V key, W weight, W bias, const Grid& grid, V grad_window, V grad_query, V grad_key, W grad_weight,
                W grad_bias, uint64_t workspace, int device, uint64_t stream) {
               py::gil_scoped_release release;
               check_cuda(attention_backward_cuda(device_args(query, key, grid), {weight, bias}, slopes_of(grad_window),
                                                  {grad_query, grad_key, {grad_weight, grad_bias}}, pointer<void>(workspace),
                                                  device, pointer<void>(stream)),
                          "window_affinity_backward_cuda");
             });
  module.def("attention_affinity_loss_backward_cuda",
             [](V query, V key, W weight, W bias, const Grid& grid, L labels, int64_t ignore, const Addresses& slopes, V kept,
                V grad_query, V grad_key, W grad_weight, W grad_bias, uint64_t workspace, int device, uint64_t stream) {
               py::gil_scoped_release release;
               check_cuda(attention_backward_cuda(device_args(query, key, grid), {weight, bias},
                                                  slopes_at(labels_at(labels, ignore), slopes, kept),
                                                  {grad_query, grad_key, {grad_weight, grad_bias}}, pointer<void>(workspace),
                                                  device, pointer<void>(stream)),
                          "attention_affinity_loss_backward_cuda");
             });
}

static void bind_maps_cuda(py::module_& module) {
  module.def("affinity_from_maps_cuda", [](V maps, W weight, W bias, const Grid& grid, V out, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(affinity_from_maps_cuda(device_args(maps, grid), {weight, bias}, out, device, pointer<void>(stream)),
               "affinity_from_maps_cuda");
  });
  module.def("affinity_from_maps_backward_cuda_workspace",
             [](V maps, const Grid& grid) { return affinity_from_maps_backward_cuda_workspace(device_args(maps, grid)); });
  module.def("affinity_from_maps_backward_cuda",
             [](V maps, W weight, W bias, const Grid& grid, V grad_window, V grad_maps, W grad_weight, W grad_bias,
                uint64_t workspace, int device, uint64_t stream) {
               py::gil_scoped_release release;
               check_cuda(affinity_from_maps_backward_cuda(device_args(maps, grid), {weight, bias}, slopes_of(grad_window),
                                                           {grad_maps, View<4>(), {grad_weight, grad_bias}},
                                                           pointer<void>(workspace), device, pointer<void>(stream)),
                          "affinity_from_maps_backward_cuda");
             });
}

static void bind_loss_cuda(py::module_& module) {
  module.def("affinity_loss_cuda_workspace", [](V window) { return affinity_loss_cuda_workspace(window); });
  module.def("affinity_loss_cuda", [](V window, L labels, int64_t ignore, int64_t radius, const Addresses& results,
                                      uint64_t workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(affinity_loss_cuda(window, labels_at(labels, ignore), radius, results_at(results), pointer<void>(workspace), device,
                                  pointer<void>(stream)),
               "affinity_loss_cuda");
  });
  module.def("affinity_loss_backward_cuda", [](V grad_window, L labels, int64_t ignore, int64_t radius, const Addresses& slopes,
                                               int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(affinity_loss_backward_cuda(grad_window, slopes_at(labels_at(labels, ignore), slopes), radius, device,
                                           pointer<void>(stream)),
               "affinity_loss_backward_cuda");
  });
}
#endif

void bind_affinity(py::module_& module) {
  bind_attention(module);
  bind_maps(module);
  bind_loss(module);
#if AFA_WITH_CUDA
  bind_attention_cuda(module);
  bind_maps_cuda(module);
  bind_loss_cuda(module);
#endif
}

}  // namespace afa
