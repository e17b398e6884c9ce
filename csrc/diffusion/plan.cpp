// The plan of a diffusion on a GPU; see plan.h.
#include "diffusion/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "diffusion/plan_table.h"

namespace afa {

// ---- resident --------------------------------------------------------------------------------------------------------------

static int64_t blocks_for(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }
// Bytes that an array takes of a block's shared memory, as cuda_common.cuh's SharedArena hands it out.
static int64_t shared_array(int64_t element, int64_t count) { return round_up(count * element, 16); }

constexpr double kSharedWords = 32;  // of 4 bytes, a cycle, from a multiprocessor's shared memory
constexpr double kGroupUs = 1.45;    // of each group of channels: a round trip to L2 and the block's barriers
constexpr double kBarrierUs = 0.57;  // of each iteration of the images that are walked through at once

// Completes a plan whose tile is chosen; its cost, microseconds of an iteration, or infinity if it does not fit.
static double resident_cost(const DiffusionArgs& args, int planes, const DeviceLimits& device, const PlanCosts& costs, ResidentPlan* plan) {
  const int64_t batch = args.masks.size[0], channels = args.masks.size[1], shared_taps = args.taps - plan->held;
  const int threads = resident_threads(plan->held), tiles = plan->tiles_x * plan->tiles_y;
  if (plan->held > 0 && (plan->half || shared_taps < 0 || plan->pixels() > kHeldPixels * threads)) return INFINITY;
  plan->rows = plan->tile_h + 2 * plan->reach_y;
  plan->images = int(std::min<int64_t>(batch, device.multiprocessors / tiles));
  const int64_t fixed = shared_array(4, plan->pixels() * shared_taps / (plan->half ? 2 : 1)) + shared_array(4, channels + 1) + shared_array(4, 2);
  const int64_t plane = int64_t(plan->rows) * plan->pitch, room = (device.shared_bytes - fixed - 16) / (4 * plane);
  if (room < std::max(planes, 1)) return INFINITY;
  const int64_t at_once = std::min<int64_t>(kResidentChannels, channels);
  // More channels than fit at once: half of the room for those that are summed, half for those that come next.
  plan->stages = channels > std::min(at_once, room) && room >= 2 ? 2 : 1;
  plan->channels = int(std::min(at_once, room / plan->stages));
  plan->planes = std::max(plan->channels * plan->stages, planes);
  plan->shared_bytes = int(fixed + shared_array(4, plan->planes * plane));
  plan->vectors = (plan->tile_w + 2 * plan->reach_x) / 4;
  plan->copy_lanes = std::min(plan->vectors, threads), plan->copy_rows = threads / plan->copy_lanes;
  plan->threads = threads;  // also where a tile has fewer pixels: they load its halo
  const double groups = double(blocks_for(channels, plan->channels));
  const double words = double(round_up(plan->pixels(), 32)) * double(args.taps * channels + shared_taps * groups);
  const double gather = words / (1e3 * costs.clock_ghz * kSharedWords);
  const double halo = 4.0 * double(plane * channels) * costs.multiprocessors / (1e3 * costs.l2_gbs);
  return double(blocks_for(batch, plan->images)) * (gather + halo + kGroupUs * groups + kBarrierUs);
}

// The cheapest plan in `best`, its cost; infinity if the masks do not fit.
static double plan_resident(const DiffusionArgs& args, int planes, bool half, const DeviceLimits& device, const PlanCosts& costs,
                            ResidentPlan* best) {
  const int64_t channels = args.masks.size[1], height = args.masks.size[2], width = args.masks.size[3];
  if (!device.cooperative || args.transpose || args.num_iter < 1) return INFINITY;
  if (args.taps > kResidentTaps || channels > 4096) return INFINITY;
  if (height * width > (int64_t(1) << 24) || (half && args.taps % 2 != 0)) return INFINITY;
  ResidentPlan plan;
  plan.half = half;
  int near_y = 0, near_x = 0;  // how far the taps reach that may be in registers
  for (int64_t t = 0; t < args.taps; ++t) {
    plan.reach_y = int(std::min<int64_t>(std::max(plan.reach_y, std::abs(args.offsets[2 * t])), height));
    plan.reach_x = int(std::min<int64_t>(std::max(plan.reach_x, std::abs(args.offsets[2 * t + 1])), width));
    if (t < kHeldTaps) near_y = plan.reach_y, near_x = plan.reach_x;
  }
  plan.reach_x = int(round_up(plan.reach_x, 4));
  plan.near_row = plan.reach_y - near_y, plan.near_vector = (plan.reach_x - near_x) / 4;
  double lowest = INFINITY;
  for (plan.tile_w = 16; plan.tile_w <= 128 && plan.tile_w < 2 * width + 32; plan.tile_w *= 2) {
    plan.tile_shift = plan.tile_w == 16 ? 4 : plan.tile_shift + 1;
    plan.tiles_x = int(blocks_for(width, plan.tile_w));
    // Two rows of 16 pixels make a warp: their banks must not meet, unless there is no room for that.
    const int narrow = plan.tile_w + 2 * plan.reach_x, apart = plan.tile_w == 16 ? narrow + (48 - narrow % 32) % 32 : narrow;
    for (int64_t cuts = 1; cuts * plan.tiles_x <= device.multiprocessors && cuts <= height; ++cuts) {
      plan.tile_h = int(blocks_for(height, cuts)), plan.tiles_y = int(blocks_for(height, plan.tile_h));
      for (plan.held = 0; plan.held <= kHeldTaps; plan.held += kHeldTaps) {
        plan.pitch = apart;
        double cost = resident_cost(args, planes, device, costs, &plan);
        if (cost == INFINITY && narrow < apart) plan.pitch = narrow, cost = 2 * resident_cost(args, planes, device, costs, &plan);
        if (cost < lowest) lowest = cost, *best = plan;
      }
    }
  }
  return lowest;
}

// ---- streaming -------------------------------------------------------------------------------------------------------------

constexpr double kClearly = 0.1;  // where both are as near as that, the one that takes no memory
constexpr double kStays = 0.8;    // of L2, what may be read again and again and still be there

static const PlanCosts& costs_of(const DeviceLimits& device) {
  const PlanCosts* best = kPlanCosts;
  for (const PlanCosts& costs : kPlanCosts)
    if (costs.architecture <= device.architecture) best = &costs;
  return *best;
}

// Microseconds of an iteration.
static double streaming_cost(const DiffusionArgs& args, bool half, bool makes, const DeviceLimits& device, const PlanCosts& costs) {
  const auto& size = args.masks.size;
  const double pixels = double(size[0] * size[2] * size[3]), channels = double(size[1]), taps = double(args.taps);
  const double weights = pixels * taps * (half ? 2 : 4), masks = pixels * channels * 8;
  const double groups = std::ceil(channels / (channels <= 4 ? 4 : 7));
  const double share = double(device.multiprocessors) / costs.multiprocessors;  // of the bandwidths, 1000 bytes a microsecond
  const double rate = 1e3 * share * (weights + masks <= kStays * double(device.l2_bytes) ? costs.l2_gbs : costs.memory_gbs);
  const double gather = pixels * taps * channels / (1e3 * costs.clock_ghz * costs.gather_words * device.multiprocessors);
  const double once = makes ? weights / rate / double(std::max<int64_t>(args.num_iter, 1)) : 0.0;
  return costs.launch_us + std::max(weights * groups / rate, gather) + once;
}

// ---- the choice ------------------------------------------------------------------------------------------------------------

PlanWish plan_wish() {
  const char* wish = std::getenv("AFA_PLAN");
  if (wish == nullptr || *wish == 0 || std::strcmp(wish, "auto") == 0) return PlanWish::automatic;
  if (std::strcmp(wish, "resident") == 0) return PlanWish::resident;
  return std::strcmp(wish, "streaming") == 0 || std::strcmp(wish, "stream") == 0 ? PlanWish::streaming : PlanWish::unknown;
}

PlanChoice choose_plan(const DiffusionArgs& args, int planes, bool half, bool makes, const DeviceLimits& device, PlanWish wish) {
  const PlanCosts& costs = costs_of(device);
  PlanChoice choice;
  choice.card = costs.card, choice.measured = costs.measured;
  choice.resident_us = plan_resident(args, planes, half, device, costs, &choice.plan);
  choice.streaming_us = streaming_cost(args, half, makes, device, costs);
  choice.fits = choice.resident_us < INFINITY;
  const bool clearly = choice.streaming_us < (1 - kClearly) * choice.resident_us;
  choice.resident = choice.fits && wish != PlanWish::streaming && (wish == PlanWish::resident || !clearly);
  return choice;
}

}  // namespace afa
