#include "sinkhorn/sinkhorn.h"

#include "bind/bind.h"

namespace py = pybind11;

namespace afa {

static SinkhornArgs sinkhorn_args(const View<4>& affinity, int64_t radius, int64_t num_iter, double eps, bool symmetric) {
  SinkhornArgs args;
  args.affinity = affinity, args.radius = radius, args.num_iter = num_iter, args.eps = eps, args.symmetric = symmetric;
  return args;
}

// scales: address of [B][2 * num_iter][H][W] doubles.
void bind_sinkhorn(py::module_& module) {
  module.def("sinkhorn_cpu_workspace", [](const View<4>& affinity, int64_t radius, int threads) {
    return sinkhorn_cpu_workspace(sinkhorn_args(affinity, radius, 0, 0, false), threads);
  });
  module.def("sinkhorn_cpu", [](const View<4>& affinity, const View<4>& out, uint64_t scales, int64_t radius, int64_t num_iter,
                                double eps, bool symmetric, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(sinkhorn_cpu(sinkhorn_args(affinity, radius, num_iter, eps, symmetric), out, pointer<double>(scales),
                       pointer<void>(workspace), threads),
          "sinkhorn_cpu");
  });
  module.def("sinkhorn_gradient_cpu_workspace", [](const View<4>& affinity, int64_t radius, int64_t num_iter, int threads) {
    return sinkhorn_gradient_cpu_workspace(sinkhorn_args(affinity, radius, num_iter, 0, false), threads);
  });
  module.def("sinkhorn_gradient_cpu",
             [](const View<4>& affinity, uint64_t scales, const View<4>& grad, const View<4>& grad_affinity, int64_t radius,
                int64_t num_iter, double eps, bool symmetric, uint64_t workspace, int threads) {
               py::gil_scoped_release release;
               check(sinkhorn_gradient_cpu(sinkhorn_args(affinity, radius, num_iter, eps, symmetric), pointer<double>(scales), grad,
                                           grad_affinity, pointer<void>(workspace), threads),
                     "sinkhorn_gradient_cpu");
             });
#if AFA_WITH_CUDA
  module.def("sinkhorn_cuda", [](const View<4>& affinity, const View<4>& out, uint64_t scales, int64_t radius, int64_t num_iter,
                                 double eps, bool symmetric, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(sinkhorn_cuda(sinkhorn_args(affinity, radius, num_iter, eps, symmetric), out, pointer<double>(scales), device,
                             pointer<void>(stream)),
               "sinkhorn_cuda");
  });
  module.def("sinkhorn_gradient_cuda_workspace", [](const View<4>& affinity, int64_t radius, int64_t num_iter) {
    return sinkhorn_gradient_cuda_workspace(sinkhorn_args(affinity, radius, num_iter, 0, false));
  });
  module.def("sinkhorn_gradient_cuda",
             [](const View<4>& affinity, uint64_t scales, const View<4>& grad, const View<4>& grad_affinity, int64_t radius,
                int64_t num_iter, double eps, bool symmetric, uint64_t workspace, int device, uint64_t stream) {
               py::gil_scoped_release release;
               check_cuda(sinkhorn_gradient_cuda(sinkhorn_args(affinity, radius, num_iter, eps, symmetric), pointer<double>(scales),
                                                 grad, grad_affinity, pointer<void>(workspace), device, pointer<void>(stream)),
                          "sinkhorn_gradient_cuda");
             });
#endif
}

}  // namespace afa
