#include "bilateral/bilateral.h"

#include <array>

#include "bind/bind.h"
#include "common/radix_sort.h"

namespace py = pybind11;

namespace afa {

// Addresses of index, weight, near, start, point, share; the first two for a lattice whose corners alone are known.
static Lattice lattice_of(int64_t points, int64_t dims, int64_t vertices, const std::vector<uint64_t>& arrays) {
  Lattice lattice;
  lattice.points = points, lattice.dims = dims, lattice.vertices = vertices;
  if (arrays.size() >= 2) lattice.index = pointer<int32_t>(arrays[0]), lattice.weight = pointer<float>(arrays[1]);
  if (arrays.size() >= 6) {
    lattice.near = pointer<int32_t>(arrays[2]), lattice.start = pointer<int32_t>(arrays[3]);
    lattice.point = pointer<int32_t>(arrays[4]), lattice.share = pointer<float>(arrays[5]);
  }
  return lattice;
}

static BilateralArgs exact_args(const View<4>& images, const View<4>& values, const View<4>& out, double scale_rgb, double scale_xy) {
  BilateralArgs args;
  args.images = images, args.values = values, args.out = out;
  args.scale_rgb = float(scale_rgb), args.scale_xy = float(scale_xy);
  return args;
}

typedef std::tuple<int64_t, int64_t, int64_t, std::vector<uint64_t>, double, uint64_t> CrfKernelGiven;

static std::vector<CrfKernel> crf_kernels(const std::vector<CrfKernelGiven>& given) {
  std::vector<CrfKernel> kernels;
  for (const auto& [points, dims, vertices, arrays, scale, matrix] : given)
    kernels.push_back({lattice_of(points, dims, vertices, arrays), float(scale), pointer<float>(matrix)});
  return kernels;
}

static CrfStep crf_step(const std::vector<CrfKernel>& kernels, int64_t points, int64_t channels, const std::vector<uint64_t>& rows) {
  CrfStep step;
  step.kernels = kernels.data(), step.count = int64_t(kernels.size()), step.points = points, step.channels = channels;
  if (rows.size() >= 5) {
    step.base = pointer<float>(rows[0]), step.in = pointer<float>(rows[1]), step.logits = pointer<float>(rows[2]);
    step.spread = pointer<float>(rows[3]), step.out = pointer<float>(rows[4]);
  }
  return step;
}

void bind_bilateral(py::module_& module) {
  module.def("bilateral_filter_cpu_workspace", [](const View<4>& images, const View<4>& values, int threads) {
    return bilateral_exact_cpu_workspace(exact_args(images, values, values, 0, 0), threads);
  });
  // Returns how many pairs of tiles were met, and how many there are.
  module.def("bilateral_filter_cpu", [](const View<4>& images, const View<4>& values, const View<4>& out, double scale_rgb,
                                        double scale_xy, uint64_t workspace, int threads) {
    int64_t counted[2] = {};
    {
      py::gil_scoped_release release;
      BilateralArgs args = exact_args(images, values, out, scale_rgb, scale_xy);
      args.counted = counted;
      check(bilateral_exact_cpu(args, pointer<void>(workspace), threads), "bilateral_filter_cpu");
    }
    return std::make_pair(counted[0], counted[1]);
  });
  module.def("gaussian_cpu_workspace", [](const View<4>& values, double sigma, int threads) {
    return gaussian_cpu_workspace(values, float(sigma), threads);
  });
  module.def("gaussian_cpu", [](const View<4>& values, const View<4>& out, double sigma, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(gaussian_cpu(values, out, float(sigma), pointer<void>(workspace), threads), "gaussian_cpu");
  });
  module.def("lattice_build_cpu_workspace", &lattice_build_cpu_workspace);
  // Returns the number of vertices.
  module.def("lattice_corners_cpu", [](uint64_t features, int64_t points, int64_t dims, const std::vector<uint64_t>& arrays,
                                       uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    Lattice lattice = lattice_of(points, dims, 0, arrays);
    check(lattice_corners_cpu(pointer<float>(features), &lattice, pointer<void>(workspace), threads), "lattice_corners_cpu");
    return lattice.vertices;
  });
  module.def("lattice_links_cpu", [](int64_t points, int64_t dims, int64_t vertices, const std::vector<uint64_t>& arrays,
                                     uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    Lattice lattice = lattice_of(points, dims, vertices, arrays);
    check(lattice_links_cpu(&lattice, pointer<void>(workspace), threads), "lattice_links_cpu");
  });
  module.def("lattice_filter_cpu_workspace",
             [](int64_t points, int64_t dims, int64_t vertices, const View<4>& values, int threads) {
               return lattice_filter_cpu_workspace(lattice_of(points, dims, vertices, {}), values, threads);
             });
  module.def("lattice_filter_cpu", [](int64_t points, int64_t dims, int64_t vertices, const std::vector<uint64_t>& arrays,
                                      const View<4>& values, const View<4>& out, bool transpose, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(lattice_filter_cpu(lattice_of(points, dims, vertices, arrays), values, out, transpose, pointer<void>(workspace), threads),
          "lattice_filter_cpu");
  });
  // kernels: (points, dims, vertices, arrays) of a lattice, scale, address of a matrix or 0. Addresses of base, in, logits, spread, out.
  module.def("dense_crf_cpu_workspace", [](const std::vector<CrfKernelGiven>& kernels, int64_t points, int64_t channels) {
    const std::vector<CrfKernel> taken = crf_kernels(kernels);
    return dense_crf_cpu_workspace(crf_step(taken, points, channels, {}));
  });
  module.def("dense_crf_cpu", [](const std::vector<CrfKernelGiven>& kernels, int64_t points, int64_t channels,
                                 const std::vector<uint64_t>& rows, bool keep_logits, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    const std::vector<CrfKernel> taken = crf_kernels(kernels);
    CrfStep step = crf_step(taken, points, channels, rows);
    step.keep_logits = keep_logits;
    check(dense_crf_cpu(step, pointer<void>(workspace), threads), "dense_crf_cpu");
  });
#if AFA_WITH_CUDA
  module.def("bilateral_filter_cuda_workspace", [](const View<4>& images, const View<4>& values, int device) {
    return bilateral_exact_cuda_workspace(exact_args(images, values, values, 0, 0), device);
  });
  // counted: address of two integers on the device, to which pairs of tiles that are met, and that there are, are added; or 0.
  module.def("bilateral_filter_cuda", [](const View<4>& images, const View<4>& values, const View<4>& out, double scale_rgb,
                                         double scale_xy, uint64_t counted, uint64_t workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    BilateralArgs args = exact_args(images, values, out, scale_rgb, scale_xy);
    args.counted = pointer<int64_t>(counted);
    check_cuda(bilateral_exact_cuda(args, pointer<void>(workspace), device, pointer<void>(stream)), "bilateral_filter_cuda");
  });
  module.def("gaussian_cuda_workspace", [](const View<4>& values, double sigma) { return gaussian_cuda_workspace(values, float(sigma)); });
  module.def("gaussian_cuda", [](const View<4>& values, const View<4>& out, double sigma, uint64_t workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(gaussian_cuda(values, out, float(sigma), pointer<void>(workspace), device, pointer<void>(stream)), "gaussian_cuda");
  });
  module.def("radix_sort_cuda_workspace", &radix_sort_cuda_workspace);
  // Addresses of keys, payload (or 0), sorted keys, sorted payload.
  module.def("radix_sort_cuda", [](const std::array<uint64_t, 4>& arrays, int64_t count, int bits, uint64_t workspace, int device,
                                   uint64_t stream) {
    py::gil_scoped_release release;
    DeviceGuard guard(device);
    const SortPairs pairs = {pointer<uint32_t>(arrays[0]), pointer<int32_t>(arrays[1]), pointer<uint32_t>(arrays[2]),
                             pointer<int32_t>(arrays[3]), count, bits};
    check_cuda(radix_sort_cuda(pairs, pointer<void>(workspace), pointer<void>(stream)), "radix_sort_cuda");
  });
#endif
}

}  // namespace afa
