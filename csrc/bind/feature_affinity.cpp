#include "feature_affinity/feature_affinity.h"

#include <optional>

#include "bind/bind.h"

namespace py = pybind11;

namespace afa {

static FeatureArgs feature_args(const View<4>& features, int64_t radius, int kind) {
  FeatureArgs args;
  args.features = features, args.radius = radius, args.kind = static_cast<PairKind>(kind);
  return args;
}

void bind_feature_affinity(py::module_& module) {
  module.def("feature_affinity_cpu_workspace", [](const View<4>& features, int64_t radius, int kind, int threads) {
    return feature_affinity_cpu_workspace(feature_args(features, radius, kind), threads);
  });
  // slopes: None if they are not to be kept.
  module.def("feature_affinity_cpu", [](const View<4>& features, int64_t radius, int kind, const View<4>& out,
                                        const std::optional<View<4>>& slopes, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(feature_affinity_cpu(feature_args(features, radius, kind), out, slopes.value_or(View<4>()), pointer<void>(workspace),
                               threads),
          "feature_affinity_cpu");
  });
  module.def("feature_affinity_backward_cpu_workspace", [](const View<4>& features, int64_t radius, int kind, int threads) {
    return feature_affinity_backward_cpu_workspace(feature_args(features, radius, kind), threads);
  });
  module.def("feature_affinity_backward_cpu",
             [](const View<4>& features, int64_t radius, int kind, const View<4>& slopes, const View<4>& grad,
                const View<4>& grad_features, uint64_t workspace, int threads) {
               py::gil_scoped_release release;
               check(feature_affinity_backward_cpu(feature_args(features, radius, kind), slopes, grad, grad_features,
                                                   pointer<void>(workspace), threads),
                     "feature_affinity_backward_cpu");
             });
#if AFA_WITH_CUDA
  module.def("feature_affinity_cuda", [](const View<4>& features, int64_t radius, int kind, const View<4>& out,
                                         const std::optional<View<4>>& slopes, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(feature_affinity_cuda(feature_args(features, radius, kind), out, slopes.value_or(View<4>()), device,
                                     pointer<void>(stream)),
               "feature_affinity_cuda");
  });
  module.def("feature_affinity_backward_cuda_workspace", [](const View<4>& features, int64_t radius, int kind) {
    return feature_affinity_backward_cuda_workspace(feature_args(features, radius, kind));
  });
  module.def("feature_affinity_backward_cuda",
             [](const View<4>& features, int64_t radius, int kind, const View<4>& slopes, const View<4>& grad,
                const View<4>& grad_features, uint64_t workspace, int device, uint64_t stream) {
               py::gil_scoped_release release;
               check_cuda(feature_affinity_backward_cuda(feature_args(features, radius, kind), slopes, grad, grad_features,
                                                         pointer<void>(workspace), device, pointer<void>(stream)),
                          "feature_affinity_backward_cuda");
             });
#endif
}

}  // namespace afa
