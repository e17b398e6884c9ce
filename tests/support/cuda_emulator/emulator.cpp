// The emulator's fibers and its scheduler; see emulator.h.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

constexpr int64_t kStackBytes = 128 * 1024;
constexpr int64_t kRedZone = 256;
// Of a block, on the smallest device with tensor cores. What is told of a device may be less, for the choice of a plan alone.
constexpr int kLeastShared = 99 * 1024;
constexpr unsigned char kRedByte = 0xA7;

thread_local Thread* current = nullptr;
static thread_local std::string error;
static thread_local const Launch* running = nullptr;

Settings& settings() {
  static Settings values;
  return values;
}
void set_error(const std::string& text) { error = text; }
const char* error_text() { return error.c_str(); }

std::string& launch_log() {
  static thread_local std::string log;
  return log;
}

Counts& counts() {
  static thread_local Counts values;
  return values;
}

static std::string at(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }
static std::string name(const Thread& thread) {
  auto text = [](Dim3 v) { return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")"; };
  return "thread " + text(thread.index) + " of block " + text(thread.block->index);
}

// ---- fibers: switch_stack(&saved, next) saves the callee-saved registers and moves to another stack ----------------------

#if defined(__x86_64__)
extern "C" void afa_emulator_switch(void** saved, void* next);
asm(R"(
.text
.globl afa_emulator_switch
.type afa_emulator_switch,@function
afa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size afa_emulator_switch,.-afa_emulator_switch
)");
static void* fresh_context(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;                            // the entry's return address: it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers popped on the way in
  return top;
}
static void switch_stack(void** saved, void* next) { afa_emulator_switch(saved, next); }
#else
static void* fresh_context(char* stack, void (*entry)()) {
  ucontext_t* context = reinterpret_cast<ucontext_t*>(stack + kStackBytes - sizeof(ucontext_t) - 64);
  getcontext(context);
  context->uc_stack.ss_sp = stack, context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t) - 128;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
static void switch_stack(void** saved, void* next) {
  ucontext_t here;
  *saved = &here;
  swapcontext(&here, static_cast<ucontext_t*>(next));
}
#endif

static thread_local void* scheduler = nullptr;
static thread_local void* scheduler_fiber = nullptr;
static char launch_begin, launch_end, grid_barriers[2];  // addresses for races.h
static thread_local unsigned grid_barriers_passed = 0;
#if defined(__SANITIZE_ADDRESS__)
static thread_local void* scheduler_fake_stack = nullptr;
static thread_local const void* scheduler_bottom = nullptr;
static thread_local size_t scheduler_bytes = 0;
#endif

static void to_fiber(Thread& thread) {
  current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStackBytes);
#endif
  races::switch_to(thread.fiber);
  switch_stack(&scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}
static void to_scheduler() {
  Thread* thread = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(thread->wait == Wait::gone ? nullptr : &thread->fake_stack, scheduler_bottom, scheduler_bytes);
#endif
  races::switch_to(scheduler_fiber);
  switch_stack(&thread->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread->fake_stack, &scheduler_bottom, &scheduler_bytes);
#endif
}
static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
  races::acquire(&launch_begin);
  running->body();
  races::release(&launch_end);
  current->wait = Wait::gone;
  to_scheduler();
  __builtin_unreachable();
}

// A stack, and ThreadSanitizer's fiber, for each thread. Stacks are kept for the next block; memory that no kernel touched costs
// nothing. Watched for races, the blocks of a launch have fibers of their own as far as there are, or two blocks at one
// element would look like one thread. Every barrier costs its threads times the fibers that there are, so 11 blocks of 128:
// what two blocks wrongly share lies a row, an image or a power of two apart.
constexpr size_t kWatchedThreads = 11 * 128;
class Places {
 public:
  struct Slot { char* stack; void* fiber; };
  ~Places() { std::for_each(all_.begin(), all_.end(), [](Slot& slot) { munmap(slot.stack, kStackBytes); }); }
  Slot take() {
    if (used_ == all_.size()) {
      void* fresh = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fresh == MAP_FAILED) std::abort();
      all_.push_back({static_cast<char*>(fresh), races::create_fiber()});
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(all_[used_].stack, kStackBytes);  // an abandoned launch leaves its marks
#endif
    return all_[used_++];
  }
  void begin_launch() { used_ = 0; }
  void begin_blocks(size_t threads) {
    if (!races::kWatched || used_ + threads > kWatchedThreads) used_ = 0;
  }

