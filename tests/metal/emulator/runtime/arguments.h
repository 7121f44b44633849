// Calls a kernel function with the buffers and thread attributes that its parameters ask for.
// Included after the kernel's text; the table of parameters is generated from it.
#pragma once
#pragma clang system_header
#include <utility>

#include "threads.h"

namespace emulator {

// Thread attributes are negative, so that one int tells a parameter's buffer index or its attribute.
enum Attribute {
  thread_position_in_grid = -20,
  thread_position_in_threadgroup,
  threadgroup_position_in_grid,
  threads_per_threadgroup,
  dispatch_threads_per_threadgroup,
  threadgroups_per_grid,
  threads_per_grid,
  grid_origin,
  thread_index_in_threadgroup,
  thread_index_in_simdgroup,
  simdgroup_index_in_threadgroup,
  simdgroups_per_threadgroup,
  dispatch_simdgroups_per_threadgroup,
  threads_per_simdgroup,
  thread_index_in_quadgroup,
  quadgroup_index_in_threadgroup,
  quadgroups_per_threadgroup,
  dispatch_quadgroups_per_threadgroup,
};

inline Index3 attribute(int which) {
  const Threadgroup& group = threadgroup_now;
  const auto groups_of = [](Index3 threads, uint32_t size) { return uint32_t((threads.volume() + size - 1) / size); };
  switch (which) {
    case thread_position_in_grid: return thread_now.in_grid;
    case thread_position_in_threadgroup: return thread_now.in_threadgroup;
    case threadgroup_position_in_grid: return group.position;
    case threads_per_threadgroup: return group.threads;
    case dispatch_threads_per_threadgroup: return group.dispatch_threads;
    case threadgroups_per_grid: return group.groups;
    case threads_per_grid: return group.grid;
    case thread_index_in_threadgroup: return {thread_now.linear, 0, 0};
    case thread_index_in_simdgroup: return {thread_now.lane, 0, 0};
    case simdgroup_index_in_threadgroup: return {thread_now.simdgroup, 0, 0};
    case simdgroups_per_threadgroup: return {groups_of(group.threads, simd_width), 0, 0};
    case dispatch_simdgroups_per_threadgroup: return {groups_of(group.dispatch_threads, simd_width), 0, 0};
    case threads_per_simdgroup: return {simd_width, 0, 0};
    case thread_index_in_quadgroup: return {thread_now.lane % 4, 0, 0};
    case quadgroup_index_in_threadgroup: return {thread_now.linear / 4, 0, 0};
    case quadgroups_per_threadgroup: return {groups_of(group.threads, 4), 0, 0};
    case dispatch_quadgroups_per_threadgroup: return {groups_of(group.dispatch_threads, 4), 0, 0};
    default: return {0, 0, 0};  // grid_origin
  }
}

template <class P>
struct Argument {
  static P get(int which) { return P(attribute(which).x); }
};
template <class T>
struct Argument<metal::vec<T, 2>> {
  static metal::vec<T, 2> get(int which) {
    const Index3 value = attribute(which);
    return {T(value.x), T(value.y)};
  }
};
template <class T>
struct Argument<metal::vec<T, 3>> {
  static metal::vec<T, 3> get(int which) {
    const Index3 value = attribute(which);
    return {T(value.x), T(value.y), T(value.z)};
  }
};
template <class P>
struct Argument<P*> {
  static P* get(int which) { return static_cast<P*>(buffers_now[which]); }
};
template <class P>
struct Argument<P&> {
  static P& get(int which) { return *static_cast<P*>(buffers_now[which]); }
};

template <class... Parameters, size_t... I>
inline void call(void (*kernel_function)(Parameters...), const int* which, std::index_sequence<I...>) {
  kernel_function(Argument<Parameters>::get(which[I])...);
}

template <class... Parameters>
inline void call(void (*kernel_function)(Parameters...), const int* which) {
  call(kernel_function, which, std::index_sequence_for<Parameters...>{});
}

}  // namespace emulator
