// Shuffles, votes and reductions of a warp. All of them rest on `exchange`, in which every lane of a mask gives a value
// and gets those of all others.
#pragma once

#include <stdint.h>
#include <string.h>

#include "runtime.h"

// Orders memory among the lanes of the mask. No other function of a warp does.
inline void __syncwarp(unsigned mask = 0xffffffff, emulator::Site site = emulator::Site::here()) {
    emulator::warp_barrier(mask, site);
}

namespace emulator {

template <class T> uint64_t word_of(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "warps exchange at most 8 bytes");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    return word;
}

template <class T> T value_in(uint64_t word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// The value that lane `source` gives.
template <class T> T shuffle(const char* operation, unsigned mask, T value, unsigned source, Site site) {
    const uint64_t* words = exchange(operation, mask, word_of(value), site);
    if ((mask >> source & 1) == 0) {
        fail(site, "%s reads lane %u, which is not in the mask %08x", operation, source, mask);
    }
    return value_in<T>(words[source]);
}

// The lanes of the mask whose predicate holds.
inline unsigned vote(const char* operation, unsigned mask, bool predicate, Site site) {
    const uint64_t* words = exchange(operation, mask, predicate, site);
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) lanes |= static_cast<unsigned>(words[lane]) << lane;
    return lanes;
}

// The values of the mask's lanes combined in the order of the lanes.
template <class T, class F> T reduce(const char* operation, unsigned mask, T value, Site site, F combine) {
    const uint64_t* words = exchange(operation, mask, word_of(value), site);
    const unsigned first = __builtin_ctz(mask);
    T result = value_in<T>(words[first]);
    for (unsigned lane = first + 1; lane < 32; ++lane)
        if (mask >> lane & 1) result = combine(result, value_in<T>(words[lane]));
    return result;
}

// The first lane of the segment of `width` lanes that `lane` lies in.
inline unsigned segment(unsigned lane, int width) { return lane & ~(static_cast<unsigned>(width) - 1); }

} // namespace emulator

// A lane whose source lies outside of its segment keeps its own value.

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
    const unsigned within = static_cast<unsigned>(source) & (static_cast<unsigned>(width) - 1);
    const unsigned first = emulator::segment(emulator::current_thread().lane, width);
    return emulator::shuffle("__shfl_sync", mask, value, first + within, site);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                         emulator::Site site = emulator::Site::here()) {
    const unsigned lane = emulator::current_thread().lane, source = (lane ^ static_cast<unsigned>(bits)) & 31;
    // Segments before the own one may be read, those after it not.
    const bool allowed = emulator::segment(source, width) <= emulator::segment(lane, width);
    return emulator::shuffle("__shfl_xor_sync", mask, value, allowed ? source : lane, site);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          emulator::Site site = emulator::Site::here()) {
    const unsigned lane = emulator::current_thread().lane;
    const unsigned end = emulator::segment(lane, width) + static_cast<unsigned>(width);
    return emulator::shuffle("__shfl_down_sync", mask, value, delta < end - lane ? lane + delta : lane, site);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        emulator::Site site = emulator::Site::here()) {
    const unsigned lane = emulator::current_thread().lane, first = emulator::segment(lane, width);
    return emulator::shuffle("__shfl_up_sync", mask, value, delta <= lane - first ? lane - delta : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::vote("__all_sync", mask, predicate == 0, site) == 0;
}

#define EMULATOR_REDUCTION(T, name, expression)                                                      \
    inline T name(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {            \
        return emulator::reduce(#name, mask, value, site, [](T a, T b) -> T { return expression; }); \
    }
EMULATOR_REDUCTION(unsigned, __reduce_add_sync, a + b)
EMULATOR_REDUCTION(unsigned, __reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCTION(unsigned, __reduce_max_sync, a < b ? b : a)
EMULATOR_REDUCTION(unsigned, __reduce_and_sync, a & b)
EMULATOR_REDUCTION(unsigned, __reduce_or_sync, a | b)
EMULATOR_REDUCTION(unsigned, __reduce_xor_sync, a ^ b)
EMULATOR_REDUCTION(int, __reduce_add_sync, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
EMULATOR_REDUCTION(int, __reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCTION(int, __reduce_max_sync, a < b ? b : a)
#undef EMULATOR_REDUCTION
