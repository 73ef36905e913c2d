// The driver's functions, as cuda.h declares them; parameters that the engine leaves at their defaults are not looked at.
#include <stdio.h>
#include <string.h>

#include <chrono>

#include "state.h"

using namespace fake;

#define CUDA_API extern "C" __attribute__((visibility("default"))) CUresult
#define TRY(call) \
    if (const CUresult result = (call); result != CUDA_SUCCESS) return result

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

CUresult started() {
    if (!state().started) return CUDA_ERROR_NOT_INITIALIZED;
    return state().settings.no_device ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}

// What every call needs that touches the device.
CUresult in_context() {
    TRY(started());
    if (state().context == nullptr || current_context != state().context.get()) return CUDA_ERROR_INVALID_CONTEXT;
    return state().fault;
}

// The same for calls that have no place in a capture.
CUresult in_context_outside_capture() {
    TRY(in_context());
    return state().refused_by_capture() ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult undefined(const char* what, CUresult result) {
    state().undefined.push_back(what);
    return result;
}

template <class T> CUresult destroy(Table<T>& table, void* handle, const char* what) {
    TRY(in_context());
    return table.remove(handle) ? CUDA_SUCCESS : undefined(what, CUDA_ERROR_INVALID_HANDLE);
}

double now() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

void* host(CUdeviceptr at) { return reinterpret_cast<void*>(at); }

// Between host and device, when the stream comes to it; the device's side has been checked.
Work copy(void* to, const void* from, size_t bytes, const void* host_side, CUdeviceptr device_side) {
    return {nullptr, [=] {
                if (!state().memory.holds(device_side, bytes)) {
                    undefined("a copy ran after its device memory was freed", CUDA_SUCCESS);
                } else if (host_side != nullptr && !state().pinned.holds(reinterpret_cast<uint64_t>(host_side), bytes)) {
                    undefined("a copy ran after its page-locked memory was freed", CUDA_SUCCESS);
                } else {
                    state().kernels.copy(to, from, bytes);
                }
            }};
}

bool is_pinned(const void* at, size_t bytes) { return state().pinned.holds(reinterpret_cast<uint64_t>(at), bytes); }

// An entry of a fatbin: NVIDIA's container of code for several generations of devices.
struct FatbinEntry {
    uint16_t kind, version; // kind: 1 PTX, 2 machine code
    uint32_t header_bytes, payload_bytes, payload_bytes_high;
    uint32_t compressed[2];
    uint16_t minor, major;
    uint32_t generation;
};
static_assert(offsetof(FatbinEntry, generation) == 28, "as nvcc writes it");

CUresult check_fatbin(const unsigned char* image) {
    uint32_t magic, bytes;
    uint16_t header_bytes;
    memcpy(&magic, image, 4);
    memcpy(&header_bytes, image + 6, 2);
    memcpy(&bytes, image + 8, 4);
    if (magic != 0xba55ed50) return CUDA_ERROR_INVALID_IMAGE;
    const unsigned own = state().settings.capability;
    const unsigned char* const end = image + header_bytes + bytes;
    for (const unsigned char* at = image + header_bytes; at < end;) {
        FatbinEntry entry;
        memcpy(&entry, at, sizeof entry);
        const bool same_major = entry.generation / 10 == own / 10;
        if (entry.generation <= own && (entry.kind == 1 || same_major)) return CUDA_SUCCESS;
        at += entry.header_bytes + entry.payload_bytes;
    }
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

const char* name_of(CUresult result) {
#define NAME(code) \
    case code: return #code
    switch (result) {
        NAME(CUDA_SUCCESS);
        NAME(CUDA_ERROR_INVALID_VALUE);
        NAME(CUDA_ERROR_OUT_OF_MEMORY);
        NAME(CUDA_ERROR_NOT_INITIALIZED);
        NAME(CUDA_ERROR_NO_DEVICE);
        NAME(CUDA_ERROR_INVALID_DEVICE);
        NAME(CUDA_ERROR_INVALID_IMAGE);
        NAME(CUDA_ERROR_INVALID_CONTEXT);
        NAME(CUDA_ERROR_NO_BINARY_FOR_GPU);
        NAME(CUDA_ERROR_INVALID_HANDLE);
        NAME(CUDA_ERROR_NOT_FOUND);
        NAME(CUDA_ERROR_NOT_READY);
        NAME(CUDA_ERROR_LAUNCH_FAILED);
        NAME(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
        NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        NAME(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
        NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        NAME(CUDA_ERROR_CAPTURED_EVENT);
        NAME(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    }
#undef NAME
    return nullptr;
}

} // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The driver and its device.

CUDA_API cuInit(unsigned) {
    const Lock lock(state().lock);
    if (state().settings.broken) return CUDA_ERROR_SYSTEM_DRIVER_MISMATCH;
    if (state().settings.no_device) return CUDA_ERROR_NO_DEVICE;
    state().started = true;
    return CUDA_SUCCESS;
}

CUDA_API cuDriverGetVersion(int* version) {
    *version = state().settings.version;
    return CUDA_SUCCESS;
}

CUDA_API cuGetErrorName(CUresult error, const char** name) {
    *name = name_of(error);
    return *name == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUDA_API cuGetErrorString(CUresult error, const char** text) {
    *text = "said by the driver for tests";
    return name_of(error) == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUDA_API cuDeviceGetCount(int* count) {
    TRY(started());
    *count = 1;
    return CUDA_SUCCESS;
}

CUDA_API cuDeviceGet(CUdevice* device, int ordinal) {
    TRY(started());
    *device = ordinal;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUDA_API cuDeviceGetName(char* name, int bytes, CUdevice) {
    TRY(started());
    snprintf(name, bytes, "Fake GPU");
    return CUDA_SUCCESS;
}

CUDA_API cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    TRY(started());
    *bytes = state().settings.memory;
    return CUDA_SUCCESS;
}

CUDA_API cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
    TRY(started());
    const int capability = state().settings.capability;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 7; return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}

CUDA_API cuDevicePrimaryCtxRetain(void** context, CUdevice device) {
    const Lock lock(state().lock);
    TRY(started());
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    if (state().users++ == 0) state().context = std::make_unique<Context>();
    *context = state().context.get();
    return CUDA_SUCCESS;
}

CUDA_API cuDevicePrimaryCtxRelease_v2(CUdevice) {
    const Lock lock(state().lock);
    if (state().users == 0) return undefined("the context was given back too often", CUDA_ERROR_INVALID_CONTEXT);
    if (--state().users > 0) return CUDA_SUCCESS;
    state().settle();
    state().context.reset();
    return CUDA_SUCCESS;
}

CUDA_API cuCtxSetCurrent(const void* context) {
    const Lock lock(state().lock);
    TRY(started());
    if (context != nullptr && context != state().context.get()) return CUDA_ERROR_INVALID_CONTEXT;
    current_context = context;
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory.

CUDA_API cuMemGetInfo_v2(size_t* free, size_t* total) {
    const Lock lock(state().lock);
    TRY(in_context());
    *total = state().settings.memory;
    *free = *total - state().memory.total();
    return CUDA_SUCCESS;
}

CUDA_API cuMemAlloc_v2(CUdeviceptr* memory, size_t bytes) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > state().settings.memory - state().memory.total()) return CUDA_ERROR_OUT_OF_MEMORY;
    *memory = reinterpret_cast<CUdeviceptr>(state().kernels.allocate(bytes));
    if (*memory == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    state().memory.add(*memory, bytes);
    return CUDA_SUCCESS;
}

CUDA_API cuMemFree_v2(CUdeviceptr memory) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    if (state().is_queued()) undefined("device memory was freed while work was queued", CUDA_SUCCESS);
    if (!state().memory.remove(memory)) return undefined("unknown device memory was freed", CUDA_ERROR_INVALID_VALUE);
    state().kernels.free(host(memory));
    return CUDA_SUCCESS;
}

CUDA_API cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    *memory = state().kernels.allocate(bytes); // filled with NaN
    if (*memory == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    state().pinned.add(reinterpret_cast<uint64_t>(*memory), bytes);
    return CUDA_SUCCESS;
}

CUDA_API cuMemFreeHost(void* memory) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    if (!state().pinned.remove(reinterpret_cast<uint64_t>(memory))) {
        return undefined("unknown page-locked memory was freed", CUDA_ERROR_INVALID_VALUE);
    }
    state().kernels.free(memory);
    return CUDA_SUCCESS;
}

CUDA_API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, void* stream_handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(stream_handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (!state().memory.holds(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    const auto filled = std::make_shared<std::vector<unsigned char>>(bytes, value);
    return state().give(*stream, {nullptr, [=] { state().kernels.copy(host(to), filled->data(), bytes); }});
}

// From page-locked memory when the stream comes to it; other memory is read at once.
CUDA_API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void* stream_handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(stream_handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (!state().memory.holds(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    if (is_pinned(from, bytes)) return state().give(*stream, copy(host(to), from, bytes, from, to));
    TRY(in_context_outside_capture());
    const auto* const first = static_cast<const unsigned char*>(from);
    const auto staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
    return state().give(*stream, {nullptr, [=] { state().kernels.copy(host(to), staged->data(), bytes); }});
}

// To page-locked memory when the stream comes to it; to other memory before it returns.
CUDA_API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void* stream_handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(stream_handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (!state().memory.holds(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    if (is_pinned(to, bytes)) return state().give(*stream, copy(to, host(from), bytes, to, from));
    TRY(in_context_outside_capture());
    TRY(state().give(*stream, copy(to, host(from), bytes, nullptr, from)));
    state().run(*stream, nullptr);
    return state().fault;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels.

CUDA_API cuModuleLoadData(void** module, const void* image) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    TRY(check_fatbin(static_cast<const unsigned char*>(image)));
    *module = state().modules.add({});
    return CUDA_SUCCESS;
}

CUDA_API cuModuleUnload(void* module) {
    const Lock lock(state().lock);
    if (state().is_queued(module)) undefined("a module was unloaded while its kernels were queued", CUDA_SUCCESS);
    return destroy(state().modules, module, "an unknown module was unloaded");
}

// Functions may be loaded as late as this, which has no place in a capture.
CUDA_API cuModuleGetFunction(void** function, void* module, const char* name) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    if (state().modules.find(module) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const auto kernel = state().kernels.by_name.find(name);
    if (kernel == state().kernels.by_name.end()) return CUDA_ERROR_NOT_FOUND;
    *function = state().functions.add({kernel->second, module});
    return CUDA_SUCCESS;
}

CUDA_API cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes) {
    const Lock lock(state().lock);
    const Function* const found = state().functions.find(function);
    if (found == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (index >= found->kernel->parameters) return CUDA_ERROR_INVALID_VALUE;
    *bytes = found->kernel->parameter_bytes[index];
    *offset = 0; // nobody asks
    return CUDA_SUCCESS;
}

CUDA_API cuFuncSetAttribute(void* function, int attribute, int value) {
    const Lock lock(state().lock);
    TRY(in_context());
    Function* const found = state().functions.find(function);
    if (found == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const bool valid = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value >= 0 && value <= 227 << 10;
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
    found->shared = value;
    return CUDA_SUCCESS;
}

CUDA_API cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, void* stream_handle, void** arguments,
                        void**) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(stream_handle);
    const Function* const found = state().functions.find(function);
    if (stream == nullptr || found == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const emulator::Kernel* const kernel = found->kernel;
    const bool empty = grid_x == 0 || grid_y == 0 || grid_z == 0;
    if (empty || block_x * block_y * block_z != kernel->threads || shared > found->shared) return CUDA_ERROR_INVALID_VALUE;

    // The arguments are taken now, what they point to is used later.
    std::vector<std::vector<unsigned char>> values;
    for (uint32_t i = 0; i < kernel->parameters; ++i) {
        const auto* const first = static_cast<const unsigned char*>(arguments[i]);
        values.emplace_back(first, first + kernel->parameter_bytes[i]);
    }
    const auto run = [=, values = std::move(values)]() mutable {
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(value.data());
        const emulator::Launch launch = {
            kernel, pointers.data(), {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, 1, 0};
        char fault[1024];
        if (state().kernels.launch(&launch, fault, sizeof fault)) return;
        fprintf(stderr, "fake CUDA: kernel %s: %s\n", kernel->name, fault);
        state().fault = CUDA_ERROR_LAUNCH_FAILED;
    };
    return state().give(*stream, {nullptr, run, found->module});
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events.

CUDA_API cuStreamCreate(void** stream, unsigned flags) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE; // the default stream is not here
    *stream = state().streams.add({++state().streams_made, {}, {}});
    return CUDA_SUCCESS;
}

CUDA_API cuStreamDestroy_v2(void* handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(handle);
    if (stream == nullptr) return undefined("an unknown stream was destroyed", CUDA_ERROR_INVALID_HANDLE);
    if (stream->capture.status != CU_STREAM_CAPTURE_STATUS_NONE) {
        undefined("a stream was destroyed during a capture", CUDA_SUCCESS);
    }
    state().run(*stream, nullptr);
    state().streams.remove(handle);
    return CUDA_SUCCESS;
}

CUDA_API cuStreamSynchronize(void* handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture.status != CU_STREAM_CAPTURE_STATUS_NONE) {
        stream->capture.status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    state().run(*stream, nullptr);
    return state().fault;
}

CUDA_API cuStreamWaitEvent(void* stream_handle, void* event_handle, unsigned) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(stream_handle);
    const Event* const event = state().events.find(event_handle);
    if (stream == nullptr || event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const bool capturing = stream->capture.status != CU_STREAM_CAPTURE_STATUS_NONE;
    if (event->captured) {
        // CUDA would draw the other stream into the capture; this driver has no such graphs.
        return capturing ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (capturing) {
        stream->capture.status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    return event->mark == nullptr ? CUDA_SUCCESS : state().give(*stream, {event->mark, {}, nullptr});
}

CUDA_API cuEventCreate(void** event, unsigned flags) {
    const Lock lock(state().lock);
    TRY(in_context());
    *event = state().events.add({(flags & CU_EVENT_DISABLE_TIMING) == 0, false, nullptr});
    return CUDA_SUCCESS;
}

CUDA_API cuEventDestroy_v2(void* event) {
    const Lock lock(state().lock);
    return destroy(state().events, event, "an unknown event was destroyed");
}

CUDA_API cuEventRecord(void* event_handle, void* stream_handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(stream_handle);
    Event* const event = state().events.find(event_handle);
    if (stream == nullptr || event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    event->captured = stream->capture.status != CU_STREAM_CAPTURE_STATUS_NONE;
    if (event->captured) return CUDA_SUCCESS;
    const auto mark = event->mark = std::make_shared<Mark>(Mark{stream});
    return state().give(*stream, {nullptr, [mark] {
                                      mark->milliseconds = now();
                                      mark->passed = true;
                                  }});
}

CUDA_API cuEventSynchronize(void* handle) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    const Event* const event = state().events.find(handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
    if (event->mark != nullptr && !event->mark->passed) state().run(*event->mark->stream, event->mark.get());
    return state().fault;
}

CUDA_API cuEventElapsedTime_v2(float* milliseconds, void* start_handle, void* end_handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    const Event* const start = state().events.find(start_handle);
    const Event* const end = state().events.find(end_handle);
    if (start == nullptr || end == nullptr || !start->timed || !end->timed) return CUDA_ERROR_INVALID_HANDLE;
    if (start->mark == nullptr || end->mark == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (!start->mark->passed || !end->mark->passed) return CUDA_ERROR_NOT_READY;
    *milliseconds = static_cast<float>(end->mark->milliseconds - start->mark->milliseconds);
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs.

CUDA_API cuStreamBeginCapture_v2(void* handle, int mode) {
    const Lock lock(state().lock);
    TRY(in_context());
    Stream* const stream = state().streams.find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture.status != CU_STREAM_CAPTURE_STATUS_NONE) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    stream->capture = {CU_STREAM_CAPTURE_STATUS_ACTIVE, mode, std::this_thread::get_id(), {}};
    return CUDA_SUCCESS;
}

CUDA_API cuStreamEndCapture(void* handle, void** graph) {
    const Lock lock(state().lock);
    *graph = nullptr;
    TRY(in_context());
    Stream* const stream = state().streams.find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    Capture& capture = stream->capture;
    if (capture.status == CU_STREAM_CAPTURE_STATUS_NONE) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (capture.thread != std::this_thread::get_id()) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    const Capture ended = std::exchange(capture, {});
    if (ended.status == CU_STREAM_CAPTURE_STATUS_INVALIDATED) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = state().graphs.add({ended.nodes});
    return CUDA_SUCCESS;
}

CUDA_API cuGraphInstantiateWithFlags(void** executable, void* handle, unsigned long long flags) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    const Graph* const graph = state().graphs.find(handle);
    if (graph == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    *executable = state().executables.add({{graph->nodes}});
    return CUDA_SUCCESS;
}

CUDA_API cuGraphUpload(void* executable, void* stream) {
    const Lock lock(state().lock);
    TRY(in_context_outside_capture());
    const bool known = state().executables.find(executable) != nullptr && state().streams.find(stream) != nullptr;
    return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUDA_API cuGraphLaunch(void* handle, void* stream_handle) {
    const Lock lock(state().lock);
    TRY(in_context());
    const Executable* const executable = state().executables.find(handle);
    Stream* const stream = state().streams.find(stream_handle);
    if (executable == nullptr || stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    for (const Work& node : executable->nodes) TRY(state().give(*stream, node));
    return CUDA_SUCCESS;
}

CUDA_API cuGraphDestroy(void* graph) {
    const Lock lock(state().lock);
    return destroy(state().graphs, graph, "an unknown graph was destroyed");
}

CUDA_API cuGraphExecDestroy(void* executable) {
    const Lock lock(state().lock);
    return destroy(state().executables, executable, "an unknown executable graph was destroyed");
}
