// Products of small matrices on the tensor cores, by the instructions that every device from the A100 on has, and the
// loads of their operands from shared memory. All lanes of a warp take part, and call alike.
#pragma once

#include "common.cuh"

#ifdef SIMSIAM_EMULATOR

// What each lane of the warp gives.
struct Gathered {
    uint64_t of_lane[WARP];
};
inline Gathered gather(const char* operation, uint64_t own) {
    Gathered all;
    memcpy(all.of_lane, emulator::exchange(operation, ALL_LANES, own, emulator::Site::here()), sizeof all.of_lane);
    return all;
}

// In double precision, rounded once; a device rounds more often.
template <class T> inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(sizeof(T) == 2, "two elements in a word");
    const auto pair = [](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; };
    const Gathered a_low = gather("mma", pair(a[0], a[1])), a_high = gather("mma", pair(a[2], a[3]));
    const Gathered b_all = gather("mma", pair(b[0], b[1]));
    const auto element = [](uint64_t words, int i) { // of the four in two words
        const uint16_t bits = static_cast<uint16_t>(words >> 16 * i);
        T value;
        memcpy(&value, &bits, sizeof value);
        return double(to_float(value));
    };
    const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
        double sum = d[i];
        for (int k = 0; k < 16; ++k) {
            const Gathered& half = k < 8 ? a_low : a_high;
            const double from_a = element(half.of_lane[g * 4 + k % 8 / 2], i / 2 * 2 + k % 2);
            const double from_b = element(b_all.of_lane[(2 * t + i % 2) * 4 + k % 8 / 2], k / 8 * 2 + k % 2);
            sum += from_a * from_b;
        }
        d[i] = float(sum);
    }
}

template <bool TRANSPOSED> inline void load_matrices_from(uint32_t (&to)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
        emulator::fail(emulator::Site::here(), "a row of a matrix starts at %p, at no multiple of 16 bytes", row);
    }
    const Gathered rows = gather(TRANSPOSED ? "load_transposed" : "load_matrices", reinterpret_cast<uintptr_t>(row));
    const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (unsigned i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (unsigned k = 0; k < 2; ++k) {
            const unsigned from_row = TRANSPOSED ? 2 * t + k : g, from_column = TRANSPOSED ? g : 2 * t + k;
            pair[k] = reinterpret_cast<const uint16_t*>(rows.of_lane[8 * i + from_row])[from_column];
        }
        to[i] = uint32_t{pair[1]} << 16 | pair[0];
    }
}

#else

// D (16x8, float) += A (16x16, T) B (16x8, T), by one warp; two elements of 16 bits in each word of a and b. With
// g = lane / 4 and t = lane % 4, lane holds (PTX ISA, mma.m16n8k16):
//     d[i] = D[g + 8 (i / 2)][2 t + i % 2]
//     a[i] = A[g + 8 (i % 2)][2 t + 8 (i / 2) + 0 and 1]
//     b[i] = B[2 t + 8 i + 0 and 1][g]
template <class T> __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define MMA(T, name)                                                                                            \
    template <>                                                                                                 \
    __device__ __forceinline__ void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {     \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                             \
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                    \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                       \
    }
MMA(bf16, "bf16")
MMA(f16, "f16")
#undef MMA

template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices_from(uint32_t (&to)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
    }
}

#endif

// Four matrices of 8x8 elements of 16 bits from shared memory: `row` is where row lane % 8 of matrix lane / 8 starts, 8
// elements at a multiple of 16 bytes. Lane gets of each matrix M a word: M[g][2 t + 0 and 1].
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) { load_matrices_from<false>(to, row); }

// The same of their transposes: M[2 t + 0 and 1][g].
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
    load_matrices_from<true>(to, row);
}
