#include "../affinity.h"

#include <array>

#include "bind.h"

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

static PairGradient of_loss(uint64_t labels, float same, float different) {
  PairGradient gradient;
  gradient.labels = pointer<int32_t>(labels), gradient.same = same, gradient.different = different;
  return gradient;
}

static PairGradient of_window(const View<4>& window, const View<4>& grad_window) {
  PairGradient gradient;
  gradient.window = window, gradient.grad_window = grad_window;
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
                                               uint64_t labels, uint64_t workspace, int threads) {
    const AttentionArgs args = attention_args(query, key, head, grid);
    PairSums sums;
    {
      py::gil_scoped_release release;
      check(attention_affinity_loss_cpu(args, pointer<int32_t>(labels), &sums, pointer<void>(workspace), threads),
            "attention_affinity_loss_cpu");
    }
    return as_tuple(sums);
  });
  module.def("attention_backward_cpu_workspace",
             [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid, int threads) {
               return attention_backward_cpu_workspace(attention_args(query, key, head, grid), threads);
             });
  module.def("window_affinity_backward_cpu", [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid,
                                                const View<4>& window, const View<4>& grad_window, const View<4>& grad_query,
                                                const View<4>& grad_key, uint64_t workspace, int threads) {
    return attention_backward(attention_args(query, key, head, grid), of_window(window, grad_window), grad_query, grad_key,
                              workspace, threads);
  });
  module.def("attention_affinity_loss_backward_cpu",
             [](const View<4>& query, const View<4>& key, const Head& head, const Grid& grid, uint64_t labels, float same,
                float different, const View<4>& grad_query, const View<4>& grad_key, uint64_t workspace, int threads) {
               return attention_backward(attention_args(query, key, head, grid), of_loss(labels, same, different), grad_query,
                                         grad_key, workspace, threads);
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
  module.def("affinity_from_maps_backward_cpu", [](const View<4>& maps, const Head& head, const Grid& grid, const View<4>& window,
                                                   const View<4>& grad_window, const View<4>& grad_maps, uint64_t workspace,
                                                   int threads) {
    const MapsArgs args = maps_args(maps, head, grid);
    std::vector<double> grad_head(head.size());
    py::gil_scoped_release release;
    check(affinity_from_maps_backward_cpu(args, of_window(window, grad_window), grad_maps, grad_head.data(),
                                          pointer<void>(workspace), threads),
          "affinity_from_maps_backward_cpu");
    return grad_head;
  });
}

void bind_affinity(py::module_& module) {
  bind_attention(module);
  bind_maps(module);
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

}  // namespace afa
