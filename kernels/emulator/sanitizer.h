// What GCC's and Clang's sanitizers are told about fibers, the order of memory, and memory that nobody may touch. All
// of it is nothing in an ordinary build.
#pragma once

#include <stddef.h>

#ifdef SIMSIAM_SANITIZE_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMSIAM_SANITIZE_THREAD
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator::sanitizer {

#ifdef SIMSIAM_SANITIZE_ADDRESS
constexpr bool ADDRESS = true;
inline void poison(const void* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
inline void unpoison(const void* from, size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
constexpr bool ADDRESS = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
#endif

#ifdef SIMSIAM_SANITIZE_THREAD
constexpr bool THREAD = true;
// What happened before a `release` of a thing happens before what follows an `acquire` of it.
inline void release(void* thing) { __tsan_release(thing); }
inline void acquire(void* thing) { __tsan_acquire(thing); }
#else
constexpr bool THREAD = false;
inline void release(void*) {}
inline void acquire(void*) {}
#endif

} // namespace emulator::sanitizer
