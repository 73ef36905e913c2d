#include "state.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sstream>

namespace fake {

thread_local const void* current_context = nullptr;

State& state() {
    static State* const only = new State; // never destroyed: other libraries may end later
    return *only;
}

[[noreturn]] static void give_up(const std::string& why) {
    fprintf(stderr, "fake CUDA: %s\n", why.c_str());
    _exit(98);
}

Settings::Settings() {
    const char* const words = getenv("FAKE_CUDA");
    std::istringstream list(words == nullptr ? "" : words);
    for (std::string word; std::getline(list, word, ',');) {
        const size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        const auto number = [&] { return equals == word.npos ? 0 : strtoull(&word[equals + 1], nullptr, 10); };
        if (name == "no-device") no_device = true;
        else if (name == "old-driver") version = 12080;
        else if (name == "broken") broken = true;
        else if (name == "memory") memory = number();
        else if (name == "capability") capability = number();
        else if (name == "hurry") hurry = number();
        else give_up("FAKE_CUDA: what is " + word + "?");
    }
}

Kernels::Kernels() {
    const char* const path = getenv("FAKE_CUDA_KERNELS");
    if (path == nullptr) return;
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) give_up(dlerror());
    const auto find = [&](auto& function, const char* name) {
        void* const symbol = dlsym(library, name);
        if (symbol == nullptr) give_up(dlerror());
        memcpy(&function, &symbol, sizeof function);
    };
    uint32_t (*count)();
    find(count, "simsiam_emulator_kernels");
    find(kernel, "simsiam_emulator_kernel");
    find(launch, "simsiam_emulator_launch");
    find(allocate, "simsiam_emulator_allocate");
    find(free, "simsiam_emulator_free");
    find(copy, "simsiam_emulator_copy");
    for (uint32_t i = 0; i < count(); ++i) by_name[kernel(i)->name] = kernel(i);
}

CUresult State::give(Stream& stream, Work work) {
    if (stream.capture.status == CU_STREAM_CAPTURE_STATUS_INVALIDATED) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream.capture.status == CU_STREAM_CAPTURE_STATUS_ACTIVE) {
        stream.capture.nodes.push_back(std::move(work));
        return CUDA_SUCCESS;
    }
    stream.queue.push_back(std::move(work));
    if (stream.number == settings.hurry) run(stream, nullptr);
    return fault;
}

void State::run(Stream& stream, const Mark* until) {
    while (!stream.queue.empty() && !(until != nullptr && until->passed)) {
        const Work work = std::move(stream.queue.front());
        stream.queue.pop_front();
        if (work.wait != nullptr && !work.wait->passed) run(*work.wait->stream, work.wait.get());
        if (work.run && fault == CUDA_SUCCESS) work.run();
    }
}

bool State::refused_by_capture() {
    bool refused = false;
    for (auto& [handle, stream] : streams) {
        Capture& capture = stream->capture;
        if (capture.status == CU_STREAM_CAPTURE_STATUS_NONE) continue;
        if (capture.mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && capture.thread != std::this_thread::get_id()) continue;
        capture.status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
        refused = true;
    }
    return refused;
}

bool State::is_queued(const void* module) {
    for (auto& [handle, stream] : streams) {
        for (const Work& work : stream->queue) {
            if (module == nullptr || work.module == module) return true;
        }
    }
    return false;
}

void State::settle() {
    const auto left = [&](const char* what, size_t count) {
        if (count > 0) undefined.push_back(std::to_string(count) + " " + what + " left behind");
    };
    left("streams", streams.size());
    left("events", events.size());
    left("modules", modules.size());
    left("graphs", graphs.size());
    left("executable graphs", executables.size());
    left("blocks of device memory", memory.size());
    left("blocks of page-locked memory", pinned.size());
    // Nothing can be given back after a fault.
    if (undefined.empty() || fault != CUDA_SUCCESS) return;
    for (const std::string& what : undefined) fprintf(stderr, "fake CUDA: %s\n", what.c_str());
    _exit(99);
}

// A process that ends with an open device has leaked it whole.
static const struct End {
    ~End() {
        if (state().users == 0 || state().fault != CUDA_SUCCESS) return;
        fprintf(stderr, "fake CUDA: the context was not given back\n");
        _exit(99);
    }
} end;

} // namespace fake
