// A stable radix sort, 8 bits at a time from the lowest.
//
// Data flow of a pass: the pairs are cut into tiles of 4096. sort_count_kernel counts each tile's digits, sort_scan_kernel sums the counts
// of a digit over the tiles before, a block for each digit. sort_scatter_kernel ranks the pairs of its tile among those with the same digit
// in the order in which they stand, each warp 512 of them, 32 at a time by votes, and writes them to where they belong: where a pair
// goes depends on the keys alone, never on which thread comes first.
// Floor: per pass pairs read once and once more their keys, and written once: 20 bytes a pair. Bound: memory, and votes: 8 for 32 pairs.
// Occupancy: sort_count_kernel 256 x 4, sort_scan_kernel 256 x 4, sort_scatter_kernel 256 x 4 (threads x blocks a multiprocessor, by
// registers).
#include "common/radix_sort.h"

#include "common/scan.cuh"

namespace afa {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;
constexpr int kSortRounds = 16;  // pairs of a thread
constexpr int kSortTile = kSortThreads * kSortRounds;
constexpr int kSortDigits = 256;
static_assert(kSortDigits == kSortThreads, "a thread for each digit");

struct SortPass {
  const uint32_t* keys;
  const int32_t* payload;
  uint32_t* to_keys;
  int32_t* to_payload;
  int32_t* counts;  // [digits][tiles], and behind them the digits' totals
  int64_t count;
  int tiles, shift, digits;  // digits: how many there can be

