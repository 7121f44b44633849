// What Metal code sees of the machine that runs it: the current thread, its threadgroup, and the places where threads meet.
// Implemented by scheduler.cpp; included by every kernel through the shim.
#pragma once
#pragma clang system_header
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulator {

constexpr uint32_t simd_width = 32;
constexpr uint32_t max_threads_per_threadgroup = 1024;
constexpr size_t max_threadgroup_bytes = 32 * 1024;

struct Index3 {
  uint32_t x, y, z;
  uint64_t volume() const { return uint64_t(x) * y * z; }
};

// One threadgroup of a dispatch. `threads` is smaller than `dispatch_threads` at the ragged edges of the grid.
struct Threadgroup {
  Index3 grid;              // threads in the whole grid
  Index3 dispatch_threads;  // threads in a whole threadgroup
  Index3 groups;            // threadgroups in the grid
  Index3 position;          // of this threadgroup in the grid
  Index3 threads;           // threads in this threadgroup
};

struct ThreadId {
  Index3 in_grid, in_threadgroup;
  uint32_t linear, lane, simdgroup;
};

// What the 32 lanes of a SIMD-group hand to each other in one collective function.
struct Exchange {
  struct Slot {
    alignas(16) unsigned char bytes[32];
  };
  Slot slots[simd_width];
  uint32_t present;  // bit i: lane i took part

  bool has(uint32_t lane) const { return lane < simd_width && ((present >> lane) & 1); }

  template <class T>
  T from(uint32_t lane) const {
    T value;
    memcpy(static_cast<void*>(&value), slots[lane].bytes, sizeof(T));
    return value;
  }
};

extern Threadgroup threadgroup_now;
extern ThreadId thread_now;

// Threads meet here. `convergent` and `nomerge` keep one machine call a source call: the scheduler tells divergent calls by
// their return address.
__attribute__((convergent, nomerge, noinline)) const Exchange& exchange(const void* value, size_t bytes);
__attribute__((convergent, nomerge, noinline)) void wait_for_threadgroup();

// The whole SIMD-group must have taken part, as in a matrix product.
void require_all_lanes(const Exchange& exchanged);

// A shuffle read a lane that does not exist or took no part: its value is undefined, so it is made conspicuous.
void fill_undefined(void* value, size_t bytes);

// Called where a threadgroup variable is declared; fills it with poison once per threadgroup.
void declare_threadgroup_memory(void* memory, size_t bytes);

// The buffers of the dispatch that runs, by index.
extern void** buffers_now;

// Generated for each kernel: calls it once, as the current thread.
void call_kernel();

template <class T>
T undefined_value() {
  T value;
  fill_undefined(&value, sizeof(T));
  return value;
}

}  // namespace emulator

// The rewriter puts this after each declaration of a threadgroup variable.
#define EMULATOR_THREADGROUP_MEMORY(name) emulator::declare_threadgroup_memory((void*)&name, sizeof(name))
