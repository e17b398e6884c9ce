// Between Python and the kernels: a tensor travels as (address, element type, shape, strides), everything else as integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/common.h"
#include "common/device.h"

namespace afa {

inline void check(Status status, const char* function) {
  if (status != Status::ok) throw std::runtime_error(std::string(function) + ": " + status_text(status));
}

#if AFA_WITH_CUDA
// Python's afa_kernels._native.NotResident: Status::not_resident.
struct NotResident : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check_cuda(Status status, const char* function) {
  if (status == Status::not_resident) throw NotResident(std::string(function) + ": " + status_text(status));
  if (status == Status::launch_failed)
    throw std::runtime_error(std::string(function) + ": CUDA: " + cuda_error_text());
  check(status, function);
}
#endif

// Scratch memory of a kernel that makes its plan at each call: address and bytes.
typedef std::pair<uint64_t, int64_t> Scratch;

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Each operator adds its functions to the module.
void bind_diffusion(pybind11::module_& module);
void bind_par(pybind11::module_& module);
void bind_affinity(pybind11::module_& module);
void bind_random_walk(pybind11::module_& module);
void bind_path_affinity(pybind11::module_& module);
void bind_feature_affinity(pybind11::module_& module);
void bind_sinkhorn(pybind11::module_& module);
void bind_bilateral(pybind11::module_& module);
void bind_pcm(pybind11::module_& module);

}  // namespace afa

namespace pybind11::detail {

// (data_ptr, dtype code, shape, strides) <-> View<N>
template <int N>
struct type_caster<afa::View<N>> {
  PYBIND11_TYPE_CASTER(afa::View<N>, const_name("tuple"));
  bool load(handle source, bool) {
    if (!isinstance<tuple>(source)) return false;
    auto parts = reinterpret_borrow<tuple>(source);
    if (parts.size() != 4) return false;
    auto shape = parts[2].cast<std::vector<int64_t>>(), strides = parts[3].cast<std::vector<int64_t>>();
    if (int(shape.size()) != N || int(strides.size()) != N) return false;
    value.data = afa::pointer<void>(parts[0].cast<uint64_t>());
    value.dtype = static_cast<afa::DType>(parts[1].cast<int>());
    for (int i = 0; i < N; ++i) value.size[i] = shape[i], value.stride[i] = strides[i];
    return true;
  }
};

}  // namespace pybind11::detail
