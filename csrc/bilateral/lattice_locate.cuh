// Which simplex of the lattice each point is in, and its barycentric weights: lattice_build.cpp's `locate`, rounding by rounding.
#pragma once

#include "bilateral/lattice.cuh"

namespace afa {

constexpr int kLocateThreads = 64;

// A thread's few numbers: in registers where their count is known, else in shared memory.
template <class T, int kDims>
struct Few {
  T at[kDims + 1];
  __device__ explicit Few(SharedArena&, int) {}
  __device__ T get(int j) const { return at[j]; }
  __device__ void set(int j, T value) { at[j] = value; }
  // At an index that is not known when this is compiled.
  __device__ void put(int j, T value) {
#pragma unroll
    for (int i = 0; i <= kDims; ++i) at[i] = i == j ? value : at[i];
  }
};
template <class T>
struct Few<T, 0> {
  SharedArray<T> at;
  __device__ Few(SharedArena& arena, int dims) : at(arena.take<T>((dims + 1) * kLocateThreads)) {}
  __device__ T get(int j) const { return at[j * kLocateThreads + int(threadIdx.x)]; }
  __device__ void set(int j, T value) { at[j * kLocateThreads + int(threadIdx.x)] = value; }
  __device__ void put(int j, T value) { set(j, value); }
};

struct LatticeScales {
  float at[kMostLatticeDims];
};

constexpr float kFarthestStep = float(1 << 22);  // as in lattice_build.cpp

// To base [points][dims], rank [points][d + 1] and the weights of lattice.corner.
template <int kDims>
__global__ void __launch_bounds__(kLocateThreads, 8)
    lattice_locate_kernel(const __grid_constant__ LatticeArrays lattice, int32_t* base, uint8_t* rank,
                          const __grid_constant__ LatticeScales scales, const float* __restrict__ features) {
  SharedArena arena;
  const int dims = kDims ? kDims : lattice.corners - 1;
  Few<float, kDims> lifted(arena, dims), nearest(arena, dims);
  Few<int, kDims> order(arena, dims);
  const int point = int(blockIdx.x) * kLocateThreads + int(threadIdx.x);
  if (point >= lattice.points) return;
  const float width = float(dims + 1), inverse = 1.0f / width;
  float sum = 0, steps = 0;
#pragma unroll
  for (int j = dims; j > 0; --j) {
    const float scaled = __fmul_rn(features[point * dims + j - 1], scales.at[j - 1]);
    lifted.set(j, __fsub_rn(sum, __fmul_rn(float(j), scaled)));
    sum = __fadd_rn(sum, scaled);
  }
  lifted.set(0, sum);
#pragma unroll
  for (int j = 0; j <= dims; ++j) {
    float step = rintf(__fmul_rn(inverse, lifted.get(j)));
    step = step > -kFarthestStep && step < kFarthestStep ? step : 0.0f;
    nearest.set(j, __fmul_rn(step, width));
    steps = __fadd_rn(steps, step);
    order.set(j, 0);
  }
#pragma unroll
  for (int i = 0; i < dims; ++i) {
    const float own = __fsub_rn(lifted.get(i), nearest.get(i));
    int above = order.get(i);
#pragma unroll
    for (int j = i + 1; j <= dims; ++j) {
      const int less = own < __fsub_rn(lifted.get(j), nearest.get(j));
      above += less, order.set(j, order.get(j) + 1 - less);
    }
    order.set(i, above);
  }
  const int excess = steps > -width && steps < width ? int(steps) : 0;
#pragma unroll
  for (int j = 0; j <= dims; ++j) {
    int own = order.get(j) + excess;
    if (own < 0)
      own += dims + 1, nearest.set(j, __fadd_rn(nearest.get(j), width));
    else if (own > dims)
      own -= dims + 1, nearest.set(j, __fsub_rn(nearest.get(j), width));
    order.set(j, own);
    rank[point * (dims + 1) + j] = uint8_t(own);
    if (j < dims) base[point * dims + j] = int32_t(nearest.get(j));
    lifted.set(j, __fmul_rn(__fsub_rn(lifted.get(j), nearest.get(j)), inverse));
  }
  // The remainders in order: their differences are the weights.
#pragma unroll
  for (int j = 0; j <= dims; ++j) nearest.put(order.get(j), lifted.get(j));
#pragma unroll
  for (int r = 0; r <= dims; ++r) {
    const float weight = r > 0 ? __fsub_rn(nearest.get(dims - r), nearest.get(dims + 1 - r))
                               : __fadd_rn(nearest.get(dims), __fsub_rn(1.0f, nearest.get(0)));
    lattice.corner[point * (dims + 1) + r].y = __float_as_int(weight);
  }
}

}  // namespace afa
