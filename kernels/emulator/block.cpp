#include "block.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#include "order.h"
#include "sanitizer.h"

namespace emulator {

namespace {

unsigned bit(unsigned lane) { return 1u << lane; }

unsigned first_lane(unsigned lanes) { return static_cast<unsigned>(__builtin_ctz(lanes)); }

// The first of `lanes` at or after `from`, going round.
unsigned first_lane_from(unsigned lanes, unsigned from) {
    const unsigned after = lanes & ~0u << from % LANES;
    return first_lane(after != 0 ? after : lanes);
}

std::string format(const char* text, va_list arguments) {
    char buffer[512];
    vsnprintf(buffer, sizeof buffer, text, arguments);
    return buffer;
}

__attribute__((format(printf, 1, 2))) std::string format(const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    std::string formatted = format(text, arguments);
    va_end(arguments);
    return formatted;
}

std::string text(Site site) {
    const char* slash = strrchr(site.file, '/');
    return format("%s:%d", slash != nullptr ? slash + 1 : site.file, site.line);
}

std::string text(uint3 index) { return format("(%u, %u, %u)", index.x, index.y, index.z); }

// The same text mostly lies in the same place.
bool is_same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
bool is_same(Site a, Site b) { return a.line == b.line && is_same(a.file, b.file); }

} // namespace

// ---------------------------------------------------------------------------------------------------------------------
// From launch to launch.

void Block::prepare(const Launch& launch) {
    kernel_ = launch.kernel;
    arguments_ = launch.arguments;
    const dim3 size(launch.block[0], launch.block[1], launch.block[2]);
    const bool rebuild = threads_.empty() || memcmp(&size, &place_.block_size, sizeof size) != 0 || !fault_.empty();
    place_.block_size = size;
    place_.grid_size = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    if (rebuild) build_threads();
    fault_.clear();
    if (dynamic_shared_.bytes() != launch.shared_bytes) dynamic_shared_ = SharedMemory::allocate(launch.shared_bytes);
    static_shared_ = SharedMemory::static_variables();
    scheduler_.adopt_caller();
}

void Block::build_threads() {
    const dim3 size = place_.block_size;
    size_ = size.x * size.y * size.z;
    threads_.assign(size_, BlockThread{});
    warps_.assign((size_ + LANES - 1) / LANES, Warp{});
    warp_order_.resize(warps_.size());
    for (unsigned i = 0; i < size_; ++i) {
        BlockThread& thread = threads_[i];
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        thread.lane = i % LANES;
        thread.place = &place_;
        thread.block = this;
        thread.warp = &warps_[i / LANES];
        thread.warp->lanes |= bit(thread.lane);
        // Frames that a fault abandoned have left their marks.
        sanitizer::unpoison(stacks_.place(i) + Stacks::GUARD_BYTES, STACK_BYTES - Stacks::GUARD_BYTES);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler.

bool Block::run(uint3 index, uint64_t shuffle) {
    place_.block = index;
    reset(shuffle);
    sanitizer::release(&begun_);
    while (alive_ > 0 && fault_.empty()) {
        bool is_standstill = true;
        for (unsigned warp : warp_order_) {
            if (warps_[warp].runnable == 0) continue;
            is_standstill = false;
            run_warp(warps_[warp]);
            if (!fault_.empty()) break;
        }
        if (is_standstill) explain_standstill();
    }
    sanitizer::acquire(&ended_);
    return fault_.empty();
}

void Block::reset(uint64_t shuffle) {
    alive_ = size_;
    waiting_ = 0;
    votes_[barrier_round_ % 2] = 0;
    dynamic_shared_.poison();
    static_shared_.poison();
    for (Warp& warp : warps_) warp.alive = warp.runnable = warp.fresh = warp.lanes;
    std::iota(warp_order_.begin(), warp_order_.end(), 0);
    first_lane_ = 0;
    if (shuffle == 0) return;
    for (size_t i = warp_order_.size(); i > 1; --i) {
        std::swap(warp_order_[i - 1], warp_order_[next_random(shuffle) % i]);
    }
    first_lane_ = next_random(shuffle) % LANES;
}

// Until none of its lanes can go on: they hand over to each other.
void Block::run_warp(Warp& warp) { scheduler_.switch_to(*next(warp, first_lane_).fiber); }

// A runnable lane, ready to be switched to.
BlockThread& Block::next(Warp& warp, unsigned from_lane) {
    const unsigned lane = first_lane_from(warp.runnable, from_lane);
    const size_t number = static_cast<size_t>(&warp - warps_.data()) * LANES + lane;
    BlockThread& thread = threads_[number];
    if ((warp.fresh & bit(lane)) != 0) {
        warp.fresh &= ~bit(lane);
        thread.fiber = &fibers_[number];
        own_stack(*thread.fiber, thread);
        char* place = stacks_.place(number);
        // Stacks that began alike would all fall on the same lines of the cache.
        const size_t stagger = number % 64 * 64 + 64;
        thread.fiber->begin(place + Stacks::GUARD_BYTES, place + STACK_BYTES - stagger, run_threads);
    }
    return thread;
}

void Block::own_stack(const Fiber& fiber, BlockThread& thread) {
    char* place = stacks_.place(static_cast<size_t>(&fiber - fibers_.data()));
    reinterpret_cast<Thread**>(place + STACK_BYTES)[-1] = &thread;
}

// What a fiber runs: a thread, and when that has ended, one that has not begun.
void Block::run_threads() {
    static_cast<BlockThread&>(current_thread()).fiber->arrived();
    for (;;) {
        BlockThread& thread = static_cast<BlockThread&>(current_thread());
        Block& block = *thread.block;
        sanitizer::acquire(&block.begun_);
        block.kernel_->run(block.arguments_);
        sanitizer::release(&block.ended_);
        block.end(thread);
    }
}

// Returns if the stack has got a fresh thread to run. Threads that wait for nothing so need no switch.
void Block::end(BlockThread& thread) {
    Warp& warp = *thread.warp;
    warp.alive &= ~bit(thread.lane);
    warp.runnable &= ~bit(thread.lane);
    --alive_;
    // To the thread sanitizer, a second thread on the same stack would race with the first.
    if (warp.fresh != 0 && !sanitizer::THREAD) {
        const unsigned lane = first_lane_from(warp.fresh, thread.lane + 1);
        warp.fresh &= ~bit(lane);
        BlockThread& fresh = *(&thread - thread.lane + lane);
        fresh.fiber = thread.fiber;
        own_stack(*fresh.fiber, fresh);
        return;
    }
    suspend(thread);
    abort(); // nobody switches to a thread that has ended
}

void Block::suspend(BlockThread& thread) {
    Warp& warp = *thread.warp;
    thread.fiber->switch_to(warp.runnable != 0 ? *next(warp, thread.lane + 1).fiber : scheduler_);
}

// ---------------------------------------------------------------------------------------------------------------------
// Waits.

unsigned Block::barrier(BlockThread& thread, Site site, bool predicate) {
    if (waiting_ == 0) barrier_site_ = site;
    if (!is_same(site, barrier_site_)) {
        fail(thread, site, "diverged barrier: other threads of the block wait at " + text(barrier_site_));
    }
    const unsigned round = barrier_round_ % 2;
    sanitizer::release(&barrier_ordered_[round]);
    votes_[round] += predicate;
    if (++waiting_ == size_) {
        waiting_ = 0;
        votes_[++barrier_round_ % 2] = 0;
        for (Warp& warp : warps_) warp.runnable = warp.lanes;
    } else {
        thread.warp->runnable &= ~bit(thread.lane);
        thread.waits_in = nullptr;
        thread.waits_at = site;
        suspend(thread);
    }
    sanitizer::acquire(&barrier_ordered_[round]);
    return votes_[round];
}

const uint64_t* Block::meet(BlockThread& thread, const char* operation, unsigned mask, uint64_t value,
                            bool orders_memory, Site site) {
    Warp& warp = *thread.warp;
    const unsigned me = bit(thread.lane);
    if ((mask & me) == 0) fail(thread, site, format("%s: the calling lane is not in its mask %08x", operation, mask));
    mask &= warp.lanes;
    if (const unsigned ended = mask & ~warp.alive) {
        fail(thread, site, format("%s: lanes %08x of its mask %08x have ended", operation, ended, mask));
    }
    Exchange& group = join(thread, operation, mask, site);
    if (orders_memory) sanitizer::release(&group.ordered);
    group.values[thread.lane] = value;
    group.arrived |= me;
    if (group.arrived == mask) {
        group.arrived = 0;
        group.unread = mask;
        warp.runnable |= mask;
    } else {
        warp.runnable &= ~me;
        thread.waits_in = &group;
        thread.waits_at = site;
        suspend(thread);
    }
    if (orders_memory) sanitizer::acquire(&group.ordered);
    // The caller reads before anyone else runs.
    group.unread &= ~me;
    if (group.unread == 0) warp.in_use &= ~bit(static_cast<unsigned>(&group - warp.exchanges));
    return group.values;
}

// The exchange of the lanes of `mask`, in which some may be waiting already. Other lanes may be in others.
Exchange& Block::join(BlockThread& thread, const char* operation, unsigned mask, Site site) {
    Warp& warp = *thread.warp;
    Exchange* own = nullptr;
    for (unsigned rest = warp.in_use; rest != 0; rest &= rest - 1) {
        Exchange& group = warp.exchanges[first_lane(rest)];
        if ((group.arrived & mask) == 0 || (group.mask & bit(thread.lane)) == 0) continue;
        // They wait for this lane, and it for them.
        if (group.mask != mask) {
            fail(thread, site, format("%s: lanes disagree on the mask, %08x and %08x", operation, group.mask, mask));
        }
        if (!is_same(group.operation, operation)) {
            fail(thread, site, format("%s: other lanes of its mask are in %s", operation, group.operation));
        }
        own = &group;
    }
    if (own != nullptr) return *own;
    const unsigned index = first_lane(~warp.in_use);
    warp.in_use |= bit(index);
    Exchange& group = warp.exchanges[index];
    group.mask = mask;
    group.operation = operation;
    return group;
}

unsigned char* Block::dynamic_shared() { return dynamic_shared_.start(); }

// ---------------------------------------------------------------------------------------------------------------------
// Faults.

void Block::fail(BlockThread& thread, Site site, const std::string& what) {
    blame(thread, site, what);
    thread.fiber->switch_to(scheduler_);
    abort(); // the block is abandoned
}

void Block::blame(const BlockThread& thread, Site site, const std::string& what) {
    fault_ = what + " (block " + text(place_.block) + ", thread " + text(thread.index);
    fault_ += site.line > 0 ? ", " + text(site) + ")" : ")";
}

// Nobody can go on, and not all have ended: says whom a thread waits for in vain.
void Block::explain_standstill() {
    const BlockThread* at_barrier = nullptr;
    for (const BlockThread& thread : threads_) {
        if ((thread.warp->alive & bit(thread.lane)) == 0) continue;
        const Exchange* group = thread.waits_in;
        if (group == nullptr) {
            at_barrier = &thread;
            continue;
        }
        const unsigned missing = group->mask & ~group->arrived, ended = missing & ~thread.warp->alive;
        return blame(thread, thread.waits_at,
                     format("deadlock: %s waits for lanes %08x, of which %08x have ended and the others wait elsewhere",
                            group->operation, missing, ended));
    }
    blame(*at_barrier, at_barrier->waits_at,
          format("diverged barrier: %u threads of the block have ended and never come to it", size_ - alive_));
}

// ---------------------------------------------------------------------------------------------------------------------
// The interface for kernels.

namespace {

BlockThread& caller() { return static_cast<BlockThread&>(current_thread()); }

} // namespace

unsigned block_barrier(Site site, bool predicate) { return caller().block->barrier(caller(), site, predicate); }

void warp_barrier(unsigned mask, Site site) { caller().block->meet(caller(), "__syncwarp", mask, 0, true, site); }

const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value, Site site) {
    return caller().block->meet(caller(), operation, mask, value, false, site);
}

unsigned char* dynamic_shared() {
    unsigned char* memory = caller().block->dynamic_shared();
    if (memory == nullptr) fail(Site{}, "the kernel uses dynamic shared memory, but was launched with none");
    return memory;
}

void fail(Site site, const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    const std::string what = format(text, arguments);
    va_end(arguments);
    caller().block->fail(caller(), site, what);
}

} // namespace emulator
