// What the shim asks of the running block: who the calling CUDA thread is, and the waits of threads for each other.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "types.h"

namespace emulator {

// A line of a kernel. As a default argument, `here()` is the line of the call.
struct Site {
    const char* file = "";
    int line = 0;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Where a block stands in its grid.
struct Place {
    uint3 block;
    dim3 block_size, grid_size;
};

// A CUDA thread.
struct Thread {
    uint3 index;
    unsigned lane;
    const Place* place;
};

// Each stack lies at a multiple of its size, and its last word says whose it is: so a thread finds itself by its stack
// pointer, faster than by a variable of the operating system's thread.
constexpr size_t STACK_BYTES = 256 << 10;

inline Thread& current_thread() {
    const uintptr_t within = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return *reinterpret_cast<Thread**>((within | (STACK_BYTES - 1)) + 1)[-1];
}

// Waits for all threads of the block; returns how many of them came with a predicate that holds.
unsigned block_barrier(Site site, bool predicate);

// Waits for the lanes of the mask and orders memory among them.
void warp_barrier(unsigned mask, Site site);

// Waits for the lanes of the mask; returns the values of all lanes, which stay until this lane's next exchange.
const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value, Site site);

// The dynamic shared memory of the block.
unsigned char* dynamic_shared();

// Ends the launch with an error: the message, the site, and where the thread stands in the grid.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);

} // namespace emulator
