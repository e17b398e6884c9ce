#include "par/par.h"

#include "bind/bind.h"

namespace py = pybind11;

namespace afa {

// factors: w1, w2, w3 for PAR; none for PAMR.
static ParArgs par_args(const View<4>& images, const std::vector<int32_t>& dilations,
                        const std::vector<double>& factors) {
  ParArgs args;
  args.images = images, args.dilations = dilations.data(), args.num_dilations = int64_t(dilations.size());
  args.variant = factors.empty() ? ParVariant::pamr : ParVariant::par;
  if (!factors.empty()) args.w1 = float(factors.at(0)), args.w2 = float(factors.at(1)), args.w3 = float(factors.at(2));
  return args;
}

static DiffusionArgs mask_args(const View<4>& masks, const View<4>& out, const std::vector<uint8_t>& class_mask,
                               int64_t num_iter, bool transpose) {
  DiffusionArgs args;
  args.masks = masks, args.out = out, args.num_iter = num_iter, args.transpose = transpose;
  args.class_mask = class_mask.empty() ? nullptr : class_mask.data();
  return args;
}

void bind_par(py::module_& module) {
  module.def("par_cpu_workspace", [](const View<4>& images, const View<4>& masks, const std::vector<int32_t>& dilations,
                                     int threads) {
    return par_cpu_workspace(par_args(images, dilations, {}), mask_args(masks, masks, {}, 1, false), threads);
  });
  module.def("par_cpu", [](const View<4>& images, const View<4>& masks, const View<4>& out,
                           const std::vector<int32_t>& dilations, const std::vector<double>& factors,
                           const std::vector<uint8_t>& class_mask, int64_t num_iter, bool transpose, uint64_t workspace,
                           int threads) {
    py::gil_scoped_release release;
    check(par_cpu(par_args(images, dilations, factors), mask_args(masks, out, class_mask, num_iter, transpose),
                  pointer<void>(workspace), threads),
          "par_cpu");
  });
  module.def("par_weights_cpu_workspace", [](const View<4>& images, const std::vector<int32_t>& dilations, int threads) {
    return par_weights_cpu_workspace(par_args(images, dilations, {}), threads);
  });
  module.def("par_weights_cpu", [](const View<4>& images, const View<4>& out, const std::vector<int32_t>& dilations,
                                   const std::vector<double>& factors, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(par_weights_cpu(par_args(images, dilations, factors), out, pointer<void>(workspace), threads),
          "par_weights_cpu");
  });
#if AFA_WITH_CUDA
  module.def("par_cuda_workspace", [](const View<4>& images, const View<4>& masks, const std::vector<int32_t>& dilations,
                                      int64_t num_iter, bool transpose, bool half_weights, int device) {
    return par_cuda_workspace(par_args(images, dilations, {}), mask_args(masks, masks, {}, num_iter, transpose), half_weights,
                              device);
  });
  // class_mask: address of [B][C] bytes on the device, or 0.
  module.def("par_cuda", [](const View<4>& images, const View<4>& masks, const View<4>& out,
                            const std::vector<int32_t>& dilations, const std::vector<double>& factors, uint64_t class_mask,
                            int64_t num_iter, bool transpose, bool half_weights, const Scratch& workspace, int device,
                            uint64_t stream) {
    py::gil_scoped_release release;
    DiffusionArgs diffusion = mask_args(masks, out, {}, num_iter, transpose);
    diffusion.class_mask = pointer<uint8_t>(class_mask);
    check_cuda(par_cuda(par_args(images, dilations, factors), diffusion, half_weights, pointer<void>(workspace.first),
                        workspace.second, device,
                        pointer<void>(stream)),
               "par_cuda");
  });
  module.def("par_weights_cuda", [](const View<4>& images, const View<4>& out, const std::vector<int32_t>& dilations,
                                    const std::vector<double>& factors, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(par_weights_cuda(par_args(images, dilations, factors), out, device, pointer<void>(stream)), "par_weights_cuda");
  });
#endif
}

}  // namespace afa
