// A small OpenMP runtime for ThreadSanitizer: the compiler's own is not instrumented, so the sanitizer would not see its barriers
// and report every use of them. What `#pragma omp parallel`, `for` and `barrier` call, on threads the sanitizer knows.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned size) : size(size) {}
  const unsigned size;
  std::mutex lock;
  std::condition_variable changed;
  unsigned waiting = 0, round = 0;
  // A loop with a dynamic schedule; one between two barriers.
  bool shared_out = false;
  long next = 0, end = 0, step = 1, chunk = 1;

  void barrier() {
    std::unique_lock<std::mutex> guard(lock);
    const unsigned entered = round;
    if (++waiting == size) {
      waiting = 0, shared_out = false, ++round;
      changed.notify_all();
    } else {
      changed.wait(guard, [&] { return round != entered; });
    }
  }
  void share_out(long first, long last, long by, long at_once) {
    std::lock_guard<std::mutex> guard(lock);
    if (!shared_out) shared_out = true, next = first, end = last, step = by, chunk = at_once;
  }
  bool take(long* first, long* last) {
    std::lock_guard<std::mutex> guard(lock);
    if (next >= end) return false;
    *first = next, next = *last = next + step * chunk < end ? next + step * chunk : end;
    return true;
  }
};

thread_local Team* team = nullptr;
thread_local int number = 0;

void run(Team& of, void (*body)(void*), void* data) {
  std::vector<std::thread> others;
  Team* const outer = team;
  const int outer_number = number;
  for (unsigned i = 1; i < of.size; ++i)
    others.emplace_back([&of, i, body, data] {
      team = &of, number = int(i);
      body(data);
    });
  team = &of, number = 0;
  body(data);
  for (std::thread& other : others) other.join();
  team = outer, number = outer_number;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? int(team->size) : 1; }
int omp_get_max_threads() { return 4; }
void GOMP_barrier() {
  if (team) team->barrier();
}
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team fresh(threads ? threads : 4);
  run(fresh, body, data);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return team->take(first, last); }
bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
  team->share_out(begin, end, step, chunk);
  return team->take(first, last);
}
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

// A race that must be reported.
__attribute__((visibility("default"))) int afa_planted_race() {
  int counter = 0;
#pragma omp parallel num_threads(4)
  for (int i = 0; i < 100; ++i) ++counter;
  return counter;
}
}
