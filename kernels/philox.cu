// Random words on a device: the generator of src/rng.rs, and what a benchmark's inputs are filled with.
#include "philox.cuh"

// The first `n` words of the stream (seed, domain, index); a block of four a thread and round.
KERNEL(256) philox_stream(uint32_t* words, uint32_t n, uint64_t seed, uint32_t domain, uint64_t index) {
    const int64_t blocks = (int64_t{n} + 3) / 4;
    for (int64_t block = global_thread(); block < blocks; block += global_threads()) {
        const PhiloxBlock drawn = philox_stream_block(seed, domain, index, static_cast<uint32_t>(block));
        const int64_t first = 4 * block;
        if (first + 4 <= n) {
            const Pack<uint32_t, 4> pack = {{drawn.word[0], drawn.word[1], drawn.word[2], drawn.word[3]}};
            *reinterpret_cast<Pack<uint32_t, 4>*>(words + first) = pack;
        } else {
            for (int64_t i = first; i < n; ++i) words[i] = drawn.word[i - first];
        }
    }
}
EXPORT(philox_stream)
