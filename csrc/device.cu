// Device limits, the current device and the last error; see device.h.
#include "cuda_common.cuh"

namespace afa {

static thread_local cudaError_t last_error = cudaSuccess;

Status cuda_failed(int error) {
  if (error == cudaSuccess) return Status::ok;
  last_error = static_cast<cudaError_t>(error);
  cudaGetLastError();  // a refused launch leaves nothing behind for the next call to trip over
  return Status::launch_failed;
}

const char* cuda_error_text() { return cudaGetErrorString(last_error); }

DeviceLimits device_limits() {
  int device = 0, cooperative = 0;
  DeviceLimits limits;
  if (cudaGetDevice(&device) != cudaSuccess) return limits;
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  limits.cooperative = cooperative != 0;
  return limits;
}

DeviceGuard::DeviceGuard(int device) {
  cudaGetDevice(&previous_);
  if (previous_ == device)
    previous_ = -1;
  else
    cudaSetDevice(device);
}
DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace afa
