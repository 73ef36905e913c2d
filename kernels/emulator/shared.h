// The shared memory of the block that the calling thread of the operating system runs.
#pragma once

#include <stddef.h>

#include <memory>

namespace emulator {

class SharedMemory {
  public:
    // Dynamic shared memory, exactly as large as asked for: the address sanitizer then sees who leaves it.
    static SharedMemory allocate(size_t bytes);

    // All __shared__ variables of the library; none under the address sanitizer, which has them as globals.
    static SharedMemory static_variables();

    unsigned char* start() const { return start_; }
    size_t bytes() const { return bytes_; }

    // Fills it with NaN: a block finds no zeros, and nothing that another block has left.
    void poison() const;

  private:
    unsigned char* start_ = nullptr;
    size_t bytes_ = 0;
    std::shared_ptr<void> owner_;
};

} // namespace emulator
