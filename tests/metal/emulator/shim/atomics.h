// Metal's atomics. Threads take turns and never interrupt each other, so plain operations are atomic.
#pragma once
#include "simdgroups.h"

namespace metal {

template <class T>
struct atomic {
  T value;
};
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

// Of an atomic in any address space; `expression` is of the old value and the operand.
#define EMULATOR_ATOMIC(name, expression)                                                    \
  template <class Pointer, class U>                                                          \
  METAL_FUNC auto name(Pointer object, U operand_given, memory_order) {                      \
    const auto old = object->value;                                                          \
    const decltype(+old) operand = operand_given;                                            \
    object->value = expression;                                                              \
    return old;                                                                              \
  }
EMULATOR_ATOMIC(atomic_fetch_add_explicit, old + operand)
EMULATOR_ATOMIC(atomic_fetch_sub_explicit, old - operand)
EMULATOR_ATOMIC(atomic_fetch_max_explicit, old < operand ? operand : old)
EMULATOR_ATOMIC(atomic_fetch_min_explicit, operand < old ? operand : old)
EMULATOR_ATOMIC(atomic_fetch_or_explicit, old | operand)
EMULATOR_ATOMIC(atomic_fetch_and_explicit, old & operand)
EMULATOR_ATOMIC(atomic_fetch_xor_explicit, old ^ operand)
EMULATOR_ATOMIC(atomic_exchange_explicit, operand)
#undef EMULATOR_ATOMIC

template <class Pointer>
METAL_FUNC auto atomic_load_explicit(Pointer object, memory_order) {
  return object->value;
}
template <class Pointer, class U>
METAL_FUNC void atomic_store_explicit(Pointer object, U value, memory_order) {
  object->value = value;
}
template <class Pointer, class T, class U>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(Pointer object, T* expected, U desired, memory_order, memory_order) {
  const T old = object->value;
  const bool equal = __builtin_memcmp(&old, expected, sizeof(T)) == 0;
  if (equal)
    object->value = desired;
  else
    *expected = old;
  return equal;
}

}  // namespace metal
