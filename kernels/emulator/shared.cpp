#include "shared.h"

#include <link.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "sanitizer.h"

namespace emulator {

SharedMemory SharedMemory::allocate(size_t bytes) {
    SharedMemory memory;
    if (bytes == 0) return memory;
    void* start;
    if (posix_memalign(&start, 16, bytes) != 0) throw std::bad_alloc();
    memory.start_ = static_cast<unsigned char*>(start);
    memory.bytes_ = bytes;
    memory.owner_ = std::shared_ptr<void>(start, free);
    return memory;
}

namespace {

// Lies in the library's storage local to the thread, of which all the rest is __shared__ variables.
__thread volatile char anchor;

struct Search {
    const char* within;
    unsigned char* start;
    size_t bytes;
};

int find_storage(dl_phdr_info* library, size_t, void* data) {
    Search& search = *static_cast<Search*>(data);
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const auto& part = library->dlpi_phdr[i];
        char* start = static_cast<char*>(library->dlpi_tls_data);
        if (part.p_type != PT_TLS || start == nullptr) continue;
        if (search.within < start || search.within >= start + part.p_memsz) continue;
        search.start = reinterpret_cast<unsigned char*>(start);
        search.bytes = part.p_memsz;
        return 1;
    }
    return 0;
}

} // namespace

SharedMemory SharedMemory::static_variables() {
    SharedMemory memory;
    if (sanitizer::ADDRESS) return memory;
    anchor = 0; // the storage comes into being when it is first used
    Search search = {const_cast<const char*>(&anchor), nullptr, 0};
    dl_iterate_phdr(find_storage, &search);
    memory.start_ = search.start;
    memory.bytes_ = search.bytes;
    return memory;
}

void SharedMemory::poison() const {
    if (bytes_ > 0) memset(start_, 0xff, bytes_);
}

} // namespace emulator
