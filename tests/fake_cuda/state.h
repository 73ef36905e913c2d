// The device: what exists on it, and its streams, which run as late as CUDA allows.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "api.h"
#include "launch.h"

namespace fake {

struct Stream;

// A point of a stream; events move on to a new one each time they are recorded.
struct Mark {
    Stream* stream;
    bool passed = false;
    double milliseconds = 0;
};

// What a stream does next: wait for a mark, or something.
struct Work {
    std::shared_ptr<Mark> wait;
    std::function<void()> run;
    const void* module = nullptr; // of a kernel
};

struct Capture {
    int status = CU_STREAM_CAPTURE_STATUS_NONE;
    int mode = 0;
    std::thread::id thread;
    std::vector<Work> nodes;
};

struct Stream {
    unsigned number; // in the order in which they were made, from 1
    std::deque<Work> queue;
    Capture capture;
};

struct Event {
    bool timed;
    bool captured = false;
    std::shared_ptr<Mark> mark;
};

struct Module {};

struct Function {
    const emulator::Kernel* kernel;
    const void* module;
    unsigned shared = 48 << 10; // that it may have
};

struct Graph {
    std::vector<Work> nodes;
};
struct Executable : Graph {};

struct Context {};

// Objects of one kind, by handle; a handle that is not among them is refused without being looked at.
template <class T> class Table {
  public:
    T* add(T object) {
        auto made = std::make_unique<T>(std::move(object));
        T* handle = made.get();
        objects_.emplace(handle, std::move(made));
        return handle;
    }
    T* find(const void* handle) {
        const auto found = objects_.find(handle);
        return found == objects_.end() ? nullptr : found->second.get();
    }
    bool remove(const void* handle) { return objects_.erase(handle) > 0; }
    size_t size() const { return objects_.size(); }
    auto begin() { return objects_.begin(); }
    auto end() { return objects_.end(); }

  private:
    std::map<const void*, std::unique_ptr<T>> objects_;
};

// Reserved memory by its first address.
class Ranges {
  public:
    void add(uint64_t start, size_t bytes) { ranges_[start] = bytes; }
    bool remove(uint64_t start) { return ranges_.erase(start) > 0; }
    bool holds(uint64_t at, size_t bytes) const {
        auto range = ranges_.upper_bound(at);
        if (range == ranges_.begin()) return false;
        --range;
        return at - range->first <= range->second && bytes <= range->second - (at - range->first);
    }
    size_t total() const {
        size_t sum = 0;
        for (const auto& range : ranges_) sum += range.second;
        return sum;
    }
    size_t size() const { return ranges_.size(); }

  private:
    std::map<uint64_t, size_t> ranges_;
};

// FAKE_CUDA and FAKE_CUDA_KERNELS.
struct Settings {
    bool no_device = false, broken = false;
    int version = 13000;
    size_t memory = size_t{8} << 30;
    unsigned capability = 90;
    unsigned hurry = 0;
    Settings();
};

// The emulator's library.
struct Kernels {
    const emulator::Kernel* (*kernel)(uint32_t);
    bool (*launch)(const emulator::Launch*, char*, size_t);
    void* (*allocate)(size_t);
    void (*free)(void*);
    void (*copy)(void*, const void*, size_t);
    std::map<std::string, const emulator::Kernel*> by_name;
    Kernels();
};

struct State {
    std::recursive_mutex lock;
    const Settings settings;
    const Kernels kernels;
    bool started = false;
    unsigned streams_made = 0;
    CUresult fault = CUDA_SUCCESS; // of a kernel: every call answers with it from then on
    std::vector<std::string> undefined; // what CUDA would not have noticed

    std::unique_ptr<Context> context;
    unsigned users = 0; // of the context
    Table<Stream> streams;
    Table<Event> events;
    Table<Module> modules;
    Table<Function> functions; // of all modules, for good
    Table<Graph> graphs;
    Table<Executable> executables;
    Ranges memory, pinned;

    CUresult give(Stream& stream, Work work);
    void run(Stream& stream, const Mark* until);
    // Invalidates the captures that this thread may not make such a call beside; whether there are any.
    bool refused_by_capture();
    // Whether work is queued, of any kind or kernels of this module alone.
    bool is_queued(const void* module = nullptr);
    // At the end of the context: ends the process if something undefined was done, or something was left.
    void settle();
};

State& state();

// Of the calling thread.
extern thread_local const void* current_context;

} // namespace fake
