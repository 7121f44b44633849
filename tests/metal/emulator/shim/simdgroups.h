// Barriers, and what the 32 lanes of a SIMD-group do together: reductions, shuffles, scans and votes.
#pragma once
#include "integers.h"
#include "threads.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((int)a | (int)b); }
enum memory_order { memory_order_relaxed, memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

METAL_FUNC void threadgroup_barrier(mem_flags) { emulator::wait_for_threadgroup(); }
METAL_FUNC void simdgroup_barrier(mem_flags) {
  const char nothing = 0;
  emulator::exchange(&nothing, 1);
}
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

METAL_FUNC uint this_lane() { return emulator::thread_now.lane; }

template <class T>
METAL_FUNC const emulator::Exchange& exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(emulator::Exchange::Slot), "a value is too large to be handed to other lanes");
  return emulator::exchange(&value, sizeof(T));
}

// What another lane handed over. Lanes that do not exist or took no part have undefined values.
template <class T>
METAL_FUNC T read_lane(const emulator::Exchange& exchanged, uint lane) {
  return exchanged.has(lane) ? exchanged.from<T>(lane) : emulator::undefined_value<T>();
}

// In a fixed tree over the lanes that took part; the hardware's order is not known.
template <class T, class F>
METAL_FUNC T reduce_lanes(T value, F function) {
  const emulator::Exchange& exchanged = exchange(value);
  T values[emulator::simd_width];
  bool present[emulator::simd_width];
  for (uint i = 0; i < emulator::simd_width; i++) {
    present[i] = exchanged.has(i);
    if (present[i]) values[i] = exchanged.from<T>(i);
  }
  for (uint distance = 1; distance < emulator::simd_width; distance *= 2)
    for (uint i = 0; i < emulator::simd_width; i += 2 * distance) {
      if (!present[i + distance]) continue;
      values[i] = present[i] ? function(values[i], values[i + distance]) : values[i + distance];
      present[i] = true;
    }
  return values[0];
}

#define EMULATOR_REDUCTION(name, expression)                                   \
  template <class T>                                                           \
  METAL_FUNC T name(T value) {                                                 \
    return reduce_lanes(value, [](T a, T b) -> T { return expression; });      \
  }
EMULATOR_REDUCTION(simd_sum, (T)(a + b))
EMULATOR_REDUCTION(simd_product, (T)(a * b))
EMULATOR_REDUCTION(simd_max, max(a, b))
EMULATOR_REDUCTION(simd_min, min(a, b))
EMULATOR_REDUCTION(simd_and, (T)(a & b))
EMULATOR_REDUCTION(simd_or, (T)(a | b))
EMULATOR_REDUCTION(simd_xor, (T)(a ^ b))
#undef EMULATOR_REDUCTION

