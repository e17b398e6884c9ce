// The CUDA device as the launchers see it: its limits, which one is current, what was compiled for it, and what the runtime last
// complained of.
#pragma once

#include <string>
#include <utility>

#include "common/common.h"

namespace afa {

struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // per block, when asked for
  bool cooperative = false;
  int64_t l2_bytes = 0;
  int architecture = 0;  // 90 for 9.0
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

// What kernels may use is decided where they are compiled, not by the device they run on: the driver also compiles PTX of 7.5 for a
// 9.0, without what the sources leave out below 8.0. This is the architecture of the code that the current device runs, 75 for 7.5;
// 0 if it has none. What the sources leave out by __CUDA_ARCH__ must be asked for here: today tensor_cores.cuh, and nothing else
// (async_copy.cuh does the same another way; shared memory, multiprocessors and cooperative launches are the device's and the driver's
// to say).
int compiled_architecture();

// Whether a device can run this module's kernels: the runtime's error code and word why not, or 0 and "". Launches nothing.
std::pair<int, std::string> cuda_probe(int device);
// The CUDA versions of the driver and of the runtime in this module, as 13000 for 13.0; 0 where there is none.
int cuda_driver_version();
int cuda_runtime_version();

// Lets launches of a kernel on the current device have as much dynamic shared memory as it gives a block. Set once: if each launch
// set its own size, another thread's smaller one could come between that and the launch.
Status allow_shared_memory(const void* kernel);

// After a cooperative launch that found no room, as in a part of a device (green contexts, MPS, another process's share), the current
// device's limits say that it takes none.
bool cuda_found_no_room();  // whether that was this thread's last failure
Status cooperative_refused();
void forget_devices();  // what is remembered of them, for tests that go on with another one

// Keeps a CUDA error code for cuda_error_text(); ok if it is none.
Status cuda_failed(int error);
const char* cuda_error_text();  // of this thread's last failure

}  // namespace afa
