// Philox4x32-10 (Salmon et al., SC 2011), word for word the generator of src/rng.rs.
#pragma once

#include "common.cuh"

struct PhiloxBlock {
    uint32_t word[4];
};

// One block of four 32-bit words for `counter` under the key of a 64-bit seed.
__device__ __forceinline__ PhiloxBlock philox(PhiloxBlock counter, uint64_t seed) {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        if (round > 0) {
            key[0] += 0x9E3779B9u;
            key[1] += 0xBB67AE85u;
        }
        const uint64_t p0 = uint64_t{counter.word[0]} * 0xD2511F53u;
        const uint64_t p1 = uint64_t{counter.word[2]} * 0xCD9E8D57u;
        counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key[0], static_cast<uint32_t>(p1),
                    static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key[1], static_cast<uint32_t>(p0)}};
    }
    return counter;
}

// Block number `block` of the sequence that rng::Stream draws for (seed, domain, index).
__device__ __forceinline__ PhiloxBlock philox_stream_block(uint64_t seed, uint32_t domain, uint64_t index, uint32_t block) {
    return philox({{block, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), domain}}, seed);
}
