// Products of small matrices on the tensor cores, by the instructions that every device from the A100 on has.
#pragma once

#include "common.cuh"

// D (16x8, float) += A (16x16, bf16) B (16x8, bf16), by one warp; two bf16 in each word of a and b. With g = lane / 4
// and t = lane % 4, lane holds (PTX ISA, mma.m16n8k16):
//     d[i] = D[g + 8 (i / 2)][2 t + i % 2]
//     a[i] = A[g + 8 (i % 2)][2 t + 8 (i / 2) + 0 and 1]
//     b[i] = B[2 t + 8 i + 0 and 1][g]
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef SIMSIAM_EMULATOR
    const unsigned g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const auto half = [](uint32_t word, int i) {
        return double(__uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u));
    };
    for (int i = 0; i < 4; ++i) {
        double sum = d[i];
        for (int k = 0; k < 16; k += 2) { // columns k and k + 1 of A are with lane k / 2 of a row's four
            const uint32_t from_a = __shfl_sync(ALL_LANES, a[i / 2 + k / 8 * 2], g * 4 + k % 8 / 2);
            const uint32_t from_b = __shfl_sync(ALL_LANES, b[k / 8], (2 * t + i % 2) * 4 + k % 8 / 2);
            sum += half(from_a, 0) * half(from_b, 0) + half(from_a, 1) * half(from_b, 1);
        }
        d[i] = float(sum);
    }
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
