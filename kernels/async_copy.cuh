// Copies from global to shared memory that go on while their thread computes.
#pragma once

#include "common.cuh"

// The copies that a thread has started. What they bring may be read after `wait`, by other threads after a barrier
// behind it.
class AsyncCopies {
  public:
    // Copies BYTES bytes (4, 8 or 16) between multiples of BYTES, or writes zeros and reads nothing if not `present`.
    template <int BYTES> __device__ __forceinline__ void copy(void* to, const void* from, bool present) {
#ifdef SIMSIAM_EMULATOR
        if (reinterpret_cast<uintptr_t>(to) % BYTES != 0 || reinterpret_cast<uintptr_t>(from) % BYTES != 0) {
            emulator::fail(emulator::Site::here(), "a copy of %d bytes from %p to %p is not aligned", BYTES, from, to);
        }
        if (copies_ == MOST) emulator::fail(emulator::Site::here(), "more than %d copies wait", MOST);
        // What was there is gone at once, and what comes is there after `wait`: a device does either at any time between.
        for (int i = 0; i < BYTES / 4; ++i) static_cast<uint32_t*>(to)[i] = 0xffffffffu;
        pending_[copies_++] = {to, present ? from : nullptr, BYTES, groups_};
#else
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        const int read = present ? BYTES : 0;
        if constexpr (BYTES == 16) { // past the first-level cache
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(read) : "memory");
        } else {
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(read)
                         : "memory");
        }
#endif
    }

    // Makes a group, which may be empty, of the copies since the last call.
    __device__ __forceinline__ void commit() {
#ifdef SIMSIAM_EMULATOR
        ++groups_;
#else
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // Waits until at most LATEST groups, the latest ones, have not arrived.
    template <int LATEST> __device__ __forceinline__ void wait() {
#ifdef SIMSIAM_EMULATOR
        int arrived = 0;
        for (; arrived < copies_ && pending_[arrived].group + LATEST < groups_; ++arrived) pending_[arrived].run();
        copies_ -= arrived;
        for (int i = 0; i < copies_; ++i) pending_[i] = pending_[i + arrived];
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
#endif
    }

#ifdef SIMSIAM_EMULATOR
  private:
    struct Copy {
        void* to;
        const void* from;
        int bytes, group;
        // As plain accesses of words, which the sanitizers see.
        void run() const {
            for (int i = 0; i < bytes / 4; ++i) {
                static_cast<uint32_t*>(to)[i] = from == nullptr ? 0 : static_cast<const uint32_t*>(from)[i];
            }
        }
    };
    static constexpr int MOST = 64;
    Copy pending_[MOST];
    int copies_ = 0, groups_ = 0;
#endif
};
