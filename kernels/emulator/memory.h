// Loads and stores with cache hints, which say nothing here, and atomic operations.
#pragma once

template <class T> inline T __ldg(const T* from) { return *from; }
template <class T> inline T __ldcs(const T* from) { return *from; }
template <class T> inline T __ldcg(const T* from) { return *from; }
template <class T> inline void __stcs(T* to, T value) { *to = value; }
template <class T> inline void __stcg(T* to, T value) { *to = value; }

namespace emulator {

// Replaces *at by change(*at) and returns what was there. Relaxed, as on the device: it orders no other memory.
template <class T, class F> T atomic_change(T* at, F change) {
    T old, changed;
    __atomic_load(at, &old, __ATOMIC_RELAXED);
    do changed = change(old);
    while (!__atomic_compare_exchange(at, &old, &changed, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

} // namespace emulator

#define EMULATOR_ATOMICS(T)                                                                                          \
    inline T atomicAdd(T* at, T value) { return emulator::atomic_change(at, [=](T old) -> T { return old + value; }); } \
    inline T atomicExch(T* at, T value) { return emulator::atomic_change(at, [=](T) { return value; }); }
#define EMULATOR_INTEGER_ATOMICS(T)                                                                                  \
    EMULATOR_ATOMICS(T)                                                                                              \
    inline T atomicMin(T* at, T value) { return emulator::atomic_change(at, [=](T old) { return old < value ? old : value; }); } \
    inline T atomicMax(T* at, T value) { return emulator::atomic_change(at, [=](T old) { return old < value ? value : old; }); } \
    inline T atomicOr(T* at, T value) { return emulator::atomic_change(at, [=](T old) { return old | value; }); }    \
    inline T atomicAnd(T* at, T value) { return emulator::atomic_change(at, [=](T old) { return old & value; }); }   \
    inline T atomicCAS(T* at, T expected, T value) {                                                                 \
        return emulator::atomic_change(at, [=](T old) { return old == expected ? value : old; });                    \
    }
EMULATOR_INTEGER_ATOMICS(int)
EMULATOR_INTEGER_ATOMICS(unsigned)
EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMICS(float)
EMULATOR_ATOMICS(double)
#undef EMULATOR_INTEGER_ATOMICS
#undef EMULATOR_ATOMICS
