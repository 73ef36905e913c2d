// The library's C interface: its kernels, launches, and the memory of the device.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "registry.h"

namespace emulator {

struct Launch {
    const Kernel* kernel;
    void* const* arguments; // as cuLaunchKernel takes them
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    uint32_t threads; // of the operating system
    uint64_t seed;    // of the order of blocks, warps and lanes; 0: the natural one
};

} // namespace emulator

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

EMULATOR_API uint32_t simsiam_emulator_kernels();
EMULATOR_API const emulator::Kernel* simsiam_emulator_kernel(uint32_t index);

// Runs a kernel to its end. Returns whether all went well; else `fault` holds a sentence, cut to `fault_bytes`.
EMULATOR_API bool simsiam_emulator_launch(const emulator::Launch* launch, char* fault, size_t fault_bytes);

// Memory at a multiple of 256 bytes, filled with NaN; null if there is not enough.
EMULATOR_API void* simsiam_emulator_allocate(size_t bytes);
EMULATOR_API void simsiam_emulator_free(void* memory);

// Between host and device, in order with the launches. It may touch guarded memory.
EMULATOR_API void simsiam_emulator_copy(void* to, const void* from, size_t bytes);

// Makes the address sanitizer report every kernel that touches these bytes, or lets them be used again. It works on
// whole multiples of 8 bytes.
EMULATOR_API void simsiam_emulator_guard(const void* from, size_t bytes);
EMULATOR_API void simsiam_emulator_unguard(const void* from, size_t bytes);
