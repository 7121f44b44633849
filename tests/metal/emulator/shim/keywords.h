// What Metal has as keywords, constants and global names. Included last: the headers of the C++ library know none of them.
#pragma once

#define EMULATOR_GLOBAL(T) \
  using metal::T##2;       \
  using metal::T##3;       \
  using metal::T##4;
EMULATOR_GLOBAL(bool)
EMULATOR_GLOBAL(char)
EMULATOR_GLOBAL(uchar)
EMULATOR_GLOBAL(short)
EMULATOR_GLOBAL(ushort)
EMULATOR_GLOBAL(int)
EMULATOR_GLOBAL(uint)
EMULATOR_GLOBAL(long)
EMULATOR_GLOBAL(ulong)
EMULATOR_GLOBAL(half)
EMULATOR_GLOBAL(bfloat)
EMULATOR_GLOBAL(float)
#undef EMULATOR_GLOBAL

#define as_type metal::as_type_of
#define thread
#define kernel
#ifdef EMULATOR_ADDRESS_SPACES
// Compiled for its errors only: an unqualified pointer, or a mix-up of two spaces, is one, as in Metal.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
// Declarations of threadgroup variables have been rewritten before this macro sees them.
#define device
#define constant
#define threadgroup
#endif

// The CPU's headers define some of these as doubles.
#undef INFINITY
#undef NAN
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.40282347e+38f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
