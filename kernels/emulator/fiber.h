// Fibers: flows of control with stacks of their own, of which a thread of the operating system runs one at a time.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
  public:
    // Makes this the flow of control that calls.
    void adopt_caller();

    // Makes this a fresh flow that begins in `entry` when it is switched to. `entry` never returns. The stack ends
    // below `top`.
    void begin(char* bottom, char* top, void (*entry)());

    // Runs `next` until something switches back here.
    void switch_to(Fiber& next);

    // The first thing that an `entry` calls, for the fiber that it is of.
    void arrived();

  private:
#if defined(__x86_64__)
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
#ifdef SIMSIAM_SANITIZE_ADDRESS
    void* fake_stack_ = nullptr;
    const void* bottom_ = nullptr;
    size_t bytes_ = 0;
    Fiber* before_ = nullptr; // who switched here
#endif
#ifdef SIMSIAM_SANITIZE_THREAD
    void* identity_ = nullptr; // kept for all flows that begin here: new ones are dear
#endif
};

// Stacks at multiples of their size, each above a page that may not be touched.
class Stacks {
  public:
    explicit Stacks(size_t count);
    ~Stacks();
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    // The lowest byte of a stack's place, a multiple of STACK_BYTES. The stack itself begins at `GUARD_BYTES`.
    char* place(size_t index) const;

    static constexpr size_t GUARD_BYTES = 64 << 10; // a page, however large the pages are

  private:
    size_t count_;
    char* mapping_;
};

} // namespace emulator
