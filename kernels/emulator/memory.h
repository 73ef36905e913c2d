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

#define EMULATOR_ATOMIC(T, name, expression)                                        \
    inline T name(T* at, T value) {                                                 \
        return emulator::atomic_change(at, [=](T old) -> T { return expression; }); \
    }
#define EMULATOR_ATOMICS(T)                    \
    EMULATOR_ATOMIC(T, atomicAdd, old + value) \
    EMULATOR_ATOMIC(T, atomicExch, ((void)old, value))
#define EMULATOR_INTEGER_ATOMICS(T)                                                               \
    EMULATOR_ATOMICS(T)                                                                           \
    EMULATOR_ATOMIC(T, atomicMin, old < value ? old : value)                                      \
    EMULATOR_ATOMIC(T, atomicMax, old < value ? value : old)                                      \
    EMULATOR_ATOMIC(T, atomicOr, old | value)                                                     \
    EMULATOR_ATOMIC(T, atomicAnd, old & value)                                                    \
    inline T atomicCAS(T* at, T expected, T value) {                                              \
        return emulator::atomic_change(at, [=](T old) { return old == expected ? value : old; }); \
    }
EMULATOR_INTEGER_ATOMICS(int)
EMULATOR_INTEGER_ATOMICS(unsigned)
EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMICS(float)
EMULATOR_ATOMICS(double)
#undef EMULATOR_INTEGER_ATOMICS
#undef EMULATOR_ATOMICS
#undef EMULATOR_ATOMIC
