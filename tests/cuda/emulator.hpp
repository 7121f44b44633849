// Runs a CUDA kernel's own text on a CPU, one block after the other, its threads as fibers that wait for each other at barriers,
// shuffles and products of the matrix units. It finds wrong results, lanes that miss a shuffle, and barriers that never open.
// Where TOGETHER is defined, all blocks of a grid run at once, each in a thread of the system, so that they can wait for each other.
#include <sched.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __device__
#define __global__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#ifdef TOGETHER
#define OF_A_BLOCK static thread_local
#else
#define OF_A_BLOCK static
#endif
#define __shared__ OF_A_BLOCK
#define __align__(bytes) __attribute__((aligned(bytes)))

namespace cuda {
namespace std = ::std;
}

struct Index {
  uint32_t x, y, z;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using std::max;
using std::min;

// Fibers ------------------------------------------------------------------------------------------------------------------

constexpr int LANES = 32;
constexpr int MOST_WORDS = 6;  // that a lane gives its warp at once
constexpr size_t STACK_BYTES = 1 << 18;

struct Warp {
  uint32_t given[2][LANES][MOST_WORDS];
  int arrived = 0, gone = 0, size = 0;
  unsigned turn = 0;
};

struct Fiber {
  ucontext_t context;
  Index place;
  int lane;
  Warp* warp;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived = 0, gone = 0;
  unsigned turn = 0, events = 0;
  int team_arrived[16] = {};
  unsigned team_turn[16] = {};
  const char* fault = nullptr;
};

OF_A_BLOCK Block block;
OF_A_BLOCK Fiber* current;
OF_A_BLOCK ucontext_t scheduler;
OF_A_BLOCK Index blockIdx;
static Index blockDim, gridDim;
static void (*kernel_call)();
OF_A_BLOCK void** arguments;  // of the launch: several grids may run at once
#define threadIdx (current->place)

static void step_aside() { swapcontext(&current->context, &scheduler); }

static void open_what_is_complete(Warp& warp) {
  if (warp.arrived > 0 && warp.arrived + warp.gone == warp.size) {
    if (warp.gone > 0) block.fault = "a lane left before its warp's exchange";
    warp.arrived = 0, warp.turn++, block.events++;
  }
  if (block.arrived > 0 && block.arrived + block.gone == int(block.fibers.size())) {
    block.arrived = 0, block.turn++, block.events++;
  }
}

inline void __syncthreads() {
  unsigned turn = block.turn;
  block.arrived++;
  while (block.turn == turn) step_aside();
}

inline void __syncwarp();

// Gives the warp this lane's words; returns those of all its lanes, which stay until the next but one exchange.
template <size_t COUNT>
const uint32_t (*exchange(const uint32_t (&words)[COUNT]))[MOST_WORDS] {
  static_assert(COUNT <= MOST_WORDS);
  Warp& warp = *current->warp;
  unsigned turn = warp.turn;
  std::copy(words, words + COUNT, warp.given[turn % 2][current->lane]);
  warp.arrived++;
  while (warp.turn == turn) step_aside();
  return warp.given[turn % 2];
}

inline void __syncwarp() { exchange<1>({0}); }

static void fiber_main() {
  kernel_call();
  current->done = true;
  block.events++, block.gone++, current->warp->gone++;
  swapcontext(&current->context, &scheduler);
}

// Runs one block; `backwards` lets later threads go first. Returns what went wrong, or null.
static const char* run_block(bool backwards) {
  int count = blockDim.x * blockDim.y * blockDim.z;
  OF_A_BLOCK std::vector<std::unique_ptr<char[]>> stacks;
  while (int(stacks.size()) < count) stacks.emplace_back(new char[STACK_BYTES]);
  block.fibers = std::vector<Fiber>(count);
  block.warps = std::vector<Warp>((count + LANES - 1) / LANES);
  block.arrived = block.gone = 0, block.fault = nullptr;
  std::fill_n(block.team_arrived, 16, 0);
  for (int i = 0; i < count; i++) {
    Fiber& fiber = block.fibers[i];
    fiber.place = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.lane = i % LANES, fiber.warp = &block.warps[i / LANES], fiber.warp->size++;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].get(), fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, fiber_main, 0);
  }
  while (block.gone < count) {
    unsigned events = block.events;
    for (int i = 0; i < count; i++) {
      current = &block.fibers[backwards ? count - 1 - i : i];
      if (current->done) continue;
      swapcontext(&scheduler, &current->context);
      open_what_is_complete(*current->warp);
      if (block.fault) return block.fault;
    }
    if (events == block.events) return "threads wait for each other for ever";
  }
  return nullptr;
}

// Runs a grid, in the order of its blocks or all at once.
static const char* run_grid(bool backwards, void** given = nullptr) {
#ifdef TOGETHER
  std::vector<const char*> faults(gridDim.x, nullptr);
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < gridDim.x; i++) {
    const uint32_t x = backwards ? gridDim.x - 1 - i : i;
    threads.emplace_back([x, backwards, given, &faults] {
      blockIdx = {x, 0, 0}, arguments = given;
      faults[x] = run_block(backwards);
    });
  }
  for (auto& thread : threads) thread.join();
  for (const char* fault : faults)
    if (fault) return fault;
#else
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
        if (const char* fault = run_block(backwards)) return fault;
#endif
  return nullptr;
}

