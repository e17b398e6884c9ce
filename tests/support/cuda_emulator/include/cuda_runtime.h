// Stands in for CUDA's own header when g++ compiles csrc/*/*.cu for the emulator: the language (qualifiers, built-in variables,
// vector types, barriers, warp collectives, atomics) and as much of the runtime API as the sources use.
// What is missing here fails to compile: `__shared__` on purpose, kernels take shared memory from SharedArena (common/cuda_common.cuh).
#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "emulator.h"

#define AFA_CUDA_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// Objects rather than macros: the runtime's own structures have members of these names.
template <const emulator::Dim3& (*kGet)()>
struct EmulatedIndex {
  struct { operator unsigned() const { return kGet().x; } } x;
  struct { operator unsigned() const { return kGet().y; } } y;
  struct { operator unsigned() const { return kGet().z; } } z;
};
constexpr EmulatedIndex<emulator::thread_index> threadIdx{};
constexpr EmulatedIndex<emulator::block_index> blockIdx{};
constexpr EmulatedIndex<emulator::block_size> blockDim{};
constexpr EmulatedIndex<emulator::grid_size> gridDim{};
constexpr int warpSize = 32;

using dim3 = emulator::Dim3;
// Vectors keep CUDA's alignment, so a misaligned 16-byte load is caught by the undefined-behaviour sanitizer.
struct __align__(8) int2 { int x, y; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Barriers and collectives. The call's place goes along, so that threads at different barriers of one block show.
#define AFA_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(AFA_PLACE) { emulator::block_barrier({file, line}); }
inline int __syncthreads_or(int predicate, AFA_PLACE) { return emulator::block_vote(predicate, {file, line}) > 0; }
inline int __syncthreads_count(int predicate, AFA_PLACE) { return emulator::block_vote(predicate, {file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, AFA_PLACE) { emulator::warp_barrier(mask, {file, line}); }

template <class T>
T emulator_shuffle(unsigned mask, T value, int source, emulator::Place place) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* all = emulator::warp_exchange(mask, bits, place);
  if (!(mask >> source & 1)) emulator::fail("a shuffle reads a lane that is not in its mask", place);
  std::memcpy(&value, &all[source], sizeof value);
  return value;
}
inline int emulator_lane() { return emulator::current->lane; }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, AFA_PLACE) {
  return emulator_shuffle(mask, value, (emulator_lane() & ~(width - 1)) | (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, AFA_PLACE) {
  const int lane = emulator_lane(), source = lane ^ bits;
  return emulator_shuffle(mask, value, source / width == lane / width ? source : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, AFA_PLACE) {
  const int lane = emulator_lane(), source = lane + int(delta);
  return emulator_shuffle(mask, value, source / width == lane / width ? source : lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, AFA_PLACE) {
  const int lane = emulator_lane(), source = lane - int(delta);
  return emulator_shuffle(mask, value, lane % width >= int(delta) ? source : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, AFA_PLACE) {
  const uint64_t* all = emulator::warp_exchange(mask, predicate != 0, {file, line});
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= unsigned(all[lane]) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, AFA_PLACE) { return __ballot_sync(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, AFA_PLACE) { return __ballot_sync(mask, predicate, file, line) == mask; }
inline unsigned __activemask() { return emulator::live_lanes(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

// One thread runs at a time, so plain reads and writes are atomic; ThreadSanitizer must not take them for what they are.
template <class T, class Change>
__attribute__((noinline, no_sanitize("thread"))) T emulator_atomic(T* at, Change change) {
  emulator::order_atomic(at);
  T old = *at;
  *at = change(old);
  return old;
}
template <class T>
T atomicAdd(T* at, T value) { return emulator_atomic(at, [=](T old) { return T(old + value); }); }
template <class T>
T atomicMax(T* at, T value) { return emulator_atomic(at, [=](T old) { return value > old ? value : old; }); }
template <class T>
T atomicMin(T* at, T value) { return emulator_atomic(at, [=](T old) { return value < old ? value : old; }); }
template <class T>
T atomicOr(T* at, T value) { return emulator_atomic(at, [=](T old) { return T(old | value); }); }
template <class T>
T atomicExch(T* at, T value) { return emulator_atomic(at, [=](T) { return value; }); }
template <class T>
T atomicCAS(T* at, T expected, T value) { return emulator_atomic(at, [=](T old) { return old == expected ? value : old; }); }

template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T __ldcg(const T* at) { return *at; }
template <class T>
T __ldcs(const T* at) { return *at; }
template <class T>
void __stcg(T* at, T value) { *at = value; }
template <class T>
void __stcs(T* at, T value) { *at = value; }

// Roundings that no compiler may leave out by fusing; built contracted, the host's compiler would.
inline float emulator_rounded(float x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  volatile float kept = x;
  x = kept;
#endif
  return x;
}
inline float __fmul_rn(float a, float b) { return emulator_rounded(a * b); }
inline float __fadd_rn(float a, float b) { return emulator_rounded(emulator_rounded(a) + emulator_rounded(b)); }
inline float __fsub_rn(float a, float b) { return emulator_rounded(emulator_rounded(a) - emulator_rounded(b)); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { return __int_as_float(int(x)); }
inline unsigned __float_as_uint(float x) { return unsigned(__float_as_int(x)); }
#define AFA_MIN_MAX(T)                                       \
  inline T min(T a, T b) { return b < a ? b : a; }           \
  inline T max(T a, T b) { return a < b ? b : a; }
AFA_MIN_MAX(int)
AFA_MIN_MAX(unsigned)
AFA_MIN_MAX(long)
AFA_MIN_MAX(unsigned long)
AFA_MIN_MAX(long long)
#undef AFA_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// The runtime API.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
typedef struct CUstream_st* cudaStream_t;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttributeValue { int cooperative; };
struct cudaLaunchAttribute { cudaLaunchAttributeID id; cudaLaunchAttributeValue val; };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulator::error_text();
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::settings().multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::settings().shared_bytes; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrL2CacheSize: *value = int(emulator::settings().l2_bytes); break;
    case cudaDevAttrComputeCapabilityMajor: *value = 7; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 5; break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  ++emulator::counts().memsets;
  if (!emulator::settings().dry) std::memset(at, value, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulator::settings().shared_bytes) return emulator::set_error("more shared memory than the device has"), cudaErrorInvalidValue;
  emulator::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  if (emulator::settings().pause > 0) std::this_thread::sleep_for(std::chrono::microseconds(emulator::settings().pause));
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
  size_t sharedSizeBytes;
};
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  const int compiled = emulator::settings().compiled;
  if (compiled == 0)
    return emulator::set_error("no kernel image is available for execution on the device"), cudaErrorNoKernelImageForDevice;
  *attributes = {compiled, compiled, 0};
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int threads, size_t shared) {
  const int by_threads = 2048 / threads, by_shared = int(emulator::settings().shared_bytes / (shared ? shared : 1));
  return *blocks = by_threads < by_shared ? by_threads : by_shared, cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  ++emulator::counts().launches;
  if (emulator::settings().dry) return cudaSuccess;
  std::tuple<std::decay_t<Parameters>...> values{std::forward<Arguments>(arguments)...};
  emulator::Launch launch;
  launch.grid = config->gridDim, launch.block = config->blockDim, launch.shared_bytes = int64_t(config->dynamicSmemBytes);
  launch.function = reinterpret_cast<const void*>(kernel);
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) launch.cooperative = config->attrs[i].val.cooperative;
  // Every thread gets its own copy of the parameters, as on a device.
  launch.body = [values, kernel] {
    auto copy = values;
    std::apply(kernel, copy);
  };
  if (launch.cooperative && int64_t(launch.grid.count()) > emulator::settings().room)
    return emulator::set_error("too many blocks in cooperative launch"), cudaErrorCooperativeLaunchTooLarge;
  return emulator::run(launch) ? cudaSuccess : cudaErrorLaunchFailure;
}
