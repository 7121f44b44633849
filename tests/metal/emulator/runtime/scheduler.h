// Running one dispatch: the order in which threads take their turns, and what is reported back.
#pragma once
#include <cstdint>
#include <string>
#include "threads.h"

namespace emulator {

enum class Order { forward, reverse, random };

// What memory holds before anybody writes it. No single value is caught by every kernel: max() swallows a NaN, so each
// run of a check uses another one.
enum class Poison { nan, huge, minus_huge, random };

// Suspicious events, as bits.
enum Event : uint32_t {
  partial_simdgroup = 1,       // a SIMD-group function was called by some of the lanes
  left_before_barrier = 2,     // threads returned while others waited at a threadgroup barrier
  undefined_lane_read = 4,     // a shuffle read from a lane that took no part
  threadgroup_memory_over = 8  // more than 32 KiB of threadgroup memory
};

struct Outcome {
  std::string error;  // empty when the dispatch ended
  uint32_t events = 0;
  uint64_t threads = 0, collectives = 0, barriers = 0;
  size_t threadgroup_bytes = 0;
};

Outcome dispatch(void** buffers, Index3 grid, Index3 threadgroup, Order order, Poison poison, uint32_t seed);

}  // namespace emulator
