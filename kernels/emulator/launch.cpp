#include "launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "order.h"
#include "sanitizer.h"

namespace emulator {

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The registry, filled by static constructors.

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

uint32_t last_bound = 0;

// ---------------------------------------------------------------------------------------------------------------------
// Launches.

constexpr uint32_t MAX_SHARED_BYTES = 227 << 10; // of a block on the largest device
constexpr uint32_t MAX_GRID[3] = {0x7fffffff, 65535, 65535};

std::string refusal(const Launch& launch) {
    const uint64_t threads = uint64_t{launch.block[0]} * launch.block[1] * launch.block[2];
    if (threads != launch.kernel->threads) {
        return "launched with blocks of " + std::to_string(threads) + " threads, expected " +
               std::to_string(launch.kernel->threads);
    }
    for (int axis = 0; axis < 3; ++axis) {
        const uint32_t blocks = launch.grid[axis];
        if (blocks == 0 || blocks > MAX_GRID[axis]) {
            return "launched with " + std::to_string(blocks) + " blocks along " + "xyz"[axis] + ", expected 1 to " +
                   std::to_string(MAX_GRID[axis]);
        }
    }
    if (launch.shared_bytes > MAX_SHARED_BYTES) {
        return "launched with " + std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory, " +
               "expected at most " + std::to_string(MAX_SHARED_BYTES);
    }
    return "";
}

// Everything on the device happens in one order, also if the host's threads take turns in a way that the thread
// sanitizer does not see.
std::mutex device;
std::vector<std::unique_ptr<Block>> workers; // by thread of the operating system, with stacks that outlive launches

// The blocks of one launch, dealt out to the workers in turn: each gets its share even if it is slow to start, so that
// the thread sanitizer sees blocks on different threads.
class Grid {
  public:
    Grid(const Launch& launch, uint32_t workers)
        : launch_(launch), blocks_(uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2]),
          order_(blocks_, launch.seed), workers_(static_cast<uint32_t>(std::min<uint64_t>(workers, blocks_))) {}

    // Returns the first fault, or nothing.
    std::string run() {
        while (workers.size() < workers_) workers.push_back(std::make_unique<Block>());
        std::vector<std::thread> others;
        for (uint32_t i = 1; i < workers_; ++i) others.emplace_back([this, i] { work(i); });
        work(0);
        for (std::thread& other : others) other.join();
        for (uint32_t i = 0; i < workers_; ++i) {
            if (!workers[i]->fault().empty()) return workers[i]->fault();
        }
        return "";
    }

  private:
    void work(uint32_t worker) {
        Block& block = *workers[worker];
        block.prepare(launch_);
        uint64_t random = launch_.seed;
        for (uint64_t i = worker; i < blocks_ && !is_faulty_; i += workers_) {
            const uint64_t shuffle = launch_.seed == 0 ? 0 : next_random(random);
            if (!block.run(place(order_(i)), shuffle)) is_faulty_ = true;
        }
    }

    uint3 place(uint64_t block) const {
        const uint64_t x = launch_.grid[0], y = launch_.grid[1];
        const auto index = [](uint64_t along_axis) { return static_cast<unsigned>(along_axis); };
        return {index(block % x), index(block / x % y), index(block / (x * y))};
    }

    const Launch& launch_;
    uint64_t blocks_;
    Permutation order_;
    uint32_t workers_;
    std::atomic<bool> is_faulty_{false};
};

} // namespace

void register_bound(uint32_t threads) { last_bound = threads; }

void register_kernel(const char* name, uint32_t parameters, const uint64_t* parameter_bytes,
                     void (*run)(void* const*)) {
    kernels().push_back({name, std::exchange(last_bound, 0), parameters, parameter_bytes, run});
}

} // namespace emulator

using namespace emulator;

uint32_t simsiam_emulator_kernels() { return static_cast<uint32_t>(kernels().size()); }

const Kernel* simsiam_emulator_kernel(uint32_t index) { return &kernels()[index]; }

bool simsiam_emulator_launch(const Launch* launch, char* fault, size_t fault_bytes) {
    const std::lock_guard<std::mutex> lock(device);
    std::string what = refusal(*launch);
    if (what.empty()) what = Grid(*launch, sanitizer::ADDRESS ? 1 : std::max(launch->threads, 1u)).run();
    snprintf(fault, fault_bytes, "%s", what.c_str());
    return what.empty();
}

void* simsiam_emulator_allocate(size_t bytes) {
    const std::lock_guard<std::mutex> lock(device);
    void* memory;
    if (posix_memalign(&memory, 256, std::max<size_t>(bytes, 1)) != 0) return nullptr;
    return memset(memory, 0xff, bytes);
}

void simsiam_emulator_free(void* memory) {
    const std::lock_guard<std::mutex> lock(device);
    free(memory);
}

__attribute__((optimize("no-tree-loop-distribute-patterns"))) // which would make it memcpy again
void simsiam_emulator_copy(void* to, const void* from, size_t bytes) {
    const std::lock_guard<std::mutex> lock(device);
    if (!sanitizer::ADDRESS) {
        memcpy(to, from, bytes);
        return;
    }
    // The address sanitizer watches memcpy, but guards are there for kernels alone.
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
    for (size_t i = 0; i < bytes; ++i) out[i] = in[i];
}

void simsiam_emulator_guard(const void* from, size_t bytes) { sanitizer::poison(from, bytes); }
void simsiam_emulator_unguard(const void* from, size_t bytes) { sanitizer::unpoison(from, bytes); }
