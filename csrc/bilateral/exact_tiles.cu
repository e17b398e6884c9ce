// The exact filter on a GPU, around its sums (exact.cu): pixels into tiles, and sums back into images.
//
// Data flow: exact_key_kernel gives each pixel a key of 32 bits. A bit halves the axis of (x, y, r, g, b), each times its scale, that is
// widest at that point, of what is possible: the image's sides and 0..255. The bits together are a number in Gray code: neighbours in its
// order differ in one bit, so that a run of 64 pixels across the border between two halves is not spread over either. Pixels are sorted
// by it, those of several images at once. exact_pack_kernel writes a tile's features, its box, and its values as fragments of tensor
// cores: each channel times a power of two, in two halves (22 bits), the factor beside. exact_special_kernel adds what has no such
// factor, infinity and NaN; exact_unpack_kernel adds up the parts of each pixel's sums.
// Floor: images and values read once, about 30 + 8 K bytes a pixel written, and the sort. Bound: memory.
// Occupancy: exact_key_kernel 256 x 4, exact_pack_kernel 128 x 4, exact_special_kernel 128 x 4, exact_unpack_kernel 256 x 4 (threads x
// blocks a multiprocessor, by registers).
#include "bilateral/exact.cuh"
#include "common/radix_sort.h"

namespace afa {

constexpr int kPixelThreads = 256;
constexpr float kBrightest = 255.0f;
constexpr int kMostBits = 16;  // of one axis

struct KeyBits {
  int total = 0;
  int bits[kFeatures] = {};
  float cells[kFeatures] = {};          // how many to a pixel or grey level
  uint8_t shift[kFeatures][kMostBits];  // where the bits of an axis go, from its highest
};

static KeyBits key_bits(const ExactPixels& pixels) {
  int most = 32;
  while (most > 16 && pixels.batch > int64_t(1) << (32 - most)) --most;  // above them the image
  const float sides[kFeatures] = {float(pixels.images.size[3]), float(pixels.images.size[2]), kBrightest, kBrightest, kBrightest};
  float left[kFeatures];
  int axes[32];
  KeyBits key;
  for (int k = 0; k < kFeatures; ++k) left[k] = sides[k] * sqrtf(k < 2 ? pixels.scale_xy : pixels.scale_rgb);
  for (; key.total < most; ++key.total) {
    int widest = -1;
    for (int k = 0; k < kFeatures; ++k)
      if (key.bits[k] < kMostBits && left[k] > 0 && (widest < 0 || left[k] > left[widest])) widest = k;
    if (widest < 0) break;
    axes[key.total] = widest, left[widest] *= 0.5f, ++key.bits[widest];
  }
  int placed[kFeatures] = {};
  for (int at = 0; at < key.total; ++at) key.shift[axes[at]][placed[axes[at]]++] = uint8_t(key.total - 1 - at);
  for (int k = 0; k < kFeatures; ++k) key.cells[k] = float(1 << key.bits[k]) / sides[k];
  return key;
}

// Place of a pixel in the image and its colours.
struct PixelFeatures {
  float value[kFeatures];
  __device__ PixelFeatures(const ExactPixels& pixels, int64_t b, int64_t pixel) {
    const View<4>& images = pixels.images;
    const int64_t width = images.size[3], y = pixel / width, x = pixel % width;
    value[0] = float(x), value[1] = float(y);
#pragma unroll
    for (int c = 0; c < 3; ++c)
      value[2 + c] = load_element(images.data, images.dtype, offset_of(images, pixels.first + b, c, y) + x * images.stride[3]);
  }
};

__global__ void __launch_bounds__(kPixelThreads, 4)
    exact_key_kernel(const __grid_constant__ ExactPixels pixels, const __grid_constant__ KeyBits key) {
  const int64_t at = blockIdx.x * int64_t(kPixelThreads) + threadIdx.x;
  if (at >= pixels.batch * pixels.count) return;
  const int64_t b = at / pixels.count;
  const PixelFeatures features(pixels, b, at % pixels.count);
  uint32_t code = 0;
#pragma unroll
  for (int k = 0; k < kFeatures; ++k) {
    const float last = float((1 << key.bits[k]) - 1);
    const int cell = int(fminf(fmaxf(features.value[k] * key.cells[k], 0.0f), last));  // of NaN 0
    for (int i = 0; i < key.bits[k]; ++i) code |= uint32_t(cell >> (key.bits[k] - 1 - i) & 1) << key.shift[k][i];
  }
  for (int shift = 1; shift < 32; shift *= 2) code ^= code >> shift;  // the number whose Gray code this is
  pixels.keys[at] = code | (key.total < 32 ? uint32_t(b) << key.total : 0u);
}

// ---- tiles ---------------------------------------------------------------------------------------------------------------

// The smallest or the largest of a warp's numbers; NaN has no say.
__device__ inline float warp_least(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value = fminf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}
__device__ inline float warp_most(float value) { return -warp_least(-value); }

// Features of a tile's pixels, those behind the image's last one that one's, and in low and high their box, of all warps.
__device__ inline void pack_features(const ExactPixels& pixels, int64_t b, int64_t tile, SharedArray<float> box, SharedArray<int> odd) {
  const int thread = int(threadIdx.x);
  if (thread < kTile) {
    const int64_t wanted = tile * kTile + thread, place = wanted < pixels.count ? wanted : pixels.count - 1;
    const int64_t pixel = pixels.order[b * pixels.count + place] - b * pixels.count;
    if (wanted < pixels.count) pixels.places[b * pixels.count + pixel] = int32_t(place);
    const PixelFeatures features(pixels, b, pixel);
    float* to = pixels.features + (b * pixels.rows + tile) * kTileFeatures;
#pragma unroll
    for (int k = 0; k < kFeatures; ++k) {
      const float value = features.value[k], low = warp_least(value), high = warp_most(value);
      to[k * kTile + thread] = value;
      if (!is_finite(value)) odd[0] = 1;  // all write the same
      if (thread % 32 == 0) box[thread / 32 * 2 * kFeatures + k] = low, box[thread / 32 * 2 * kFeatures + kFeatures + k] = high;
    }
  }
}

// The factor of each of a block's 8 channels, from the largest of a tile's values; two channels a warp.
__device__ inline void find_factors(const ExactPixels& pixels, int64_t b, int64_t tile, int block, SharedArray<float> values,
                                    SharedArray<float> raise, SharedArray<int> special) {
  const int thread = int(threadIdx.x), lane = thread % 32;
  for (int c = thread / 32; c < 8; c += kExactThreads / 32) {
    const float one = values[c * kTile + lane], two = values[c * kTile + lane + 32];
    const float largest = warp_most(fmaxf(fabsf(one), fabsf(two)));
    const bool finite = __all_sync(0xffffffffu, is_finite(one) && is_finite(two));
    // To below 2^11, as long as the factor's own exponent allows.
    const int exponent = clamp_to(int(__float_as_uint(largest) >> 23) - 127, -100, 127);
    if (lane == 0) {
      raise[c] = finite ? __uint_as_float(unsigned(127 + 10 - exponent) << 23) : 0.0f;
      const float factor = __uint_as_float(unsigned(127 + exponent - 10 - int(kRaised)) << 23);
      pixels.factors[(b * pixels.tiles + tile) * pixels.stride() + block * 8 + c] = finite ? factor : -1.0f;
      if (!finite) special[0] = 1;
    }
  }
}

__global__ void __launch_bounds__(kExactThreads, 4) exact_pack_kernel(const __grid_constant__ ExactPixels pixels) {
  SharedArena arena;
  SharedArray<float> box = arena.take<float>(4 * kFeatures);
  SharedArray<float> values = arena.take<float>(8 * kTile), raise = arena.take<float>(8);
  SharedArray<int> odd = arena.take<int>(1), special = arena.take<int>(1);
  const int thread = int(threadIdx.x), lane = thread % 32;
  const int64_t b = blockIdx.x / pixels.rows, tile = blockIdx.x % pixels.rows;
  if (thread == 0) odd[0] = 0, special[0] = 0;
  __syncthreads();
  pack_features(pixels, b, tile, box, odd);
  for (int block = 0; block < pixels.blocks && tile < pixels.tiles; ++block) {
    __syncthreads();
    const int64_t width = pixels.values.size[3], place = tile * kTile + thread % kTile;
    const int64_t pixel = place < pixels.count ? pixels.order[b * pixels.count + place] - b * pixels.count : 0;
    for (int c = thread / kTile; c < 8; c += kExactThreads / kTile) {
      const int channel = block * 8 + c;
      const bool there = place < pixels.count && channel < pixels.channels;
      const int64_t at = offset_of(pixels.values, pixels.first + b, channel, pixel / width) + pixel % width * pixels.values.stride[3];
      values[c * kTile + thread % kTile] = there ? load_element(pixels.values.data, pixels.values.dtype, at) : 0.0f;
    }
    __syncthreads();
    find_factors(pixels, b, tile, block, values, raise, special);
    __syncthreads();
    // Thread = step and lane: pixels 2 (lane % 4) + {0, 1} and 8 more of the step's 16, of channel lane / 4.
    const int j = thread / 32 * 16 + lane % 4 * 2, c = lane / 4;
    const float by = raise[c];
    auto value = [&](int at) { return by == 0.0f ? 0.0f : values[c * kTile + at] * by; };
    const Halves first(value(j), value(j + 1)), second(value(j + 8), value(j + 9));
    pixels.packed[packed_at(pixels, b, tile, block, thread / 32) + lane] = make_uint4(first.high, second.high, first.low, second.low);
  }
  __syncthreads();
  if (tile < pixels.tiles && thread == 0) pixels.special[b * pixels.tiles + tile] = special[0];
  if (thread < 2 * kFeatures) {
    const float one = box[thread], two = box[2 * kFeatures + thread];
    // What is not finite must meet all others.
    const bool everything = odd[0] + special[0] > 0;
    const float bound = thread < kFeatures ? (everything ? -INFINITY : fminf(one, two)) : everything ? INFINITY : fmaxf(one, two);
    pixels.boxes[(b * 2 * kFeatures + thread) * pixels.rows + tile] = bound;
  }
}

// ---- values that are not finite ------------------------------------------------------------------------------------------

// Adds them, a pixel of the sums a thread: every tile of pixels meets theirs.
__global__ void __launch_bounds__(kExactThreads, 4) exact_special_kernel(const __grid_constant__ ExactPixels pixels) {
  const int64_t per_image = pixels.rows * kTile / kExactThreads, b = blockIdx.x / per_image;
  const int64_t place = blockIdx.x % per_image * kExactThreads + threadIdx.x;
  const float* all = pixels.features + b * pixels.rows * kTileFeatures;
  auto feature = [&](int64_t at, int k) { return all[at / kTile * kTileFeatures + k * kTile + at % kTile]; };
  for (int64_t first = 0; first < pixels.tiles; first += kExactThreads) {
    const int32_t* special = pixels.special + b * pixels.tiles + first;
    const int64_t left = pixels.tiles - first;
    if (!__syncthreads_or(threadIdx.x < left && special[threadIdx.x] != 0)) continue;
    for (int64_t tile = first; tile < first + kExactThreads && tile < pixels.tiles; ++tile) {
      if (special[tile - first] == 0) continue;
      for (int c = 0; c < pixels.channels; ++c) {
        if (!(pixels.factors[(b * pixels.tiles + tile) * pixels.stride() + c] < 0.0f)) continue;
        float sum = 0.0f;
        for (int j = 0; j < kTile; ++j) {
          float distance = 0.0f;
#pragma unroll
          for (int k = 0; k < kFeatures; ++k) {
            const float difference = feature(place, k) - feature(tile * kTile + j, k);
            distance += difference * difference * pixels.scale(k);
          }
          if (tile * kTile + j < pixels.count) sum = fmaf(exp2_of(distance * -kLog2e), value_of(pixels, b, tile, j, c), sum);
        }
        pixels.sums[pixels.sums_at(0, b) + place * pixels.stride() + c] += sum;
      }
    }
  }
}

// ---- back to images ------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kPixelThreads, 4) exact_unpack_kernel(const __grid_constant__ ExactPixels pixels) {
  const int64_t at = blockIdx.x * int64_t(kPixelThreads) + threadIdx.x;
  if (at >= pixels.batch * pixels.count) return;
  const int64_t b = at / pixels.count, pixel = at % pixels.count, width = pixels.out.size[3];
  const float* from = pixels.sums + pixels.sums_at(0, b) + pixels.places[at] * pixels.stride();
  const int64_t part = pixels.sums_at(1, 0);
  const int64_t to = offset_of(pixels.out, pixels.first + b, 0, pixel / width) + pixel % width * pixels.out.stride[3];
  for (int c = 0; c < pixels.channels; c += 4) {
    float sum[4] = {};
    for (int p = 0; p < pixels.parts; ++p) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + p * part + c));
      sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c + i < pixels.channels) store_element(pixels.out.data, pixels.out.dtype, to + (c + i) * pixels.out.stride[1], sum[i]);
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------------

