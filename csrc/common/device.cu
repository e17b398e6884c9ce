// Device limits, the current device, what was compiled for it, and the last error; see device.h.
// Occupancy: probe_kernel 32 x 16 (threads x blocks a multiprocessor, by registers); it stands for all kernels of the module, which are
// compiled for the same architectures, and is never launched.
#include <atomic>
#include <mutex>
#include <set>
#include <tuple>

#include "common/cuda_common.cuh"

namespace afa {

__global__ void __launch_bounds__(32, 16) probe_kernel() {}

static thread_local cudaError_t last_error = cudaSuccess;

Status cuda_failed(int error) {
  if (error == cudaSuccess) return Status::ok;
  last_error = static_cast<cudaError_t>(error);
  cudaGetLastError();  // a refused launch leaves nothing behind for the next call to trip over
  return Status::launch_failed;
}

const char* cuda_error_text() { return cudaGetErrorString(last_error); }

bool cuda_found_no_room() {
  return last_error == cudaErrorCooperativeLaunchTooLarge || last_error == cudaErrorLaunchOutOfResources;
}

constexpr int kMostDevices = 64;
static std::atomic<bool> refused[kMostDevices];
static std::atomic<int> compiled[kMostDevices];  // 0: not asked yet
static std::mutex allowed_lock;
static std::set<std::tuple<int, const void*, int>> allowed;  // kernels that may have a device's shared memory

static int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && device < kMostDevices ? device : -1;
}

DeviceLimits device_limits() {
  int device = 0, cooperative = 0, major = 0, minor = 0, l2 = 0;
  DeviceLimits limits;
  if (cudaGetDevice(&device) != cudaSuccess) return limits;
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  limits.l2_bytes = l2, limits.architecture = 10 * major + minor;
  limits.cooperative = cooperative != 0 && device < kMostDevices && !refused[device];
  return limits;
}

Status cooperative_refused() {
  const int device = current_device();
  if (device >= 0) refused[device] = true;
  return Status::not_resident;
}
void forget_devices() {
  for (auto& device : refused) device = false;
  for (auto& device : compiled) device = 0;
  std::lock_guard<std::mutex> guard(allowed_lock);
  allowed.clear();
}

int compiled_architecture() {
  const int device = current_device();
  if (device >= 0 && compiled[device] != 0) return compiled[device];
  cudaFuncAttributes attributes;
  if (cuda_failed(cudaFuncGetAttributes(&attributes, probe_kernel)) != Status::ok) return 0;
  if (device >= 0) compiled[device] = attributes.ptxVersion;
  return attributes.ptxVersion;  // also of machine code: what it was compiled from
}

std::pair<int, std::string> cuda_probe(int device) {
  cudaFuncAttributes attributes;
  int count = 0;
  Status status = cuda_failed(cudaGetDeviceCount(&count));
  if (status == Status::ok) {
    DeviceGuard guard(device);
    status = cuda_failed(cudaFuncGetAttributes(&attributes, probe_kernel));
  }
  if (status == Status::ok) return {0, ""};
  return {int(last_error), cuda_error_text()};
}

int cuda_driver_version() {
  int version = 0;
  return cuda_failed(cudaDriverGetVersion(&version)) == Status::ok ? version : 0;
}
int cuda_runtime_version() {
  int version = 0;
  return cuda_failed(cudaRuntimeGetVersion(&version)) == Status::ok ? version : 0;
}

Status allow_shared_memory(const void* kernel) {
  const int most = device_limits().shared_bytes, device = current_device();
  std::lock_guard<std::mutex> guard(allowed_lock);
  if (allowed.count({device, kernel, most})) return Status::ok;
  Status status = cuda_failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  cudaFuncAttributes attributes;  // what the kernel has besides may count too
  if (status != Status::ok && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
    status = cuda_failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - int(attributes.sharedSizeBytes)));
  if (status == Status::ok) allowed.insert({device, kernel, most});
  return status;
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
