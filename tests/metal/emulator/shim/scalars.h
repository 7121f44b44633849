// Metal's scalar types, and the part of <type_traits> and <limits> that it keeps in namespace metal.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

#ifdef EMULATOR_ADDRESS_SPACES
// Methods cannot be called on an object in an address space, so where only errors count bfloat is the built-in type.
typedef __bf16 bfloat;
#else
// The built-in __bf16 cannot be converted from or to _Float16, as Metal's can. Rounds to nearest even after each operation.
struct bfloat {
  uint16_t bits;

  template <class U>
  using if_number = std::enable_if_t<std::is_arithmetic<U>::value || std::is_same<U, half>::value>;

  bfloat() = default;
  template <class U, class = if_number<U>>
  constexpr bfloat(U value) : bits(rounded(static_cast<float>(value))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

  static constexpr uint16_t rounded(float value) {
    const uint32_t wide = __builtin_bit_cast(uint32_t, value);
    const bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? (wide >> 16) | 0x40 : (wide + 0x7fffu + ((wide >> 16) & 1)) >> 16;
  }
};

// bfloat with bfloat or an integer gives bfloat, with a wider or another 16-bit float it gives float.
template <class U>
using bfloat_with = std::conditional_t<std::is_integral<U>::value, bfloat, float>;

#define EMULATOR_BFLOAT_ARITHMETIC(op)                                                                      \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }                 \
  template <class U, class = bfloat::if_number<U>>                                                          \
  constexpr bfloat_with<U> operator op(bfloat a, U b) {                                                     \
    return bfloat_with<U>(float(a) op float(b));                                                            \
  }                                                                                                         \
  template <class U, class = bfloat::if_number<U>>                                                          \
  constexpr bfloat_with<U> operator op(U a, bfloat b) {                                                     \
    return bfloat_with<U>(float(a) op float(b));                                                            \
  }                                                                                                         \
  template <class U>                                                                                        \
  bfloat& operator op##=(bfloat& a, U b) {                                                                  \
    return a = bfloat(float(a) op float(b));                                                                \
  }
EMULATOR_BFLOAT_ARITHMETIC(+)
EMULATOR_BFLOAT_ARITHMETIC(-)
EMULATOR_BFLOAT_ARITHMETIC(*)
EMULATOR_BFLOAT_ARITHMETIC(/)
#undef EMULATOR_BFLOAT_ARITHMETIC
constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }
inline bfloat& operator++(bfloat& a) { return a += 1; }

#define EMULATOR_BFLOAT_COMPARISON(op)                                                    \
  constexpr bool operator op(bfloat a, bfloat b) { return float(a) op float(b); }         \
  template <class U, class = bfloat::if_number<U>>                                        \
  constexpr bool operator op(bfloat a, U b) {                                             \
    return float(a) op float(b);                                                          \
  }                                                                                       \
  template <class U, class = bfloat::if_number<U>>                                        \
  constexpr bool operator op(U a, bfloat b) {                                             \
    return float(a) op float(b);                                                          \
  }
EMULATOR_BFLOAT_COMPARISON(<)
EMULATOR_BFLOAT_COMPARISON(>)
EMULATOR_BFLOAT_COMPARISON(<=)
EMULATOR_BFLOAT_COMPARISON(>=)
EMULATOR_BFLOAT_COMPARISON(==)
EMULATOR_BFLOAT_COMPARISON(!=)
#undef EMULATOR_BFLOAT_COMPARISON
#endif

namespace metal {

using std::conditional;
using std::conditional_t;
using std::decay;
using std::decay_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::forward;
using std::integral_constant;
using std::is_const;
using std::is_convertible;
using std::is_integral;
using std::is_pointer;
using std::is_same;
using std::is_signed;
using std::is_trivially_copyable;
using std::is_unsigned;
using std::is_void;
using std::make_signed_t;
using std::make_unsigned;
using std::make_unsigned_t;
using std::move;
using std::remove_const;
using std::remove_const_t;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;

template <bool B>
using bool_constant = integral_constant<bool, B>;
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <class T>
constexpr bool is_integral_v = is_integral<T>::value;
template <class T>
constexpr bool is_signed_v = is_signed<T>::value;
template <class T>
constexpr bool is_unsigned_v = is_unsigned<T>::value;
template <class A, class B>
constexpr bool is_convertible_v = is_convertible<A, B>::value;

template <class T>
struct is_floating_point : bool_constant<is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

#if __cplusplus >= 201703L
template <class... B>
using _disjunction = std::disjunction<B...>;
template <class... B>
using _conjunction = std::conjunction<B...>;
#endif

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
#define EMULATOR_LIMITS(T, largest, least_normal, gap_at_one)                              \
  template <>                                                                              \
  struct numeric_limits<T> {                                                               \
    static constexpr bool is_specialized = true, is_signed = true, is_integer = false;     \
    static constexpr T max() { return (T)largest; }                                        \
    static constexpr T lowest() { return (T) - largest; }                                  \
    static constexpr T min() { return (T)least_normal; }                                   \
    static constexpr T epsilon() { return (T)gap_at_one; }                                 \
    static constexpr T infinity() { return (T)__builtin_inff(); }                          \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }                       \
  };
EMULATOR_LIMITS(half, 65504.0f, 6.103515625e-05f, 0.0009765625f)
EMULATOR_LIMITS(bfloat, 3.38953139e38f, 1.17549435e-38f, 0.0078125f)
#undef EMULATOR_LIMITS

template <class To, class From>
METAL_FUNC To as_type_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  __builtin_memcpy(static_cast<void*>(&to), &from, sizeof(to));
  return to;
}

}  // namespace metal
