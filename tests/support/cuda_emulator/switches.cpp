// The emulator's settings for the tests, by ctypes.
#include "common/device.h"
#include "emulator.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void afa_emulator_set_order(int order) { emulator::settings().order = order; }
EXPORT void afa_emulator_set_device(int multiprocessors, int shared_bytes, int compiled, int64_t room, int pause,
                                   int64_t l2_bytes) {
  afa::forget_devices();
  emulator::settings().compiled = compiled;
  emulator::settings().room = room;
  emulator::settings().pause = pause;
  emulator::settings().l2_bytes = l2_bytes;
  emulator::settings().multiprocessors = multiprocessors;
  emulator::settings().shared_bytes = shared_bytes;
}
EXPORT void afa_emulator_set_blocks(int64_t first, int64_t count) {
  emulator::settings().first_block = first;
  emulator::settings().block_count = count;
}
EXPORT void afa_emulator_set_dry(int dry) { emulator::settings().dry = dry != 0; }
EXPORT void afa_emulator_counts(int64_t* launches, int64_t* memsets) {
  *launches = emulator::counts().launches, *memsets = emulator::counts().memsets;
  emulator::counts() = {};
}
EXPORT const char* afa_emulator_launches() {
  static thread_local std::string given;
  given.swap(emulator::launch_log());
  emulator::launch_log().clear();
  return given.c_str();
}
