// One block of a kernel: its threads as fibers, scheduled warp by warp, each run until it must wait for others.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "fiber.h"
#include "launch.h"
#include "runtime.h"
#include "shared.h"

namespace emulator {

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned LANES = 32;

// Lanes of a warp that exchange values, from the first that comes until all have read.
struct Exchange {
    unsigned mask = 0, arrived = 0, unread = 0;
    const char* operation = nullptr;
    uint64_t values[LANES];
    char ordered; // for the thread sanitizer
};

struct Warp {
    unsigned lanes = 0;    // that the block has
    unsigned alive = 0;    // of them, that have not ended
    unsigned runnable = 0; // of these, that wait for nothing
    unsigned fresh = 0;    // of these, that have not begun
    unsigned in_use = 0;   // exchanges, by index; a lane is in one at most
    Exchange exchanges[LANES];
};

class Block;

struct BlockThread : Thread {
    Block* block;
    Warp* warp;
    Fiber* fiber;             // on whose stack it runs
    const Exchange* waits_in; // null in a barrier of the block
    Site waits_at;
};

// Kept from launch to launch, with its stacks.
class Block {
  public:
    Block() : stacks_(MAX_THREADS), fibers_(MAX_THREADS) {}

    // What all blocks of a launch have in common; they run on the calling thread of the operating system.
    void prepare(const Launch& launch);

    // Runs one block to its end, its warps and lanes in an order that `shuffle` decides (0: the natural one). Returns
    // false after a fault; then the block is abandoned where it stands: kernels own nothing that would have to be
    // released.
    bool run(uint3 index, uint64_t shuffle);

    // What went wrong, where.
    const std::string& fault() const { return fault_; }

    // The waits of the runtime's interface, for a thread of this block.
    unsigned barrier(BlockThread& thread, Site site, bool predicate);
    const uint64_t* meet(BlockThread& thread, const char* operation, unsigned mask, uint64_t value,
                         bool orders_memory, Site site);
    unsigned char* dynamic_shared();
    [[noreturn]] void fail(BlockThread& thread, Site site, const std::string& what);

  private:
    static void run_threads();
    void build_threads();
    void reset(uint64_t shuffle);
    void run_warp(Warp& warp);
    BlockThread& next(Warp& warp, unsigned from_lane);
    void own_stack(const Fiber& fiber, BlockThread& thread);
    void suspend(BlockThread& thread);
    void end(BlockThread& thread);
    Exchange& join(BlockThread& thread, const char* operation, unsigned mask, Site site);
    void explain_standstill();
    void blame(const BlockThread& thread, Site site, const std::string& what);

    const Kernel* kernel_ = nullptr;
    void* const* arguments_ = nullptr;
    Place place_;
    unsigned size_ = 0, alive_ = 0;

    Stacks stacks_;
    Fiber scheduler_;
    std::vector<Fiber> fibers_; // by stack
    std::vector<BlockThread> threads_;
    std::vector<Warp> warps_;
    std::vector<unsigned> warp_order_;
    unsigned first_lane_ = 0;

    SharedMemory dynamic_shared_, static_shared_;

    unsigned waiting_ = 0; // at the barrier
    Site barrier_site_;
    unsigned barrier_round_ = 0;
    unsigned votes_[2] = {}; // of this round and the one before
    char barrier_ordered_[2], begun_, ended_; // for the thread sanitizer
    std::string fault_;
};

} // namespace emulator
