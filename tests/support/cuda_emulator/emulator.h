// Runs CUDA kernels on the CPU, one fiber per CUDA thread. The threads of the live blocks take turns: each runs until it waits
// (barrier, warp collective, grid barrier) or ends. What a device leaves undefined is made visible:
//
//   divergent barriers   threads of a block at different barriers, or some at one and others gone: the launch fails
//   races                the order of threads and blocks is a setting; a kernel that lacks a barrier differs between orders.
//                        Built for it, ThreadSanitizer sees a race whatever the order and the numbers (races.h)
//   copies under way     (async_copy.cuh) arrive when they are waited for, not before; until then NaN is there
//   shared memory        every access through SharedArena's arrays is checked; fresh shared memory holds NaN; a red zone
//                        behind it is looked at when the block ends
//   limits               more shared memory than asked for or than the device has, too many threads, a cooperative grid that
//                        is not resident at once: the launch fails
//
// Global memory is the host's: AddressSanitizer checks it.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "races.h"

namespace emulator {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Place {
  const char* file = "";
  int line = 0;
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

struct Settings {
  int multiprocessors = 4;
  int shared_bytes = 227 * 1024;  // per block and per multiprocessor, as on an H100
  int64_t l2_bytes = 0;           // for the choice of a plan alone; without any, what can be resident is
  int compiled = 90;              // architecture that the code was compiled for, 0 if there is none for the device
  int64_t room = INT64_MAX;       // blocks that a cooperative launch finds room for, as in a part of a device
  int pause = 0;                  // microseconds after a kernel's shared memory was set: time for another host thread
  bool dry = false;               // launches are counted, and run nothing: what is left is the host's part
  int order = 0;                  // 0: ascending threads and blocks, 1: descending, above: shuffled by this seed
  int64_t first_block = 0;        // run only blocks [first_block, first_block + block_count) of every ordinary launch,
  int64_t block_count = INT64_MAX;  // counted from the last one if negative
};
Settings& settings();

struct Launch {
  Dim3 grid, block;
  int64_t shared_bytes = 0;
  bool cooperative = false;
  const void* function = nullptr;
  std::function<void()> body;
};

enum class Wait { nothing, block, warp, grid, gone };

// Of 16 bytes to shared memory, the first `bytes` of them from global memory.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Block;
struct Thread {
  Dim3 index;
  int lane = 0;
  Block* block = nullptr;
  Wait wait = Wait::nothing;
  Place place;
  unsigned mask = 0;             // warp collective: the lanes that take part
  uint64_t value = 0;            // and what this one brings
  uint64_t exchanged[32] = {};   // and what all brought
  int vote = 0, votes = 0;       // __syncthreads_count
  void* context = nullptr;       // saved stack pointer
  char* stack = nullptr;
  void* fake_stack = nullptr;    // AddressSanitizer's
  void* fiber = nullptr;         // ThreadSanitizer's
  unsigned warp_barriers = 0;    // passed
  Copy copies[64];               // under way, in a ring
  unsigned copies_asked = 0, copies_taken = 0;
  unsigned groups_end[32] = {}, groups = 0;  // copies asked for when a group was closed, in a ring; and groups closed
};

struct Block {
  Dim3 index;
  const Launch* launch = nullptr;
  std::vector<Thread, races::Pages<Thread>> threads;
  std::vector<unsigned char, races::Pages<unsigned char>> shared;
  unsigned barriers = 0;                // passed
  char barrier[2], warp_barrier[32][2];  // what passing them orders hangs on these addresses, in turn
};

extern thread_local Thread* current;
inline const Dim3& thread_index() { return current->index; }
inline const Dim3& block_index() { return current->block->index; }
inline const Dim3& block_size() { return current->block->launch->block; }
inline const Dim3& grid_size() { return current->block->launch->grid; }

bool run(const Launch& launch);  // false: see error_text()
void set_error(const std::string& text);
const char* error_text();
std::string& launch_log();       // a line for each launch of this thread
struct Counts {
  int64_t launches = 0, memsets = 0;
};
Counts& counts();                // of this thread
void allow_shared(const void* function, int bytes);

void block_barrier(Place place);
int block_vote(int predicate, Place place);
void grid_barrier(Place place);
void warp_barrier(unsigned mask, Place place);
void order_atomic(void* at);  // what came before an atomic is ordered before what follows a later one
const uint64_t* warp_exchange(unsigned mask, uint64_t value, Place place);
unsigned live_lanes();

void copy_later(const Copy& copy);
void commit_copies();
bool take_copy(unsigned left, Copy* copy);  // the oldest, if it belongs to a group other than the last `left`
[[noreturn]] void fail(const std::string& what, Place place);

// Where the current block's shared memory begins, and how much there is.
unsigned char* shared_begin();
int64_t shared_size();

// A checked array in shared memory, in the place of a plain pointer.
template <class T>
class Shared {
 public:
  Shared() = default;
  Shared(T* data, int64_t size) : data_(data), low_(0), high_(size) {}
  T& operator[](int64_t i) const { return *check(i, 1); }
  T& operator*() const { return *check(0, 1); }
  Shared operator+(int64_t n) const {
    Shared moved = *this;
    moved.data_ += n, moved.low_ -= n, moved.high_ -= n;
    return moved;
  }
  T* check(int64_t first, int64_t count) const {
    if (first < low_ || first + count > high_)
      fail("shared memory: index " + std::to_string(first) + " is outside [" + std::to_string(low_) + ", " +
               std::to_string(high_) + ")",
           current->place);
    return data_ + first;
  }

 private:
  T* data_ = nullptr;
  int64_t low_ = 0, high_ = 0;  // the array's bounds, counted from data_
};

}  // namespace emulator
