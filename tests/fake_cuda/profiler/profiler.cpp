// A profiler for tests: attaches to a program as NVIDIA's tools do through NVTX 3, and writes down its ranges.
#include <stddef.h>
#include <stdint.h>

#include <string>

namespace {

using Function = void (*)();
struct Callbacks {
    size_t bytes;
    int (*get_module_function_table)(int module, Function*** table, unsigned* functions);
};
struct VersionInfo {
    size_t bytes;
    uint32_t version, reserved;
    void (*set_injection_version)(uint32_t);
};
using GetExportTable = const void* (*)(uint32_t);

std::string seen;
int depth = 0;

int push(const char* name) {
    seen += std::string("push ") + name + "\n";
    return depth++;
}

int pop() {
    seen += "pop\n";
    return --depth;
}

// The numbers of enum NvtxCallbackModule, and the functions that each has.
constexpr int CORE = 1;
constexpr unsigned FUNCTIONS[] = {0, 16, 9, 15, 7, 16, 7};
constexpr int RANGE_PUSH_A = 9, RANGE_POP = 11;

} // namespace

#define PROFILER_API extern "C" __attribute__((visibility("default")))

// 0 refuses a program whose tables are not as NVTX 3 says.
PROFILER_API int InitializeInjectionNvtx2(GetExportTable get) {
    const auto* const version = static_cast<const VersionInfo*>(get(3));
    const auto* const callbacks = static_cast<const Callbacks*>(get(1));
    if (version == nullptr || version->bytes != sizeof *version || version->version != 3) return 0;
    if (callbacks == nullptr || callbacks->bytes != sizeof *callbacks || get(99) != nullptr) return 0;
    version->set_injection_version(3);
    for (int module = 1; module <= 6; ++module) {
        Function** table = nullptr;
        unsigned functions = 0;
        if (callbacks->get_module_function_table(module, &table, &functions) == 0) return 0;
        if (functions != FUNCTIONS[module] || table[0] != nullptr || table[functions] != nullptr) return 0;
        for (unsigned i = 1; i < functions; ++i) {
            if (table[i] == nullptr) return 0;
        }
        if (module != CORE) continue;
        *table[RANGE_PUSH_A] = reinterpret_cast<Function>(push);
        *table[RANGE_POP] = reinterpret_cast<Function>(pop);
    }
    return callbacks->get_module_function_table(7, nullptr, nullptr) == 0;
}

PROFILER_API const char* profiler_seen() { return seen.c_str(); }
