// What the choice between the plans knows of cards. A device takes the row with the highest architecture not above its own, and its
// bandwidths in proportion to its multiprocessors.
//
// This is the place for measurements: benchmarks/bench_plans.py (a stage of benchmarks/on_gpu.sh) times both plans and prints them
// beside what follows from the row. Where the choice is wrong, change clock_ghz for resident, gather_words for streaming with
// many channels, l2_gbs and memory_gbs for few, launch_us for small images; then set `measured`.
#pragma once

namespace afa {

struct PlanCosts {
  int architecture;       // 90 for 9.0
  const char* card;
  int multiprocessors;    // for which the bandwidths hold
  double clock_ghz;
  double l2_gbs;          // read from L2 by either plan's pattern: weights in order, halos of tiles
  double memory_gbs;
  double gather_words;    // 4-byte words a cycle that a multiprocessor's L1 gives neighbours that lie across its lines
  double launch_us;       // from the end of a kernel to the start of the next
  bool measured;
};

// Those of 9.0 were fitted to an H200's times (benchmarks/results/plans-cuda.txt): resident within 6 %, streaming within 30 % from
// 2x3x256x256 up. The others are data sheets' numbers times the shares that it reached of its own: of L2 0.56, of memory 0.6.
constexpr PlanCosts kPlanCosts[] = {
    {75, "T4", 40, 1.5, 620, 190, 9.5, 4.0, false},
    {80, "A100", 108, 1.4, 2500, 930, 9.5, 4.0, false},
    {89, "RTX 4090", 128, 2.5, 2800, 600, 9.5, 4.0, false},
    {90, "H200", 132, 2.0, 3100, 2500, 9.5, 4.0, true},
};

}  // namespace afa
