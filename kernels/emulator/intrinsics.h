// Arithmetic of CUDA that C++ has under another name or not at all.
#pragma once

#include <math.h>

#include <algorithm>
#include <limits>

#include "types.h"

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

inline unsigned __float_as_uint(float x) { return emulator::bits_of(x); }
inline int __float_as_int(float x) { return static_cast<int>(emulator::bits_of(x)); }
inline float __uint_as_float(unsigned bits) { return emulator::float_of(bits); }
inline float __int_as_float(int bits) { return emulator::float_of(static_cast<unsigned>(bits)); }

namespace emulator {

// The conversions of the device saturate and make 0 of a NaN, where those of C++ are undefined.
template <class T> T saturated(double x) {
    if (x != x) return 0;
    const double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
    return static_cast<T>(x < low ? low : x > high ? high : x);
}

} // namespace emulator

inline int __float2int_rn(float x) { return emulator::saturated<int>(rintf(x)); }
inline int __float2int_rz(float x) { return emulator::saturated<int>(truncf(x)); }
inline int __float2int_rd(float x) { return emulator::saturated<int>(floorf(x)); }
inline int __float2int_ru(float x) { return emulator::saturated<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return emulator::saturated<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return emulator::saturated<unsigned>(truncf(x)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
