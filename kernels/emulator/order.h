// Orders that look random and depend on a seed alone.
#pragma once

#include <stdint.h>

#include <numeric>

namespace emulator {

// SplitMix64 (Steele et al., OOPSLA 2014): the next value of a sequence.
inline uint64_t next_random(uint64_t& state) {
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

// A permutation of 0..n that takes no memory: i -> i * factor + offset modulo n, with a factor that has no divisor in
// common with n.
class Permutation {
  public:
    Permutation(uint64_t n, uint64_t seed) : n_(n) {
        if (seed == 0) return;
        offset_ = next_random(seed) % n;
        do factor_ = next_random(seed) % n;
        while (std::gcd(factor_, n) != 1);
    }

    uint64_t operator()(uint64_t i) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * factor_ + offset_) % n_);
    }

  private:
    uint64_t n_, factor_ = 1, offset_ = 0;
};

} // namespace emulator
