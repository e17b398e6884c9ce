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
  // By Python's own functions: pybind11's conversions cost more than all else that a launch takes of the host.
  bool load(handle source, bool) {
    if (!of_length(source.ptr(), 4)) return false;
    PyObject *shape = PyTuple_GET_ITEM(source.ptr(), 2), *strides = PyTuple_GET_ITEM(source.ptr(), 3);
    if (!of_length(shape, N) || !of_length(strides, N)) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = static_cast<afa::DType>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 1)));
    for (int i = 0; i < N; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }
  static bool of_length(PyObject* object, int length) { return PyTuple_Check(object) && PyTuple_GET_SIZE(object) == length; }
};

}  // namespace pybind11::detail
