// What the kernels need of C++'s standard library: CUDA's own takes the compiler twenty times as long to read as a small kernel,
// and its constants make machine code three times as long.

namespace marlin {

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;

template <bool FIRST, typename A, typename B>
struct Chosen {
  using Type = A;
};
template <typename A, typename B>
struct Chosen<false, A, B> {
  using Type = B;
};
template <bool FIRST, typename A, typename B>
using Either = typename Chosen<FIRST, A, B>::Type;

// The type of a value that a name or a reference stands for.
template <typename A>
struct Named {
  using Type = A;
};
template <typename A>
struct Named<const A> : Named<A> {};
template <typename A>
struct Named<A&> : Named<A> {};
template <typename A>
using Plain = typename Named<A>::Type;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

}  // namespace marlin