 private:
  std::vector<Slot> all_;
  size_t used_ = 0;
};
static thread_local Places places;

// ---- what a thread calls -------------------------------------------------------------------------------------------------

static void wait_for(Wait what, Place place) {
  current->wait = what, current->place = place;
  to_scheduler();
}
void fail(const std::string& what, Place place) {
  if (error.empty()) error = what + ", " + name(*current) + ", last at " + at(place);
  current->wait = Wait::gone;
  to_scheduler();
  std::abort();
}
// Two addresses in turn: a thread may be at the next barrier before another has left this one.
static void wait_in_order(Wait what, Place place, char* orders) {
  races::release(orders);
  wait_for(what, place);
  races::acquire(orders);
}
void block_barrier(Place place) { wait_in_order(Wait::block, place, &current->block->barrier[current->block->barriers % 2]); }
int block_vote(int predicate, Place place) {
  current->vote = predicate != 0;
  block_barrier(place);
  return current->votes;
}
void grid_barrier(Place place) {
  if (!running->cooperative) fail("grid barrier in a launch that is not cooperative", place);
  wait_in_order(Wait::grid, place, &grid_barriers[grid_barriers_passed % 2]);
}
void order_atomic(void* at) {
  races::release(at);
  races::acquire(at);
}
const uint64_t* warp_exchange(unsigned mask, uint64_t value, Place place) {
  if (!(mask >> current->lane & 1)) fail("a lane calls a warp collective whose mask leaves it out", place);
  current->mask = mask, current->value = value;
  wait_for(Wait::warp, place);
  return current->exchanged;
}
void warp_barrier(unsigned mask, Place place) {
  const size_t warp = size_t(current - current->block->threads.data()) / 32;
  char* orders = &current->block->warp_barrier[warp][current->warp_barriers++ % 2];
  races::release(orders);
  warp_exchange(mask, 0, place);
  races::acquire(orders);
}
static Thread* warp_of(Thread& thread) { return &thread - thread.lane; }
static int warp_lanes(const Thread* first) {
  return int(std::min<int64_t>(32, first->block->threads.data() + first->block->threads.size() - first));
}
unsigned live_lanes() {
  const Thread* warp = warp_of(*current);
  unsigned mask = 0;
  for (int lane = 0; lane < warp_lanes(warp); ++lane)
    if (warp[lane].wait != Wait::gone) mask |= 1u << lane;
  return mask;
}
void copy_later(const Copy& copy) {
  if (copy.bytes < 0 || copy.bytes > 16) fail("a copy of more than 16 bytes", current->place);
  if (reinterpret_cast<uintptr_t>(copy.to) % 16 != 0 || (copy.bytes > 0 && reinterpret_cast<uintptr_t>(copy.from) % 16 != 0))
    fail("a copy between addresses that are no multiples of 16", current->place);
  if (current->copies_asked - current->copies_taken >= 64) fail("more than 64 copies under way", current->place);
  current->copies[current->copies_asked++ % 64] = copy;
}
void commit_copies() { current->groups_end[current->groups++ % 32] = current->copies_asked; }
bool take_copy(unsigned left, Copy* copy) {
  if (current->groups <= left) return false;
  if (int(current->groups_end[(current->groups - 1 - left) % 32] - current->copies_taken) <= 0) return false;
  *copy = current->copies[current->copies_taken++ % 64];
  return true;
}

unsigned char* shared_begin() { return current->block->shared.data(); }
int64_t shared_size() { return running->shared_bytes; }

