// Kernels with one fault each: the emulator must complain of every one of them. `sound` is the same work without a fault.
#include <string>

#include "common/async_copy.cuh"

namespace afa {

// out[i] = 2 * (the neighbour's number), through shared memory: 64 threads.
template <int kFault>
__global__ void faulty(float* out) {
  enum { sound, missing_barrier, wrong_index, shared_overrun, global_overrun, divergent, half_warp, early_exit, unwritten, raw_overrun };
  SharedArena arena;
  SharedArray<float> numbers = arena.take<float>(64);
  const int i = threadIdx.x;
  if (kFault == early_exit && i == 5) return;
  numbers[kFault == shared_overrun ? i + 1 : i] = float(i);
  if (kFault == raw_overrun && i == 63) reinterpret_cast<float*>(shared_memory())[64] = 1.0f;
  if (kFault == divergent && i < 32)
    __syncthreads();
  else if (kFault == divergent)
    __syncthreads();
  else if (kFault != missing_barrier)
    __syncthreads();
  const int neighbour = kFault == wrong_index ? i : (i + 1) % 64;
  float value = numbers[neighbour];
  if (kFault == half_warp) {
    if (i % 32 < 16) value += __shfl_sync(0xffffffffu, value, 0);
  } else {
    value += __shfl_sync(0xffffffffu, value, i % 32);
  }
  if (kFault == unwritten && i == 17) return;
  out[kFault == global_overrun && i == 63 ? 64 : i] = value;
}

// Every block adds to what its neighbour wrote before the grid barrier, or with none.
template <bool kBarrier>
__global__ void across_blocks(float* out) {
  out[blockIdx.x * 16 + threadIdx.x] = float(blockIdx.x);
  if (kBarrier) cooperative_groups::this_grid().sync();
  const float neighbour = out[(blockIdx.x + 1) % 4 * 16 + threadIdx.x];
  cooperative_groups::this_grid().sync();
  out[blockIdx.x * 16 + threadIdx.x] += neighbour;
}

// out[i] = i + 1, and 0 from 60 on, through shared memory in two copies a thread, the second of half its bytes or none.
template <int kLeft>
__global__ void copied(float* out) {
  SharedArena arena;
  SharedArray<float> numbers = arena.take<float>(64);
  const int i = threadIdx.x;
  out[i] = float(i);
  __syncthreads();
  if (i < 8) copy_async_16(numbers + 4 * i, out + 4 * i, 16);
  commit_copies();
  if (i < 8) copy_async_16(numbers + 32 + 4 * i, out + 32 + 4 * i, i == 7 ? 0 : i == 6 ? 8 : 16);
  commit_copies();
  wait_copies<kLeft>();
  __syncthreads();
  out[i] = i < 60 ? numbers[i] + (i < 58 ? 1.0f : float(i + 1)) : numbers[i];
}

// A product less its own rounding: 0, unless the compiler fuses it into the difference.
template <bool kSpelledOut>
__global__ void rounding(float* out) {
  const float a = 1.0f + float(threadIdx.x) / 64.0f, b = 1.0f / (3.0f + float(threadIdx.x));
  const float same = __fadd_rn(a, 0.0f);  // which the compiler does not know, or it would take one product for both
  out[threadIdx.x] = (kSpelledOut ? __fmul_rn(a, b) : a * b) - __fmul_rn(same, b);
}

static Status run(const std::string& name, float* out) {
  LaunchShape shape;
  shape.block = dim3(64), shape.shared_bytes = 256;
  static const char* const names[] = {"sound", "missing_barrier", "wrong_index", "shared_overrun", "global_overrun",
                                      "divergent", "half_warp", "early_exit", "unwritten", "raw_overrun"};
  void (*const kernels[])(float*) = {faulty<0>, faulty<1>, faulty<2>, faulty<3>, faulty<4>,
                                     faulty<5>, faulty<6>, faulty<7>, faulty<8>, faulty<9>};
  for (int i = 0; i < 10; ++i)
    if (name == names[i]) return launch(kernels[i], shape, nullptr, out);
  if (name == "copied") return launch(copied<0>, shape, nullptr, out);
  if (name == "missing_wait") return launch(copied<1>, shape, nullptr, out);
  if (name == "fused") return launch(rounding<false>, shape, nullptr, out);
  if (name == "spelled_out") return launch(rounding<true>, shape, nullptr, out);
  if (name == "too_much_shared") {
    shape.shared_bytes = 300 * 1024;
    return launch(kernels[0], shape, nullptr, out);
  }
  shape.grid = dim3(4), shape.block = dim3(16), shape.cooperative = name != "not_cooperative";
  if (name == "too_many_blocks") shape.grid = dim3(4096);
  return launch(name == "missing_grid_barrier" ? across_blocks<false> : across_blocks<true>, shape, nullptr, out);
}

}  // namespace afa

extern "C" __attribute__((visibility("default"))) const char* afa_emulator_fault(const char* name, float* out) {
  return afa::run(name, out) == afa::Status::ok ? "" : afa::cuda_error_text();
}
