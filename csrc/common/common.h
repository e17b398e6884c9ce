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

// Static, all of these: see cpu.h.
static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
static inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

template <int N>
static inline bool same_size(const View<N>& a, const View<N>& b) {
  for (int i = 0; i < N; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}
template <int N>
static inline bool is_empty(const View<N>& view) {
  for (int i = 0; i < N; ++i)
    if (view.size[i] < 1) return true;
  return false;
}
// As many images of the same height and width, none of them empty; of channels one may have more than the other, or none.
static inline bool same_images(const View<4>& a, const View<4>& b) {
  for (int i = 0; i < 4; ++i)
    if (i != 1 && (a.size[i] != b.size[i] || a.size[i] < 1)) return false;
  return true;
}

// Bytes of a tensor whose elements lie one behind the other in the order of its axes; -1 of any other.
template <int N>
static inline int64_t contiguous_bytes(const View<N>& view) {
  int64_t count = 1;
  for (int i = N - 1; i >= 0; --i) {
    if (view.size[i] > 1 && view.stride[i] != count) return -1;
    count *= view.size[i];
  }
  return count * element_bytes(view.dtype);
}
// Lays the rows of a tensor one behind the other, each padded to a multiple of elements.
static inline void pack_rows(View<4>* view, int64_t multiple) {
  view->stride[3] = 1, view->stride[2] = round_up(view->size[3], multiple);
  view->stride[1] = view->stride[2] * view->size[2], view->stride[0] = view->stride[1] * view->size[1];
}

}  // namespace afa
