#include "diffusion/diffusion.h"

#include <tuple>

#include "bind/bind.h"
#include "diffusion/plan.h"

namespace py = pybind11;

namespace afa {

static DiffusionArgs diffusion_args(const View<4>& weights, const View<4>& masks, const View<4>& out,
                                    const std::vector<int32_t>& offsets, const std::vector<uint8_t>& class_mask,
                                    int64_t num_iter, bool zero_border, bool transpose) {
  DiffusionArgs args;
  args.weights = weights, args.masks = masks, args.out = out;
  args.offsets = offsets.data(), args.taps = int64_t(offsets.size()) / 2;
  args.class_mask = class_mask.empty() ? nullptr : class_mask.data();
  args.num_iter = num_iter, args.border = zero_border ? Border::zero : Border::replicate, args.transpose = transpose;
  return args;
}

void bind_diffusion(py::module_& module) {
  module.def("diffuse_cpu_workspace", [](const View<4>& weights, const View<4>& masks, const std::vector<int32_t>& offsets,
                                         int threads) {
    return diffuse_cpu_workspace(diffusion_args(weights, masks, masks, offsets, {}, 1, false, false), threads);
  });
  module.def("diffuse_cpu_schedule", [](const View<4>& masks, const std::vector<int32_t>& offsets, int64_t num_iter, bool transpose,
                                        int threads) {
    const DiffusionArgs args = diffusion_args(masks, masks, masks, offsets, {}, num_iter, false, transpose);
    const Schedule schedule = diffuse_cpu_schedule(args, threads);
    return std::make_pair(schedule.depth, schedule.strip);
  }, "Iterations in a pass and columns of a strip, whatever the border and the classes that are present.");
  module.def("diffuse_cpu", [](const View<4>& weights, const View<4>& masks, const View<4>& out,
                               const std::vector<int32_t>& offsets, const std::vector<uint8_t>& class_mask, int64_t num_iter,
                               bool zero_border, bool transpose, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(diffuse_cpu(diffusion_args(weights, masks, out, offsets, class_mask, num_iter, zero_border, transpose),
                      pointer<void>(workspace), threads),
          "diffuse_cpu");
  });
  // device: multiprocessors, shared bytes of a block, bytes of L2, architecture.
  module.def("diffusion_plan", [](const View<4>& masks, const std::vector<int32_t>& offsets, int64_t num_iter, int planes, bool half,
                                  bool makes, std::tuple<int, int, int64_t, int> device) {
    const DiffusionArgs args = diffusion_args(masks, masks, masks, offsets, {}, num_iter, false, false);
    DeviceLimits limits;
    std::tie(limits.multiprocessors, limits.shared_bytes, limits.l2_bytes, limits.architecture) = device;
    limits.cooperative = true;
    const PlanChoice choice = choose_plan(args, planes, half, makes, limits, PlanWish::automatic);
    return std::make_tuple(choice.resident, choice.resident_us, choice.streaming_us, choice.card, choice.measured);
  }, "Whether the weights stay on chip; microseconds of an iteration, resident and streamed; whose constants, and if measured.");
#if AFA_WITH_CUDA
  module.def("diffuse_cuda_workspace", [](const View<4>& weights, const View<4>& masks, const std::vector<int32_t>& offsets,
                                          int64_t num_iter, bool transpose, int device) {
    return diffuse_cuda_workspace(diffusion_args(weights, masks, masks, offsets, {}, num_iter, false, transpose), device);
  });
  // class_mask: address of [B][C] bytes on the device, or 0.
  module.def("diffuse_cuda", [](const View<4>& weights, const View<4>& masks, const View<4>& out,
                                const std::vector<int32_t>& offsets, uint64_t class_mask, int64_t num_iter, bool zero_border,
                                bool transpose, const Scratch& workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    DiffusionArgs args = diffusion_args(weights, masks, out, offsets, {}, num_iter, zero_border, transpose);
    args.class_mask = pointer<uint8_t>(class_mask);
    check_cuda(diffuse_cuda(args, pointer<void>(workspace.first), workspace.second, device, pointer<void>(stream)),
               "diffuse_cuda");
  });
#endif
}

}  // namespace afa
