#include "path_affinity/path_affinity.h"

#include "bind/bind.h"

namespace py = pybind11;

namespace afa {

static PathArgs path_args(const View<4>& edge, const View<4>& window, int64_t radius, int64_t reach) {
  PathArgs args;
  args.edge = edge, args.window = window, args.radius = radius, args.reach = reach;
  return args;
}

void bind_path_affinity(py::module_& module) {
  module.def("path_affinity_cpu_workspace", [](const View<4>& edge, const View<4>& window, int64_t radius, int64_t reach,
                                               int threads) {
    return path_affinity_cpu_workspace(path_args(edge, window, radius, reach), threads);
  });
  module.def("path_affinity_cpu", [](const View<4>& edge, const View<4>& window, int64_t radius, int64_t reach, uint64_t workspace,
                                     int threads) {
    py::gil_scoped_release release;
    check(path_affinity_cpu(path_args(edge, window, radius, reach), pointer<void>(workspace), threads), "path_affinity_cpu");
  });
  module.def("path_affinity_gradient_cpu_workspace", [](const View<4>& edge, const View<4>& grad, int64_t radius, int64_t reach,
                                                        int threads) {
    return path_affinity_gradient_cpu_workspace(path_args(edge, grad, radius, reach), threads);
  });
  module.def("path_affinity_gradient_cpu", [](const View<4>& edge, const View<4>& grad, int64_t radius, int64_t reach,
                                              const View<4>& grad_edge, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(path_affinity_gradient_cpu(path_args(edge, grad, radius, reach), grad_edge, pointer<void>(workspace), threads),
          "path_affinity_gradient_cpu");
  });
#if AFA_WITH_CUDA
  module.def("path_affinity_cuda", [](const View<4>& edge, const View<4>& window, int64_t radius, int64_t reach, int device,
                                      uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(path_affinity_cuda(path_args(edge, window, radius, reach), device, pointer<void>(stream)), "path_affinity_cuda");
  });
  module.def("path_affinity_gradient_cuda_workspace", [](const View<4>& edge, const View<4>& grad, int64_t radius, int64_t reach) {
    return path_affinity_gradient_cuda_workspace(path_args(edge, grad, radius, reach));
  });
  module.def("path_affinity_gradient_cuda", [](const View<4>& edge, const View<4>& grad, int64_t radius, int64_t reach,
                                               const View<4>& grad_edge, uint64_t workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(path_affinity_gradient_cuda(path_args(edge, grad, radius, reach), grad_edge, pointer<void>(workspace), device,
                                           pointer<void>(stream)),
               "path_affinity_gradient_cuda");
  });
#endif
}

}  // namespace afa