Status sort_pixels(const ExactPixels& pixels, void* scratch, void* stream) {
  const KeyBits key = key_bits(pixels);
  LaunchShape shape;
  shape.grid = dim3(unsigned(blocks_for(pixels.batch * pixels.count, kPixelThreads))), shape.block = dim3(kPixelThreads);
  AFA_TRY(launch(exact_key_kernel, shape, stream, pixels, key));
  SortPairs pairs;
  pairs.keys = pixels.keys, pairs.sorted_keys = pixels.sorted_keys, pairs.sorted_payload = pixels.order;
  pairs.count = pixels.batch * pixels.count, pairs.bits = key.total;
  while (pairs.bits < 32 && pixels.batch > int64_t(1) << (pairs.bits - key.total)) ++pairs.bits;
  return radix_sort_cuda(pairs, scratch, stream);
}

Status pack_tiles(const ExactPixels& pixels, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(pixels.batch * pixels.rows)), shape.block = dim3(kExactThreads);
  shape.shared_bytes = SharedArena::bytes<float>(4 * kFeatures) + SharedArena::bytes<float>(8 * kTile) + SharedArena::bytes<float>(8) +
                       2 * SharedArena::bytes<int>(1);
  return launch(exact_pack_kernel, shape, stream, pixels);
}

Status add_special(const ExactPixels& pixels, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(pixels.batch * (pixels.rows * kTile / kExactThreads))), shape.block = dim3(kExactThreads);
  return launch(exact_special_kernel, shape, stream, pixels);
}

Status unpack_sums(const ExactPixels& pixels, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(unsigned(blocks_for(pixels.batch * pixels.count, kPixelThreads))), shape.block = dim3(kPixelThreads);
  return launch(exact_unpack_kernel, shape, stream, pixels);
}

}  // namespace afa
