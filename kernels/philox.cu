// The first `n` words of the stream (seed, domain, index): a device's generator checked against the host's.
#include "philox.cuh"

extern "C" __global__ void philox_stream(uint32_t* words, uint32_t n, uint64_t seed, uint32_t domain, uint64_t index) {
    const uint32_t blocks = n / 4 + (n % 4 != 0);
    const uint32_t threads = gridDim.x * blockDim.x;
    // Counted in 64 bits: the step past the last block may exceed 32.
    for (uint64_t block = blockIdx.x * blockDim.x + threadIdx.x; block < blocks; block += threads) {
        const PhiloxBlock drawn = philox_stream_block(seed, domain, index, static_cast<uint32_t>(block));
        for (uint32_t i = 0; i < 4 && 4 * block + i < n; ++i) {
            words[4 * block + i] = drawn.word[i];
        }
    }
}
