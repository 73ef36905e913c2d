// CUDA's vector types and its 16-bit floats.
#pragma once

#include <stdint.h>
#include <string.h>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Vectors of two and four are aligned to their size, up to the 16 bytes of the widest access.
#define EMULATOR_VECTORS(T, name)                                     \
    struct alignas(2 * sizeof(T)) name##2 {                           \
        T x, y;                                                       \
    };                                                                \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { \
        T x, y, z, w;                                                 \
    };                                                                \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }        \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(unsigned char, uchar)
#undef EMULATOR_VECTORS

// Aggregates without constructors, so that they may lie in shared memory. They convert by the intrinsics below alone.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

namespace emulator {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

constexpr uint32_t INFINITE = 0x7f800000; // a float's bits above these, without the sign, are a NaN's
constexpr uint16_t NAN_16 = 0x7fff;       // what the device's conversions make of every NaN
constexpr uint32_t HALF_BIAS = (127 - 15) << 23; // between the exponents of float and half

} // namespace emulator

// All roundings are to nearest, ties to even.

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const uint32_t bits = emulator::bits_of(value);
    if ((bits & 0x7fffffff) > emulator::INFINITE) return {emulator::NAN_16};
    const uint32_t is_odd = bits >> 16 & 1;
    return {static_cast<uint16_t>((bits + 0x7fff + is_odd) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

inline float __bfloat162float(__nv_bfloat16 value) { return emulator::float_of(uint32_t{value.bits} << 16); }

inline __half __float2half_rn(float value) {
    const uint32_t bits = emulator::bits_of(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = bits >> 16 & 0x8000;
    if (magnitude > emulator::INFINITE) return {emulator::NAN_16};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)}; // from 65520 on: infinite
    if (magnitude < 0x38800000) {
        // Below 2^-14 halves are multiples of 2^-24, and so are the floats from 0.5 to 1: the addition rounds.
        const float shifted = emulator::float_of(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (emulator::bits_of(shifted) - emulator::bits_of(0.5f)))};
    }
    const uint32_t is_odd = magnitude >> 13 & 1;
    return {static_cast<uint16_t>(sign | (magnitude - emulator::HALF_BIAS + 0xfff + is_odd) >> 13)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline float __half2float(__half value) {
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
    const uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
    if (exponent == 31) return emulator::float_of(sign | emulator::INFINITE | fraction << 13);
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
    return emulator::float_of(sign | ((exponent << 23) + emulator::HALF_BIAS) | fraction << 13);
}
