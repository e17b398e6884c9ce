// The CUDA device as the launchers see it: its limits, which one is current, and what the runtime last complained of.
#pragma once

#include "common.h"

namespace afa {

struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // per block, when asked for
  bool cooperative = false;
};
DeviceLimits device_limits();  // of the current device

// Makes a device current for as long as it lives; PyTorch's choice of device need not be known to this module's runtime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Keeps a CUDA error code for cuda_error_text(); ok if it is none.
Status cuda_failed(int error);
const char* cuda_error_text();  // of this thread's last failure

}  // namespace afa
