// The numbers of a pair of tiles on their way to memory: what a loss keeps of its scores, and G, which pair_kernel (affinity.cu) makes
// of scores and kept_gradient_kernel (kept.cu) of what was kept.
#pragma once

#include "affinity/affinity.cuh"

namespace afa {

// What a derivative of the sigmoid is multiplied by where it is kept in float16: 1/4, the largest, becomes 2^15, and that of a score
// of 25 is still a number of its range. A power of two, so that nothing is rounded by it.
constexpr float kKeptScale = 1 << 17;

// 16 numbers of a pair times `factor` to [64][64], from where kTensor has a thread's.
template <class T, bool kTensor>
__device__ inline void store_results(T* out, const float (&values)[16], float factor, unsigned thread) {
  auto at = [=](int e) { return ResultPlace<kTensor>::row(thread, e) * kTilePixels + ResultPlace<kTensor>::column(thread, e); };
#pragma unroll
  for (int e = 0; e < 16; e += 2) {
    if constexpr (kTensor && sizeof(T) == 2) {  // columns side by side
      const T two[2] = {from_float<T>(values[e] * factor), from_float<T>(values[e + 1] * factor)};
      unsigned packed;
      memcpy(&packed, two, 4);
      *reinterpret_cast<unsigned*>(&out[at(e)]) = packed;
    } else {
      out[at(e)] = from_float<T>(values[e] * factor), out[at(e + 1)] = from_float<T>(values[e + 1] * factor);
    }
  }
}

// What the head needs of a pair's G, of which a thread has 16 numbers, to memory; returns what those are multiplied by where they are
// kept in T. In float16 by a power of two, so that the largest is 1 to 2: gradients of a mean over many pairs lie below its range, but
// not below bfloat16's.
template <class T>
__device__ inline float keep_sums(const PairBuffers& buffers, int64_t pair, bool mirrored, const float (&values)[16],
                                  SharedArray<float> scratch) {
  float sum = 0, largest = 0;
#pragma unroll
  for (int e = 0; e < 16; ++e) sum += values[e], largest = fmaxf(largest, fabsf(values[e]));
  sum = block_sum(sum, scratch, kPairThreads / 32);
  if (threadIdx.x == 0) buffers.sums[pair] = mirrored ? 2 * sum : sum;
  float inverse = 1;
  if (std::is_same<T, __half>::value) {
    largest = block_max(largest, scratch, kPairThreads / 32);
    // Not below 2^-60, so that one pair's sums may be put into the units of another's.
    const unsigned power = min(max(__float_as_uint(largest) & 0x7f800000u, 0x21800000u), 0x7e800000u);
    inverse = __uint_as_float(0x7f000000u - power);
    if (threadIdx.x == 0) buffers.scale[pair] = __uint_as_float(power);
  }
  return inverse;
}

// G of one pair from where kTensor has its numbers.
template <class T, bool kTensor>
__device__ inline void keep_gradients(const PairBuffers& buffers, int64_t pair, bool mirrored, const float (&values)[16], unsigned thread,
                                      SharedArray<float> scratch) {
  const float factor = keep_sums<T>(buffers, pair, mirrored, values, scratch);
  store_results<T, kTensor>(static_cast<T*>(buffers.values) + pair * kPairScores, values, factor, thread);
}

}  // namespace afa
