// What every kernel shares: status codes, element types, strided views.
// Nothing here, or anywhere in csrc, knows of a framework: pointers, sizes and a stream go in, a status comes out.
#pragma once

#include <cstdint>

namespace afa {

enum class Status : int {
  ok = 0,
  bad_argument = 1,   // sizes that contradict each other; the Python checks name the argument before it comes to this
  unsupported = 2,    // a combination this build or device cannot run
  launch_failed = 3,  // the CUDA runtime refused a launch; see cuda_error_text()
  not_resident = 4,   // no room for a cooperative launch, or the plan has changed since the scratch memory was asked for: ask and
                      // call again
};

inline const char* status_text(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::bad_argument: return "sizes or strides contradict each other";
    case Status::unsupported: return "not supported by this build or device";
    case Status::launch_failed: return "the CUDA runtime refused the launch";
    case Status::not_resident: return "the device has no room for a cooperative launch, or scratch memory is missing";
  }
  return "unknown status";
}

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// A strided tensor of rank N, on the host or on a device. Strides count elements and may be zero or negative.
template <int N>
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size[N] = {};
  int64_t stride[N] = {};
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace afa