template <class T>
METAL_FUNC T simd_shuffle(T value, ushort lane) {
  return read_lane<T>(exchange(value), lane);
}
template <class T>
METAL_FUNC T simd_broadcast(T value, ushort lane) {
  return read_lane<T>(exchange(value), lane);
}
template <class T>
METAL_FUNC T simd_broadcast_first(T value) {
  const emulator::Exchange& exchanged = exchange(value);
  return read_lane<T>(exchanged, __builtin_ctz(exchanged.present));
}
template <class T>
METAL_FUNC T simd_shuffle_xor(T value, ushort mask) {
  return read_lane<T>(exchange(value), this_lane() ^ mask);
}
template <class T>
METAL_FUNC T simd_shuffle_down(T value, ushort distance) {
  return read_lane<T>(exchange(value), this_lane() + distance);
}
template <class T>
METAL_FUNC T simd_shuffle_up(T value, ushort distance) {
  return read_lane<T>(exchange(value), this_lane() - distance);  // below lane 0 it wraps to a lane that does not exist
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_down(T value, ushort distance) {
  return read_lane<T>(exchange(value), (this_lane() + distance) % emulator::simd_width);
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_up(T value, ushort distance) {
  return read_lane<T>(exchange(value), (this_lane() - distance) % emulator::simd_width);
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T value, T filling, ushort distance) {
  struct Pair {
    T value, filling;
  };
  const emulator::Exchange& exchanged = exchange(Pair{value, filling});
  const uint lane = this_lane() + distance;
  return lane < emulator::simd_width ? read_lane<Pair>(exchanged, lane).value
                                     : read_lane<Pair>(exchanged, lane - emulator::simd_width).filling;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T value, T filling, ushort distance) {
  struct Pair {
    T value, filling;
  };
  const emulator::Exchange& exchanged = exchange(Pair{value, filling});
  const uint lane = this_lane() - distance;
  return lane < emulator::simd_width ? read_lane<Pair>(exchanged, lane).value
                                     : read_lane<Pair>(exchanged, lane + emulator::simd_width).filling;
}

template <class T, class F>
METAL_FUNC T scan_lanes(T value, T start, uint end, F function) {
  const emulator::Exchange& exchanged = exchange(value);
  for (uint i = 0; i < end; i++)
    if (exchanged.has(i)) start = function(start, exchanged.from<T>(i));
  return start;
}
template <class T>
METAL_FUNC T simd_prefix_inclusive_sum(T value) {
  return scan_lanes(value, (T)0, this_lane() + 1, [](T a, T b) { return (T)(a + b); });
}
template <class T>
METAL_FUNC T simd_prefix_exclusive_sum(T value) {
  return scan_lanes(value, (T)0, this_lane(), [](T a, T b) { return (T)(a + b); });
}
template <class T>
METAL_FUNC T simd_prefix_inclusive_product(T value) {
  return scan_lanes(value, (T)1, this_lane() + 1, [](T a, T b) { return (T)(a * b); });
}
template <class T>
METAL_FUNC T simd_prefix_exclusive_product(T value) {
  return scan_lanes(value, (T)1, this_lane(), [](T a, T b) { return (T)(a * b); });
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t lanes;
  explicit operator vote_t() const { return lanes; }
  bool all() const { return lanes == ~0u; }
  bool any() const { return lanes != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool vote) {
  const emulator::Exchange& exchanged = exchange(vote);
  simd_vote votes = {0};
  for (uint i = 0; i < emulator::simd_width; i++)
    if (exchanged.has(i) && exchanged.from<bool>(i)) votes.lanes |= 1ul << i;
  return votes;
}
METAL_FUNC bool simd_any(bool vote) { return simd_ballot(vote).any(); }
METAL_FUNC bool simd_all(bool vote) { return !simd_ballot(!vote).any(); }
METAL_FUNC bool simd_is_first() { return this_lane() == (uint)__builtin_ctz(exchange(char(0)).present); }

METAL_FUNC uint first_of_quad() { return this_lane() & ~3u; }
template <class T>
METAL_FUNC T quad_shuffle_xor(T value, ushort mask) {
  return read_lane<T>(exchange(value), first_of_quad() | ((this_lane() ^ mask) & 3));
}
template <class T>
METAL_FUNC T quad_broadcast(T value, ushort lane) {
  return read_lane<T>(exchange(value), first_of_quad() | (lane & 3));
}
template <class T, class F>
METAL_FUNC T reduce_quad(T value, F function) {
  const emulator::Exchange& exchanged = exchange(value);
  const uint first = first_of_quad();
  return function(function(read_lane<T>(exchanged, first), read_lane<T>(exchanged, first + 1)),
                  function(read_lane<T>(exchanged, first + 2), read_lane<T>(exchanged, first + 3)));
}
template <class T>
METAL_FUNC T quad_sum(T value) {
  return reduce_quad(value, [](T a, T b) { return (T)(a + b); });
}
template <class T>
METAL_FUNC T quad_max(T value) {
  return reduce_quad(value, [](T a, T b) { return max(a, b); });
}

}  // namespace metal