// ---- the scheduler -------------------------------------------------------------------------------------------------------

static bool release_warp(Thread* warp) {
  const int lanes = warp_lanes(warp);
  bool released = false;
  for (int first = 0; first < lanes; ++first) {
    if (warp[first].wait != Wait::warp) continue;
    const unsigned mask = warp[first].mask;
    // A mask may name lanes that the block does not have, as hardware allows for a block of fewer than 32 threads.
    bool complete = true;
    for (int lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1)
        complete &= warp[lane].wait == Wait::warp && warp[lane].mask == mask && warp[lane].place == warp[first].place;
    if (!complete) continue;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int other = 0; other < lanes; ++other) warp[lane].exchanged[other] = mask >> other & 1 ? warp[other].value : 0;
    }
    for (int lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1) warp[lane].wait = Wait::nothing;
    released = true;
  }
  return released;
}
template <class Threads>
static bool all_wait(const Threads& threads, Wait what) {
  return std::all_of(threads.begin(), threads.end(), [&](const Thread& t) { return t.wait == what && t.place == threads[0].place; });
}
static bool release_block(Block& block) {
  bool released = false;
  for (size_t i = 0; i < block.threads.size(); i += 32) released |= release_warp(&block.threads[i]);
  if (!all_wait(block.threads, Wait::block)) return released;
  int votes = 0;
  for (Thread& thread : block.threads) votes += thread.vote;
  for (Thread& thread : block.threads) thread.votes = votes, thread.wait = Wait::nothing;
  ++block.barriers;
  return true;
}
using Blocks = std::vector<Block, races::Pages<Block>>;
static bool release_grid(Blocks& blocks) {
  for (const Block& block : blocks)
    if (!all_wait(block.threads, Wait::grid) || !(block.threads[0].place == blocks[0].threads[0].place)) return false;
  for (Block& block : blocks)
    for (Thread& thread : block.threads) thread.wait = Wait::nothing;
  ++grid_barriers_passed;
  return true;
}

static void order(std::vector<size_t>& sequence) {
  std::iota(sequence.begin(), sequence.end(), size_t(0));
  if (settings().order == 1) std::reverse(sequence.begin(), sequence.end());
  if (settings().order > 1) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(unsigned(settings().order)));
}

static std::string describe_deadlock(const Blocks& blocks) {
  static const char* const kinds[] = {"running", "at a block barrier", "in a warp collective", "at a grid barrier", "gone"};
  std::string text = "divergent barrier:";
  int shown = 0;
  for (const Block& block : blocks)
    for (size_t i = 0; i < block.threads.size() && shown < 6; ++i) {
      const Thread& now = block.threads[i];
      if (i > 0 && block.threads[i - 1].wait == now.wait && block.threads[i - 1].place == now.place) continue;
      text += " " + name(now) + " is " + kinds[int(now.wait)] + (now.wait == Wait::gone ? "" : " " + at(now.place)) + ";";
      ++shown;
    }
  return text;
}

static void start(Block& block, const Launch& launch, uint64_t number) {
  block.launch = &launch;
  block.index = Dim3(unsigned(number % launch.grid.x), unsigned(number / launch.grid.x % launch.grid.y),
                     unsigned(number / launch.grid.x / launch.grid.y));
  block.shared.reserve(size_t(launch.shared_bytes + kRedZone));
  block.shared.assign(size_t(launch.shared_bytes), 0xFF);  // NaN in every float type
  block.shared.insert(block.shared.end(), size_t(kRedZone), kRedByte);
  block.threads.assign(launch.block.count(), Thread());
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block, thread.lane = int(i % 32);
    thread.index = Dim3(unsigned(i % launch.block.x), unsigned(i / launch.block.x % launch.block.y),
                        unsigned(i / launch.block.x / launch.block.y));
    const Places::Slot slot = places.take();
    thread.stack = slot.stack, thread.fiber = slot.fiber;
    thread.context = fresh_context(thread.stack, fiber_main);
  }
}

