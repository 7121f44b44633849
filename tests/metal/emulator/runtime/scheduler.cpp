// One threadgroup after another; in it, each SIMD-group runs until all of its lanes wait at a threadgroup barrier or are done.
//
// Lanes are run one at a time up to their next meeting point. A kernel that needs a barrier which is not there therefore
// sees memory that depends on the order of the lanes, and another order gives another result.
#include "scheduler.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "fibre.h"

namespace emulator {

Threadgroup threadgroup_now;
ThreadId thread_now;
void** buffers_now;

namespace {

enum class State { ready, in_collective, at_barrier, done };

struct Thread {
  Fibre fibre;
  ThreadId id;
  State state;
  const void* call_site;  // of the collective or barrier that it waits in
};

// Lanes that leave a collective read one exchange while early ones may already write the next: two are enough.
struct Simdgroup {
  Exchange exchanges[2];
  uint32_t collectives;
  Exchange& open() { return exchanges[collectives & 1]; }
};

struct ThreadgroupVariable {
  void* memory;
  bool poisoned;
};

std::vector<std::unique_ptr<Thread>> threads;
std::vector<Simdgroup> simdgroups;
std::vector<ThreadgroupVariable> threadgroup_variables;
Thread* current;
Outcome outcome;
Poison poison_now;
std::mt19937 random_bits;

void fill_with_poison(void* memory, size_t bytes) {
  // Repeated bytes that make a NaN, a huge and a hugely negative number in every floating-point type.
  constexpr unsigned char patterns[] = {0xff, 0x7b, 0xfb};
  if (poison_now != Poison::random) {
    memset(memory, patterns[static_cast<int>(poison_now)], bytes);
    return;
  }
  for (size_t i = 0; i < bytes; i++) static_cast<unsigned char*>(memory)[i] = random_bits() >> 24;
}

void run_until_it_waits(Thread& thread) {
  current = &thread;
  thread_now = thread.id;
  thread.fibre.enter();
}

void thread_entry() {
  call_kernel();
  current->state = State::done;
  current->fibre.leave();
  __builtin_unreachable();  // a finished thread is never entered again
}

template <class Sequence>
void put_in_order(Sequence& sequence, Order order) {
  if (order == Order::reverse) std::reverse(sequence.begin(), sequence.end());
  if (order == Order::random) std::shuffle(sequence.begin(), sequence.end(), random_bits);
}

std::vector<uint32_t> indices_in_order(uint32_t begin, uint32_t end, Order order) {
  std::vector<uint32_t> indices(end - begin);
  std::iota(indices.begin(), indices.end(), begin);
  put_in_order(indices, order);
  return indices;
}

void start_threads() {
  const Index3 size = threadgroup_now.threads;
  const uint32_t count = size.volume();
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  for (uint32_t i = 0; i < count; i++) {
    Thread& thread = *threads[i];
    const Index3 within = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    const Index3 corner = threadgroup_now.position, step = threadgroup_now.dispatch_threads;
    thread.id.in_threadgroup = within;
    thread.id.in_grid = {corner.x * step.x + within.x, corner.y * step.y + within.y, corner.z * step.z + within.z};
    thread.id.linear = i;
    thread.id.lane = i % simd_width;
    thread.id.simdgroup = i / simd_width;
    thread.state = State::ready;
    thread.fibre.prepare(thread_entry);
  }
  simdgroups.resize((count + simd_width - 1) / simd_width);
  for (Simdgroup& simdgroup : simdgroups) simdgroup.collectives = 0;
  for (ThreadgroupVariable& variable : threadgroup_variables) variable.poisoned = false;
  outcome.threadgroup_bytes = 0;
}

// Ends the collective that lanes [begin, end) wait in. False when none waits, or when they do not wait in the same one.
bool finish_collective(uint32_t begin, uint32_t end) {
  uint32_t waiting = 0;
  const void* call_site = nullptr;
  bool at_barrier = false, other_site = false;
  for (uint32_t i = begin; i < end; i++) {
    const Thread& thread = *threads[i];
    at_barrier |= thread.state == State::at_barrier;
    if (thread.state != State::in_collective) continue;
    other_site |= waiting && thread.call_site != call_site;
    call_site = thread.call_site;
    waiting |= 1u << (i - begin);
  }
  if (!waiting) return false;
  if (at_barrier || other_site) {
    outcome.error = "divergent SIMD-group function: lanes of SIMD-group " + std::to_string(begin / simd_width);
    outcome.error += at_barrier ? " wait at a threadgroup barrier while others wait in a SIMD-group function"
                                : " wait in different SIMD-group functions or call sites";
    return false;
  }
  const uint32_t lanes = end - begin;
  if (waiting != (lanes == simd_width ? ~0u : (1u << lanes) - 1)) outcome.events |= partial_simdgroup;
  Simdgroup& simdgroup = simdgroups[begin / simd_width];
  simdgroup.open().present = waiting;
  simdgroup.collectives++;
  outcome.collectives++;
  for (uint32_t i = begin; i < end; i++)
    if (threads[i]->state == State::in_collective) threads[i]->state = State::ready;
  return true;
}

void run_simdgroup(uint32_t simdgroup, Order order) {
  const uint32_t begin = simdgroup * simd_width;
  const uint32_t end = std::min<uint32_t>(begin + simd_width, threadgroup_now.threads.volume());
  do {
    for (uint32_t i : indices_in_order(begin, end, order))
      if (threads[i]->state == State::ready) run_until_it_waits(*threads[i]);
  } while (finish_collective(begin, end));
}

// Lets the threads past the barrier that all of them wait at. False when all are done, or when they wait at different ones.
bool pass_barrier() {
  const uint32_t count = threadgroup_now.threads.volume();
  uint32_t waiting = 0;
  const void* call_site = nullptr;
  for (uint32_t i = 0; i < count; i++) {
    const Thread& thread = *threads[i];
    if (thread.state != State::at_barrier) continue;
    if (waiting && thread.call_site != call_site) {
      outcome.error = "divergent barrier: threads wait at different threadgroup_barrier calls";
      return false;
    }
    call_site = thread.call_site;
    waiting++;
  }
  if (!waiting) return false;
  if (waiting < count) outcome.events |= left_before_barrier;
  outcome.barriers++;
  for (uint32_t i = 0; i < count; i++)
    if (threads[i]->state == State::at_barrier) threads[i]->state = State::ready;
  return true;
}

void run_threadgroup(Order order) {
  start_threads();
  outcome.threads += threadgroup_now.threads.volume();
  do {
    for (uint32_t simdgroup : indices_in_order(0, simdgroups.size(), order)) {
      run_simdgroup(simdgroup, order);
      if (!outcome.error.empty()) return;
    }
  } while (pass_barrier());
}

uint32_t groups_along(uint32_t grid, uint32_t threadgroup) { return (grid + threadgroup - 1) / threadgroup; }

uint32_t threads_along(uint32_t grid, uint32_t threadgroup, uint32_t position) {
  return std::min(threadgroup, grid - position * threadgroup);
}

}  // namespace

const Exchange& exchange(const void* value, size_t bytes) {
  Thread& self = *current;
  Exchange& open = simdgroups[self.id.simdgroup].open();
  memcpy(open.slots[self.id.lane].bytes, value, bytes);
  self.call_site = __builtin_return_address(0);
  self.state = State::in_collective;
  self.fibre.leave();
  return open;
}

void wait_for_threadgroup() {
  current->call_site = __builtin_return_address(0);
  current->state = State::at_barrier;
  current->fibre.leave();
}

void require_all_lanes(const Exchange& exchanged) {
  if (exchanged.present != ~0u) outcome.events |= partial_simdgroup;
}

void fill_undefined(void* value, size_t bytes) {
  outcome.events |= undefined_lane_read;
  fill_with_poison(value, bytes);
}

void declare_threadgroup_memory(void* memory, size_t bytes) {
  auto variable = std::find_if(threadgroup_variables.begin(), threadgroup_variables.end(),
                               [memory](const ThreadgroupVariable& known) { return known.memory == memory; });
  if (variable == threadgroup_variables.end())
    variable = threadgroup_variables.insert(threadgroup_variables.end(), {memory, false});
  if (variable->poisoned) return;
  variable->poisoned = true;
  outcome.threadgroup_bytes += bytes;
  if (outcome.threadgroup_bytes > max_threadgroup_bytes) outcome.events |= threadgroup_memory_over;
  fill_with_poison(memory, bytes);
}

Outcome dispatch(void** buffers, Index3 grid, Index3 threadgroup, Order order, Poison poison, uint32_t seed) {
  outcome = Outcome();
  buffers_now = buffers;
  poison_now = poison;
  random_bits.seed(seed);
  // As dispatchThreads: the threadgroup is cut to the grid, and the last ones along each side are smaller.
  const Index3 whole = {std::min(threadgroup.x, grid.x), std::min(threadgroup.y, grid.y), std::min(threadgroup.z, grid.z)};
  if (whole.volume() > max_threads_per_threadgroup) {
    outcome.error = "more than 1024 threads in a threadgroup";
    return outcome;
  }
  const Index3 groups = {groups_along(grid.x, whole.x), groups_along(grid.y, whole.y), groups_along(grid.z, whole.z)};
  for (uint32_t group : indices_in_order(0, groups.volume(), order)) {
    const Index3 at = {group % groups.x, group / groups.x % groups.y, group / (groups.x * groups.y)};
    const Index3 size = {threads_along(grid.x, whole.x, at.x), threads_along(grid.y, whole.y, at.y),
                         threads_along(grid.z, whole.z, at.z)};
    threadgroup_now = {grid, whole, groups, at, size};
    run_threadgroup(order);
    if (!outcome.error.empty()) break;
  }
  return outcome;
}

}  // namespace emulator
