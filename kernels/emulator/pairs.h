// Pairs of 16-bit floats, and the operations on them that the kernels use.
#pragma once

#include "types.h"

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};

namespace emulator {

inline float value_of(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float value_of(__half value) { return __half2float(value); }

inline unsigned mask(bool low, bool high) { return (high ? 0xffff0000u : 0u) | (low ? 0xffffu : 0u); }

template <class Pair> unsigned equal_mask(Pair a, Pair b) {
    return mask(value_of(a.x) == value_of(b.x), value_of(a.y) == value_of(b.y));
}

template <class Pair> unsigned greater_mask(Pair a, Pair b) {
    return mask(value_of(a.x) > value_of(b.x), value_of(a.y) > value_of(b.y));
}

// The positive zero is larger than the negative one.
template <class Element> Element max_or_nan(Element a, Element b) {
    const float x = value_of(a), y = value_of(b);
    if (x != x || y != y) return {NAN_16};
    if (x == y) return {static_cast<uint16_t>(a.bits & b.bits)};
    return x > y ? a : b;
}

} // namespace emulator

inline unsigned __heq2_mask(__nv_bfloat162 a, __nv_bfloat162 b) { return emulator::equal_mask(a, b); }
inline unsigned __heq2_mask(__half2 a, __half2 b) { return emulator::equal_mask(a, b); }
inline unsigned __hgt2_mask(__nv_bfloat162 a, __nv_bfloat162 b) { return emulator::greater_mask(a, b); }
inline unsigned __hgt2_mask(__half2 a, __half2 b) { return emulator::greater_mask(a, b); }

inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {emulator::max_or_nan(a.x, b.x), emulator::max_or_nan(a.y, b.y)};
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) {
    return {emulator::max_or_nan(a.x, b.x), emulator::max_or_nan(a.y, b.y)};
}
