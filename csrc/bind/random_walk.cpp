#include "random_walk/random_walk.h"

#include "bind/bind.h"

namespace py = pybind11;

namespace afa {

static WalkArgs walk_args(const View<4>& affinity, int64_t radius, float power, float eps) {
  WalkArgs args;
  args.affinity = affinity, args.radius = radius, args.power = power, args.eps = eps;
  return args;
}

static WalkMasks walk_masks(const View<4>& cams, const View<4>& out, const std::vector<uint8_t>& class_mask, int64_t num_steps,
                            bool transpose) {
  WalkMasks masks;
  masks.cams = cams, masks.out = out, masks.num_steps = num_steps, masks.transpose = transpose;
  masks.class_mask = class_mask.empty() ? nullptr : class_mask.data();
  return masks;
}

void bind_random_walk(py::module_& module) {
  module.def("random_walk_cpu_workspace", [](const View<4>& affinity, const View<4>& cams, int64_t radius, float power,
                                             int threads) {
    return random_walk_cpu_workspace(walk_args(affinity, radius, power, 1), walk_masks(cams, cams, {}, 1, false), threads);
  });
  module.def("random_walk_cpu", [](const View<4>& affinity, const View<4>& cams, const View<4>& out, int64_t radius, float power,
                                   float eps, const std::vector<uint8_t>& class_mask, int64_t num_steps, bool transpose,
                                   uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(random_walk_cpu(walk_args(affinity, radius, power, eps), walk_masks(cams, out, class_mask, num_steps, transpose),
                          pointer<void>(workspace), threads),
          "random_walk_cpu");
  });
  module.def("random_walk_affinity_gradient_cpu_workspace",
             [](const View<4>& affinity, const View<4>& states, int64_t radius, int threads) {
               return random_walk_affinity_gradient_cpu_workspace(walk_args(affinity, radius, 1, 1), states, threads);
             });
  module.def("random_walk_affinity_gradient_cpu",
             [](const View<4>& affinity, const View<4>& states, const View<4>& grads, const View<4>& grad_affinity, int64_t radius,
                float power, float eps, uint64_t workspace, int threads) {
               py::gil_scoped_release release;
               check(random_walk_affinity_gradient_cpu(walk_args(affinity, radius, power, eps), states, grads, grad_affinity,
                                                       pointer<void>(workspace), threads),
                     "random_walk_affinity_gradient_cpu");
             });
#if AFA_WITH_CUDA
  module.def("random_walk_cuda_workspace", [](const View<4>& affinity, const View<4>& cams, int64_t radius, int64_t num_steps,
                                              bool transpose, int device) {
    const WalkMasks masks = walk_masks(cams, cams, {}, num_steps, transpose);
    return random_walk_cuda_workspace(walk_args(affinity, radius, 1, 1), masks, device);
  });
  // class_mask: address of [B][C] bytes on the device, or 0.
  module.def("random_walk_cuda", [](const View<4>& affinity, const View<4>& cams, const View<4>& out, int64_t radius, float power,
                                    float eps, uint64_t class_mask, int64_t num_steps, bool transpose, const Scratch& workspace,
                                    int device, uint64_t stream) {
    py::gil_scoped_release release;
    WalkMasks masks = walk_masks(cams, out, {}, num_steps, transpose);
    masks.class_mask = pointer<uint8_t>(class_mask);
    check_cuda(random_walk_cuda(walk_args(affinity, radius, power, eps), masks, pointer<void>(workspace.first),
                                workspace.second, device,
                                pointer<void>(stream)),
               "random_walk_cuda");
  });
  module.def("random_walk_affinity_gradient_cuda_workspace", [](const View<4>& affinity, int64_t radius) {
    return random_walk_affinity_gradient_cuda_workspace(walk_args(affinity, radius, 1, 1));
  });
  module.def("random_walk_affinity_gradient_cuda",
             [](const View<4>& affinity, const View<4>& states, const View<4>& grads, const View<4>& grad_affinity, int64_t radius,
                float power, float eps, uint64_t workspace, int device, uint64_t stream) {
               py::gil_scoped_release release;
               check_cuda(random_walk_affinity_gradient_cuda(walk_args(affinity, radius, power, eps), states, grads, grad_affinity,
                                                             pointer<void>(workspace), device, pointer<void>(stream)),
                          "random_walk_affinity_gradient_cuda");
             });
#endif
}

}  // namespace afa
