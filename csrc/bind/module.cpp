// The module afa_kernels._native.
#include "common/cpu.h"
#include "bind/bind.h"

#ifdef _OPENMP
#include <omp.h>
#endif

PYBIND11_MODULE(_native, module) {
  module.doc() = "AFA's kernels: raw addresses and sizes in, nothing of torch. Use the functions of afa_kernels instead.";
  module.def("cpu_isa", &afa::cpu_isa_name, "The instruction set the CPU kernels run with: baseline, avx2 or avx512.");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
#if AFA_WITH_CUDA
  module.attr("cuda") = true;
  pybind11::register_local_exception<afa::NotResident>(module, "NotResident", PyExc_RuntimeError);
  module.def("cuda_probe", &afa::cuda_probe, "Why a device cannot run the CUDA kernels, in the runtime's words; empty if it can.");
  module.def("cuda_versions", [] { return std::make_pair(afa::cuda_driver_version(), afa::cuda_runtime_version()); },
             "CUDA versions of the driver and of this module's runtime, 13000 for 13.0.");
#else
  module.attr("cuda") = false;
#endif
  afa::bind_diffusion(module);
  afa::bind_par(module);
  afa::bind_affinity(module);
  afa::bind_random_walk(module);
  afa::bind_path_affinity(module);
  afa::bind_feature_affinity(module);
  afa::bind_sinkhorn(module);
  afa::bind_bilateral(module);
  afa::bind_pcm(module);
}
