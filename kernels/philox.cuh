// Philox4x32-10 (Salmon et al., SC 2011), word for word the generator of src/rng.rs.
// Also compiles as plain C++, so that the two can be compared on a machine without a GPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define PHILOX_FN __host__ __device__ __forceinline__
#else
#define PHILOX_FN inline
#endif

struct PhiloxKey {
    uint32_t word[2];
};

struct PhiloxBlock {
    uint32_t word[4];
};

// The key for a 64-bit seed.
PHILOX_FN PhiloxKey philox_key(uint64_t seed) {
    return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}};
}

// One block of four 32-bit words for `counter` under `key`.
PHILOX_FN PhiloxBlock philox(PhiloxBlock counter, PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
        if (round > 0) {
            key.word[0] += 0x9E3779B9u;
            key.word[1] += 0xBB67AE85u;
        }
        const uint64_t p0 = uint64_t{counter.word[0]} * 0xD2511F53u;
        const uint64_t p1 = uint64_t{counter.word[2]} * 0xCD9E8D57u;
        counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key.word[0], static_cast<uint32_t>(p1),
                    static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key.word[1], static_cast<uint32_t>(p0)}};
    }
    return counter;
}

// Block number `block` of the sequence that rng::Stream draws for (seed, domain, index).
PHILOX_FN PhiloxBlock philox_stream_block(uint64_t seed, uint32_t domain, uint64_t index, uint32_t block) {
    return philox({{block, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), domain}}, philox_key(seed));
}

// Maps a word to [0, 1) with 24 bits, exactly representable in float.
PHILOX_FN float philox_unit(uint32_t word) {
    return static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
}

// Maps a word to 0..n without modulo bias beyond 2^-32 (Lemire's multiply-shift).
PHILOX_FN uint32_t philox_below(uint32_t word, uint32_t n) {
    return static_cast<uint32_t>((uint64_t{word} * n) >> 32);
}