// Numbers -----------------------------------------------------------------------------------------------------------------

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half(float value) { return {_Float16(value)}; }
inline __half __ushort_as_half(uint16_t bits) { return same_bits<__half>(bits); }
inline float __bfloat162float(__nv_bfloat16 value) { return same_bits<float>(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t bits = same_bits<uint32_t>(value);
  if (value != value) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
// A product of two 16-bit floats is exact in float32, so rounding it once is what the machine does.
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(
      __bfloat162float(a.x) * __bfloat162float(b.x), __bfloat162float(a.y) * __bfloat162float(b.y));
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(
      __bfloat162float(a.x) - __bfloat162float(b.x), __bfloat162float(a.y) - __bfloat162float(b.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __floats2half2_rn(
      std::fma(__half2float(a.x), __half2float(b.x), __half2float(c.x)),
      std::fma(__half2float(a.y), __half2float(b.y), __half2float(c.y)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __floats2bfloat162_rn(
      std::fma(__bfloat162float(a.x), __bfloat162float(b.x), __bfloat162float(c.x)),
      std::fma(__bfloat162float(a.y), __bfloat162float(b.y), __bfloat162float(c.y)));
}
inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline uint32_t __float_as_uint(float value) { return same_bits<uint32_t>(value); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline float __shfl_sync(uint32_t, float value, int lane) {
  return same_bits<float>(exchange<1>({same_bits<uint32_t>(value)})[lane % LANES][0]);
}
inline float __shfl_xor_sync(uint32_t mask, float value, int offset) {
  return __shfl_sync(mask, value, current->lane ^ offset);
}
inline int __shfl_xor_sync(uint32_t, int value, int offset) {
  return int(exchange<1>({uint32_t(value)})[current->lane ^ offset][0]);
}

inline bool __all_sync(uint32_t, bool value) {
  const uint32_t(*given)[MOST_WORDS] = exchange<1>({uint32_t(value)});
  return std::all_of(given, given + LANES, [](const uint32_t(&each)[MOST_WORDS]) { return each[0] != 0; });
}
inline bool __any_sync(uint32_t mask, bool value) { return !__all_sync(mask, !value); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
inline T __ldcg(const T* from) {
  return *from;
}

// What kernels/ptx.cuh has ------------------------------------------------------------------------------------------------

namespace marlin {

template <bool HALF>
float element(uint32_t pair, int which) {
  uint16_t bits = pair >> 16 * which;
  return HALF ? __half2float(__ushort_as_half(bits)) : __bfloat162float({bits});
}

// The layout of mma.m16n8k16: lane 4 g + t has rows g and g + 8 and columns 2t, 2t + 1 of the product.
template <bool HALF>
void multiply_tiles(
    float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t(*given)[MOST_WORDS] = exchange<6>({a0, a1, a2, a3, b0, b1});
  for (int i = 0; i < 4; i++) {
    int row = current->lane / 4, column = current->lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      int part = k % 8 / 2, second = k / 8;
      float a = element<HALF>(given[row * 4 + part][second * 2 + i / 2], k % 2);
      sum += a * element<HALF>(given[column * 4 + part][4 + second], k % 2);
    }
    sums[i] += sum;
  }
}

inline void add_release(unsigned long long* to, unsigned long long value) { __atomic_fetch_add(to, value, __ATOMIC_RELEASE); }

// A thread that looks again and again is no standstill.
inline unsigned long long load_acquire(const unsigned long long* from) {
  block.events++;
  sched_yield();
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

// Each half by itself, as on the machine.
inline void load_two(const unsigned long long* from, unsigned long long& one, unsigned long long& other) {
  one = __atomic_load_n(from, __ATOMIC_RELAXED), other = __atomic_load_n(from + 1, __ATOMIC_RELAXED);
}

inline void store_one(unsigned long long* to, unsigned long long value) { __atomic_store_n(to, value, __ATOMIC_RELAXED); }

inline void store_for_peer(unsigned long long* to, unsigned long long value) { store_one(to, value); }

inline unsigned long long load_of_peer(const unsigned long long* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }

// What is awaited may be the work of another thread of this block.
inline void look_away() {
  block.events++;
  sched_yield();
  step_aside();
}

inline void synchronize_team(int number, int threads) {
  const unsigned turn = block.team_turn[number];
  if (++block.team_arrived[number] == threads) block.team_arrived[number] = 0, block.team_turn[number]++, block.events++;
  while (block.team_turn[number] == turn) step_aside();
}

inline void send_to_cache(const void*, uint32_t) {}

inline void copy_piece(uint4* to, const uint4* from) { *to = *from; }

inline void wait_for_copies() {}

inline unsigned long long nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

inline unsigned long long cycles() { return nanoseconds(); }

static size_t shared_bytes;

// What the launch asks for, NaN at first.
inline void* dynamic_shared() {
  OF_A_BLOCK std::vector<uint4> memory(shared_bytes / sizeof(uint4) + 1, uint4{~0u, ~0u, ~0u, ~0u});
  return memory.data();
}

template <bool WIDE, int COUNT>
void load_words(const void* from, uint32_t (&words)[COUNT]);

template <bool WIDE>
void load_once(const uint32_t* from, uint32_t (&words)[4]) {
  load_words<WIDE>(from, words);
}

}  // namespace marlin

namespace mlx::core::cu {
using Shape = std::array<int32_t, 10>;
using Strides = std::array<int64_t, 10>;
}  // namespace mlx::core::cu
