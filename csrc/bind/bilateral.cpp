#include "bilateral/bilateral.h"

#include <array>
#include <optional>

#include "bilateral/lattice_cuda.h"
#include "bind/bind.h"
#include "common/radix_sort.h"

namespace py = pybind11;

namespace afa {

// Height, width, dims, vertices, rows, the most of a tile; addresses of corner, weight, first, vertex, start, row, chained, chain, the
// first three for a lattice whose corners alone are known.
typedef std::pair<std::array<int64_t, 6>, std::vector<uint64_t>> LatticeGiven;

static TiledLattice lattice_of(const LatticeGiven& given) {
  const auto& [sizes, arrays] = given;
  TiledLattice lattice;
  lattice.height = sizes[0], lattice.width = sizes[1], lattice.dims = sizes[2], lattice.vertices = sizes[3];
  lattice.rows = sizes[4], lattice.most = sizes[5];
  if (arrays.size() >= 3) {
    lattice.corner = pointer<uint16_t>(arrays[0]), lattice.weight = pointer<float>(arrays[1]);
    lattice.first = pointer<int32_t>(arrays[2]);
  }
  if (arrays.size() >= 8) {
    lattice.vertex = pointer<int32_t>(arrays[3]), lattice.start = pointer<int32_t>(arrays[4]);
    lattice.row = pointer<int32_t>(arrays[5]), lattice.chained = pointer<int32_t>(arrays[6]), lattice.chain = pointer<int32_t>(arrays[7]);
  }
  return lattice;
}

static BilateralArgs exact_args(const View<4>& images, const View<4>& values, const View<4>& out, double scale_rgb, double scale_xy) {
  BilateralArgs args;
  args.images = images, args.values = values, args.out = out;
  args.scale_rgb = float(scale_rgb), args.scale_xy = float(scale_xy);
  return args;
}

// A lattice, scale, addresses of what points are multiplied with before and after, and of a matrix; each may be 0.
typedef std::tuple<LatticeGiven, double, std::array<uint64_t, 3>> CrfKernelGiven;

static std::vector<CrfKernel> crf_kernels(const std::vector<CrfKernelGiven>& given) {
  std::vector<CrfKernel> kernels;
  for (const auto& [lattice, scale, arrays] : given)
    kernels.push_back({lattice_of(lattice), float(scale), pointer<float>(arrays[0]), pointer<float>(arrays[1]), pointer<float>(arrays[2])});
  return kernels;
}

static CrfStep crf_step(const std::vector<CrfKernel>& kernels, const View<4>& unary) {
  CrfStep step;
  step.kernels = kernels.data(), step.count = int64_t(kernels.size()), step.unary = unary;
  return step;
}

#if AFA_WITH_CUDA
// Points, dims and address of a lattice, address of its weighed list or 0, scale, address of what its sums are multiplied with or 0.
typedef std::tuple<int64_t, int64_t, uint64_t, uint64_t, double, uint64_t> CudaKernelGiven;

static std::vector<CudaKernel> cuda_kernels(const std::vector<CudaKernelGiven>& given) {
  std::vector<CudaKernel> kernels;
  for (const auto& [points, dims, lattice, list, scale, after] : given)
    kernels.push_back({{points, dims, pointer<void>(lattice)}, pointer<void>(list), pointer<float>(after), float(scale)});
  return kernels;
}

static CudaStep cuda_step(const std::vector<CudaKernel>& kernels, int64_t points, int64_t channels) {
  CudaStep step;
  step.kernels = kernels.data(), step.count = int64_t(kernels.size()), step.points = points, step.channels = channels;
  return step;
}
#endif

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
  module.def("lattice_tiles", &lattice_tiles);
  module.def("lattice_corners_cpu_workspace",
             [](const LatticeGiven& given, int threads) { return lattice_corners_cpu_workspace(lattice_of(given), threads); });
  // features: address, strides of pixels and features, sigma, sigma_xy. Returns the number of rows, and the most of a tile.
  module.def("lattice_corners_cpu", [](const std::tuple<uint64_t, int64_t, int64_t, double, double>& features, const LatticeGiven& given,
                                       uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    const auto& [values, pixel_stride, feature_stride, sigma, sigma_xy] = features;
    const Features taken = {pointer<float>(values), pixel_stride, feature_stride, float(sigma), float(sigma_xy)};
    TiledLattice lattice = lattice_of(given);
    check(lattice_corners_cpu(taken, &lattice, pointer<void>(workspace), threads), "lattice_corners_cpu");
    return std::make_pair(lattice.rows, lattice.most);
  });
  module.def("lattice_links_cpu_workspace", [](const LatticeGiven& given) { return lattice_links_cpu_workspace(lattice_of(given)); });
  // Returns the number of vertices.
  module.def("lattice_links_cpu", [](const LatticeGiven& given, uint64_t first, uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    TiledLattice lattice = lattice_of(given);
    check(lattice_links_cpu(&lattice, pointer<void>(first), pointer<void>(workspace), threads), "lattice_links_cpu");
    return lattice.vertices;
  });
  module.def("lattice_filter_cpu_workspace", [](const LatticeGiven& given, const View<4>& values, int threads) {
    return lattice_filter_cpu_workspace(lattice_of(given), values, threads);
  });
  module.def("lattice_filter_cpu", [](const LatticeGiven& given, const View<4>& values, const View<4>& out, bool transpose,
                                      uint64_t workspace, int threads) {
    py::gil_scoped_release release;
    check(lattice_filter_cpu(lattice_of(given), values, out, transpose, pointer<void>(workspace), threads), "lattice_filter_cpu");
  });
  // Returns floats of base, bytes of the workspace.
  module.def("dense_crf_cpu_workspace", [](const std::vector<CrfKernelGiven>& kernels, const View<4>& unary, int threads) {
    const std::vector<CrfKernel> taken = crf_kernels(kernels);
    const CrfStep step = crf_step(taken, unary);
    return std::make_pair(dense_crf_cpu_base(step), dense_crf_cpu_workspace(step, threads));
  });
  // Returns the sums of |q - before| and of before * (log(before) - logits), if `before` is given.
  module.def("dense_crf_cpu", [](const std::vector<CrfKernelGiven>& kernels, const View<4>& unary, const std::optional<View<4>>& before,
                                 const std::optional<View<4>>& out, bool starts, bool goes_on, uint64_t base, uint64_t workspace,
                                 int threads) {
    py::gil_scoped_release release;
    const std::vector<CrfKernel> taken = crf_kernels(kernels);
    CrfStep step = crf_step(taken, unary);
    double sums[2] = {};
    step.starts = starts, step.goes_on = goes_on, step.sums = sums, step.base = pointer<float>(base);
    if (before) step.before = *before;
    if (out) step.out = *out;
    check(dense_crf_cpu(step, pointer<void>(workspace), threads), "dense_crf_cpu");
    return std::make_pair(sums[0], sums[1]);
  });
#if AFA_WITH_CUDA
  module.def("lattice_cuda_bytes", &lattice_cuda_bytes);
  // features: address. sigma_rgb 0 for place alone.
  module.def("lattice_features_cuda", [](const View<4>& images, double sigma_rgb, double sigma_xy, uint64_t features, int device,
                                         uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(lattice_features_cuda(images, float(sigma_rgb), float(sigma_xy), pointer<float>(features), device, pointer<void>(stream)),
               "lattice_features_cuda");
  });
  module.def("lattice_build_cuda_workspace", &lattice_build_cuda_workspace);
  module.def("lattice_build_cuda", [](uint64_t features, int64_t points, int64_t dims, int64_t images, uint64_t lattice,
                                      uint64_t workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(lattice_build_cuda({points, dims, pointer<void>(lattice)}, pointer<float>(features), images, pointer<void>(workspace),
                                  device, pointer<void>(stream)),
               "lattice_build_cuda");
  });
  module.def("lattice_weigh_cuda", [](int64_t points, int64_t dims, uint64_t lattice, uint64_t factor, uint64_t list, int device,
                                      uint64_t stream) {
    py::gil_scoped_release release;
    check_cuda(lattice_weigh_cuda({points, dims, pointer<void>(lattice)}, pointer<float>(factor), pointer<void>(list), device,
                                  pointer<void>(stream)),
               "lattice_weigh_cuda");
  });
  module.def("lattice_filter_cuda_workspace", [](int64_t points, int64_t dims, int64_t channels) {
    const std::vector<CudaKernel> kernel = {{{points, dims, nullptr}}};
    return lattice_step_cuda_workspace(cuda_step(kernel, points, channels));
  });
  // values, out: addresses of rows.
  module.def("lattice_filter_cuda", [](int64_t points, int64_t dims, uint64_t lattice, int64_t channels, uint64_t values, uint64_t out,
                                       bool transpose, uint64_t workspace, int device, uint64_t stream) {
    py::gil_scoped_release release;
    const std::vector<CudaKernel> kernel = {{{points, dims, pointer<void>(lattice)}}};
    CudaStep step = cuda_step(kernel, points, channels);
    step.in = pointer<float>(values), step.out = pointer<float>(out), step.transpose = transpose;
    check_cuda(lattice_step_cuda(step, pointer<void>(workspace), device, pointer<void>(stream)), "lattice_filter_cuda");
  });
  module.def("dense_crf_cuda_workspace", [](const std::vector<CudaKernelGiven>& kernels, int64_t points, int64_t channels) {
    const std::vector<CudaKernel> taken = cuda_kernels(kernels);
    return lattice_step_cuda_workspace(cuda_step(taken, points, channels));
  });
  // Addresses of in, near, base, matrix, q, out, logits, total, each or 0; finish as in lattice_cuda.h.
  module.def("dense_crf_cuda", [](const std::vector<CudaKernelGiven>& kernels, int64_t points, int64_t channels,
                                  const std::array<uint64_t, 8>& rows, bool transpose, int finish, uint64_t workspace, int device,
                                  uint64_t stream) {
    py::gil_scoped_release release;
    const std::vector<CudaKernel> taken = cuda_kernels(kernels);
    CudaStep step = cuda_step(taken, points, channels);
    step.in = pointer<float>(rows[0]), step.near = pointer<float>(rows[1]), step.base = pointer<float>(rows[2]);
    step.matrix = pointer<float>(rows[3]), step.q = pointer<float>(rows[4]), step.out = pointer<float>(rows[5]);
    step.logits = pointer<float>(rows[6]), step.total = pointer<float>(rows[7]);
    step.transpose = transpose, step.finish = static_cast<Finish>(finish);
    check_cuda(lattice_step_cuda(step, pointer<void>(workspace), device, pointer<void>(stream)), "dense_crf_cuda");
  });
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