  __device__ int digit(uint32_t key) const { return int(key >> shift & (kSortDigits - 1)); }
  __device__ int32_t* totals() const { return counts + int64_t(kSortDigits) * tiles; }
};

__global__ void __launch_bounds__(kSortThreads, 4) sort_count_kernel(const __grid_constant__ SortPass pass) {
  SharedArena arena;
  SharedArray<int> found = arena.take<int>(kSortDigits);
  const int thread = int(threadIdx.x), tile = int(blockIdx.x);
  found[thread] = 0;
  __syncthreads();
  const int64_t begin = int64_t(tile) * kSortTile;
  for (int round = 0; round < kSortRounds; ++round) {
    const int64_t at = begin + round * kSortThreads + thread;
    if (at < pass.count) atomicAdd(&found[pass.digit(pass.keys[at])], 1);
  }
  __syncthreads();
  if (thread < pass.digits) pass.counts[int64_t(thread) * pass.tiles + tile] = found[thread];
}

__global__ void __launch_bounds__(kSortThreads, 4) sort_scan_kernel(const __grid_constant__ SortPass pass) {
  SharedArena arena;
  SharedArray<int> scratch = arena.take<int>(kSortWarps + 1);
  const int digit = int(blockIdx.x);
  int32_t* counts = pass.counts + int64_t(digit) * pass.tiles;
  int before = 0;
  for (int first = 0; first < pass.tiles; first += int(blockDim.x)) {
    const int tile = first + int(threadIdx.x);
    int total;
    const int sum = block_exclusive_sum(tile < pass.tiles ? counts[tile] : 0, scratch, &total);
    if (tile < pass.tiles) counts[tile] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) pass.totals()[digit] = before;
}

__global__ void __launch_bounds__(kSortThreads, 4) sort_scatter_kernel(const __grid_constant__ SortPass pass) {
  SharedArena arena;
  SharedArray<int> scratch = arena.take<int>(kSortWarps + 1);
  SharedArray<int> found = arena.take<int>(kSortWarps * kSortDigits);  // by warp: how many, then where they begin
  SharedArray<uint16_t> ranks = arena.take<uint16_t>(kSortTile);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, tile = int(blockIdx.x);
  for (int w = 0; w < kSortWarps; ++w) found[w * kSortDigits + thread] = 0;
  int total;
  const bool used = thread < pass.digits;
  const int smaller = block_exclusive_sum(used ? pass.totals()[thread] : 0, scratch, &total);  // pairs of smaller digits
  const SharedArray<int> own = found + warp * kSortDigits;
  const int64_t begin = int64_t(tile) * kSortTile + warp * 32 * kSortRounds;
#pragma unroll 4
  for (int round = 0; round < kSortRounds; ++round) {
    if (begin + round * 32 >= pass.count) break;  // the whole warp
    const int64_t at = begin + round * 32 + lane;
    const bool here = at < pass.count;
    const int digit = here ? pass.digit(pass.keys[at]) : 0;
    unsigned equal = __ballot_sync(0xffffffffu, here);
    for (int bit = 1; bit < kSortDigits; bit *= 2) {
      const unsigned votes = __ballot_sync(0xffffffffu, digit & bit);
      equal &= digit & bit ? votes : ~votes;
    }
    const int before = __popc(equal & ((1u << lane) - 1u));
    if (here) ranks[round * kSortThreads + thread] = uint16_t(own[digit] + before);
    __syncwarp();
    if (here && before == 0) own[digit] += __popc(equal);
    __syncwarp();
  }
  __syncthreads();
  int position = smaller + (used ? pass.counts[int64_t(thread) * pass.tiles + tile] : 0);
  for (int w = 0; w < kSortWarps; ++w) {
    const int many = found[w * kSortDigits + thread];
    found[w * kSortDigits + thread] = position;
    position += many;
  }
  __syncthreads();
#pragma unroll 4
  for (int round = 0; round < kSortRounds; ++round) {
    const int64_t at = begin + round * 32 + lane;
    if (at >= pass.count) break;
    const uint32_t key = pass.keys[at];
    const int to = own[pass.digit(key)] + ranks[round * kSortThreads + thread];
    pass.to_keys[to] = key;
    pass.to_payload[to] = pass.payload ? pass.payload[at] : int32_t(at);
  }
}

// ---- launching -------------------------------------------------------------------------------------------------------------------

static int64_t sort_tiles(int64_t count) { return blocks_for(count, kSortTile); }
static int64_t pair_bytes(int64_t count) { return round_up(4 * count, 64); }  // of keys, or of a payload

int64_t radix_sort_cuda_workspace(int64_t count) {
  return 2 * pair_bytes(count) + round_up(4 * kSortDigits * (sort_tiles(count) + 1), 64);
}

Status radix_sort_cuda(const SortPairs& pairs, void* workspace, void* stream) {
  if (pairs.count < 0 || pairs.count >= (int64_t(1) << 31) || pairs.bits < 0 || pairs.bits > 32) return Status::bad_argument;
  if (pairs.count == 0) return Status::ok;
  char* scratch = static_cast<char*>(workspace);
  uint32_t* spare_keys = reinterpret_cast<uint32_t*>(scratch);
  int32_t* spare_payload = reinterpret_cast<int32_t*>(scratch + pair_bytes(pairs.count));
  const int passes = pairs.bits > 8 ? (pairs.bits + 7) / 8 : 1;
  SortPass pass = {pairs.keys, pairs.payload, nullptr, nullptr, nullptr, pairs.count, int(sort_tiles(pairs.count)), 0, 0};
  pass.counts = reinterpret_cast<int32_t*>(scratch + 2 * pair_bytes(pairs.count));
  LaunchShape tiles, digits;
  tiles.block = dim3(kSortThreads), tiles.grid = dim3(unsigned(pass.tiles));
  digits.block = dim3(unsigned(pass.tiles < kSortThreads ? round_up(pass.tiles, 32) : kSortThreads));
  digits.shared_bytes = SharedArena::bytes<int>(kSortWarps + 1);
  for (int i = 0; i < passes; ++i) {
    const bool to_out = (passes - 1 - i) % 2 == 0;  // the last one does
    pass.to_keys = to_out ? pairs.sorted_keys : spare_keys, pass.to_payload = to_out ? pairs.sorted_payload : spare_payload;
    pass.shift = 8 * i;
    pass.digits = pairs.bits - pass.shift < 8 ? 1 << (pairs.bits - pass.shift) : kSortDigits;
    digits.grid = dim3(unsigned(pass.digits));
    tiles.shared_bytes = SharedArena::bytes<int>(kSortDigits);
    AFA_TRY(launch(sort_count_kernel, tiles, stream, pass));
    AFA_TRY(launch(sort_scan_kernel, digits, stream, pass));
    tiles.shared_bytes = digits.shared_bytes + SharedArena::bytes<int>(kSortWarps * kSortDigits) +
                         SharedArena::bytes<uint16_t>(kSortTile);
    AFA_TRY(launch(sort_scatter_kernel, tiles, stream, pass));
    pass.keys = pass.to_keys, pass.payload = pass.to_payload;
  }
  return Status::ok;
}

}  // namespace afa
