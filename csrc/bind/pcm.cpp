#include "pcm/pcm.h"

#include "bind/bind.h"

namespace py = pybind11;

namespace afa {

static PcmArgs pcm_args(const View<4>& values, const View<4>& features, const View<4>& sums) {
  PcmArgs args;
  args.values = values, args.features = features, args.sums = sums;
  return args;
}

static PcmArgs pcm_gradient_args(const View<4>& grad, const View<4>& values, const View<4>& features, const View<4>& grad_features) {
  PcmArgs args = pcm_args(values, features, grad);
  args.grad_features = grad_features;
  return args;
}

void bind_pcm(py::module_& module) {
  module.def("pcm_cpu_workspace", [](const View<4>& values, const View<4>& features, const View<4>& out, int threads) {
    return pcm_cpu_workspace(pcm_args(values, features, out), threads);
  });
  module.def("pcm_cpu",
             [](const View<4>& values, const View<4>& features, const View<4>& out, uint64_t workspace, int threads) {
               py::gil_scoped_release release;
               check(pcm_cpu(pcm_args(values, features, out), pointer<void>(workspace), threads), "pcm_cpu");
             });
  module.def("pcm_features_gradient_cpu_workspace", [](const View<4>& grad, const View<4>& values, const View<4>& features,
                                                       const View<4>& grad_features, int threads) {
    return pcm_features_gradient_cpu_workspace(pcm_gradient_args(grad, values, features, grad_features), threads);
  });
  module.def("pcm_features_gradient_cpu", [](const View<4>& grad, const View<4>& values, const View<4>& features,
                                             const View<4>& grad_features, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(pcm_features_gradient_cpu(pcm_gradient_args(grad, values, features, grad_features), pointer<void>(workspace), threads),
          "pcm_features_gradient_cpu");
  });
#if AFA_WITH_CUDA
  module.def("pcm_cuda_workspace", [](const View<4>& values, const View<4>& features, const View<4>& out, int device) {
    return pcm_cuda_workspace(pcm_args(values, features, out), device);
  });
  module.def("pcm_cuda", [](const View<4>& values, const View<4>& features, const View<4>& out, uint64_t workspace, int device,
                            uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(pcm_cuda(pcm_args(values, features, out), pointer<void>(workspace), device, pointer<void>(stream)), "pcm_cuda");
  });
  module.def("pcm_features_gradient_cuda_workspace", [](const View<4>& grad, const View<4>& values, const View<4>& features,
                                                        const View<4>& grad_features, int device) {
    return pcm_features_gradient_cuda_workspace(pcm_gradient_args(grad, values, features, grad_features), device);
  });
  module.def("pcm_features_gradient_cuda", [](const View<4>& grad, const View<4>& values, const View<4>& features,
                                              const View<4>& grad_features, uint64_t workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(pcm_features_gradient_cuda(pcm_gradient_args(grad, values, features, grad_features), pointer<void>(workspace), device,
                                          pointer<void>(stream)),
               "pcm_features_gradient_cuda");
  });
#endif
}

}  // namespace afa