// Runs blocks [first, first + count), all of them live at once.
static void run_blocks(const Launch& launch, const std::vector<size_t>& numbers) {
  Blocks blocks(numbers.size());
  places.begin_blocks(numbers.size() * launch.block.count());
  for (size_t i = 0; i < numbers.size(); ++i) start(blocks[i], launch, numbers[i]);
  races::release(&launch_begin);
  std::vector<size_t> sequence(launch.block.count());
  order(sequence);
  for (bool alive = true; alive && error.empty();) {
    bool progress = false;
    for (Block& block : blocks)
      for (size_t i : sequence)
        if (block.threads[i].wait == Wait::nothing && error.empty()) to_fiber(block.threads[i]), progress = true;
    alive = false;
    for (Block& block : blocks) {
      progress |= release_block(block);
      for (const Thread& thread : block.threads) alive |= thread.wait != Wait::gone;
    }
    progress |= alive && release_grid(blocks);
    if (alive && !progress && error.empty()) error = describe_deadlock(blocks);
  }
  for (const Block& block : blocks)
    for (int64_t i = launch.shared_bytes; i < launch.shared_bytes + kRedZone && error.empty(); ++i)
      if (block.shared[size_t(i)] != kRedByte)
        error = "shared memory: byte " + std::to_string(i) + " was written, the block has " + std::to_string(launch.shared_bytes);
}

static std::mutex allowed_lock;
static std::map<const void*, int> allowed;
void allow_shared(const void* function, int bytes) {
  std::lock_guard<std::mutex> guard(allowed_lock);
  allowed[function] = bytes;
}
static int64_t shared_limit(const void* function) {
  std::lock_guard<std::mutex> guard(allowed_lock);
  auto found = allowed.find(function);
  return found == allowed.end() ? 48 * 1024 : std::max(found->second, kLeastShared);
}

bool run(const Launch& launch) {
  error.clear();
  const uint64_t blocks = launch.grid.count(), threads = launch.block.count();
  if (blocks == 0 || launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535)
    error = "a grid dimension is 0 or too large";
  else if (threads == 0 || threads > 1024 || launch.block.z > 64)
    error = "a block of " + std::to_string(threads) + " threads";
  else if (launch.shared_bytes > std::max(settings().shared_bytes, kLeastShared))
    error = "more shared memory than the device has";
  else if (launch.shared_bytes > shared_limit(launch.function))
    error = std::to_string(launch.shared_bytes) + " bytes of shared memory, more than was asked for";
  else if (launch.cooperative && blocks > uint64_t(settings().multiprocessors) * std::min<uint64_t>(
               2048 / threads, uint64_t(settings().shared_bytes) / std::max<uint64_t>(1, launch.shared_bytes)))
    error = "a cooperative grid of " + std::to_string(blocks) + " blocks is not resident at once";
  if (!error.empty()) return false;
  launch_log() += (launch.cooperative ? "cooperative " : "") + std::to_string(blocks) + " x " + std::to_string(threads) + " x " +
                  std::to_string(launch.shared_bytes) + "\n";
  running = &launch;
  scheduler_fiber = races::current_fiber();
  places.begin_launch();
  int64_t first = 0, count = int64_t(blocks);
  if (!launch.cooperative) {
    first = settings().first_block < 0 ? count + settings().first_block : settings().first_block;
    first = std::min(std::max<int64_t>(first, 0), count);
    count = std::min(count - first, settings().block_count);
  }
  std::vector<size_t> numbers(static_cast<size_t>(count));
  order(numbers);
  for (size_t& number : numbers) number += size_t(first);
  if (launch.cooperative)
    run_blocks(launch, numbers);
  else
    for (size_t i = 0; i < numbers.size() && error.empty(); ++i) run_blocks(launch, {numbers[i]});
  races::acquire(&launch_end);
  running = nullptr;
  return error.empty();
}

}  // namespace emulator
