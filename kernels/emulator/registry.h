// The kernels of the library, each registered by the EXPORT that follows it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

namespace emulator {

struct Kernel {
    const char* name;
    uint32_t threads; // that a block has
    uint32_t parameters;
    const uint64_t* parameter_bytes;
    void (*run)(void* const* arguments); // the part of the calling CUDA thread
};

void register_bound(uint32_t threads);
void register_kernel(const char* name, uint32_t parameters, const uint64_t* parameter_bytes, void (*run)(void* const*));

// The threads in a block of the next kernel that is registered.
struct Bound {
    explicit Bound(uint32_t threads) { register_bound(threads); }
};

template <class T> T argument(const void* from) {
    static_assert(std::is_trivially_copyable_v<T>, "a kernel's argument is copied byte by byte");
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <class F> struct Signature;
template <class... A> struct Signature<void (*)(A...)> {
    static_assert((sizeof(A) + ... + 0) <= 32764, "a kernel takes at most 32,764 bytes of arguments");
    static constexpr uint32_t count = sizeof...(A);
    static constexpr uint64_t bytes[] = {sizeof(A)..., 0}; // no array is empty

    template <size_t... I> static void call(void (*kernel)(A...), void* const* arguments, std::index_sequence<I...>) {
        kernel(argument<A>(arguments[I])...);
    }
    static void call(void (*kernel)(A...), void* const* arguments) {
        call(kernel, arguments, std::index_sequence_for<A...>{});
    }
};

template <auto kernel> struct Registration {
    using Of = Signature<decltype(kernel)>;
    explicit Registration(const char* name) { register_kernel(name, Of::count, Of::bytes, run); }
    static void run(void* const* arguments) { Of::call(kernel, arguments); }
};

} // namespace emulator
