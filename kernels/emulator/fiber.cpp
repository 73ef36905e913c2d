#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>

#include <new>

#include "runtime.h"
#include "sanitizer.h"

#if defined(__x86_64__)
// Saves what a call must preserve on the stack and the stack pointer at *save, and goes on where `load` was saved.
extern "C" void emulator_switch_stacks(void** save, void* load);
asm(R"(
.text
.globl emulator_switch_stacks
.hidden emulator_switch_stacks
.type emulator_switch_stacks, @function
emulator_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch_stacks, . - emulator_switch_stacks
)");
constexpr int SAVED_REGISTERS = 6;
#endif

namespace emulator {

void Fiber::adopt_caller() {
#ifdef SIMSIAM_SANITIZE_THREAD
    identity_ = __tsan_get_current_fiber();
#endif
}

void Fiber::begin(char* bottom, char* top, void (*entry)()) {
#if defined(__x86_64__)
    // As if `entry` were to be returned to: its address, above it the end of all frames, below it registers of no
    // meaning.
    void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 2;
    frame[0] = reinterpret_cast<void*>(entry);
    frame[1] = nullptr;
    for (int i = 1; i <= SAVED_REGISTERS; ++i) frame[-i] = nullptr;
    stack_pointer_ = frame - SAVED_REGISTERS;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = static_cast<size_t>(top - bottom);
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
#ifdef SIMSIAM_SANITIZE_ADDRESS
    fake_stack_ = nullptr;
    bottom_ = bottom;
    bytes_ = static_cast<size_t>(top - bottom);
#endif
#ifdef SIMSIAM_SANITIZE_THREAD
    if (identity_ == nullptr) identity_ = __tsan_create_fiber(0);
#endif
    (void)bottom;
}

void Fiber::switch_to(Fiber& next) {
#ifdef SIMSIAM_SANITIZE_ADDRESS
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
    next.before_ = this;
#endif
#ifdef SIMSIAM_SANITIZE_THREAD
    __tsan_switch_to_fiber(next.identity_, __tsan_switch_to_fiber_no_sync); // barriers order memory, turns do not
#endif
#if defined(__x86_64__)
    emulator_switch_stacks(&stack_pointer_, next.stack_pointer_);
#else
    swapcontext(&context_, &next.context_);
#endif
    arrived();
}

void Fiber::arrived() {
#ifdef SIMSIAM_SANITIZE_ADDRESS
    // Tells where the stack lies that was left: so that of an adopted caller becomes known.
    __sanitizer_finish_switch_fiber(fake_stack_, &before_->bottom_, &before_->bytes_);
#endif
}

// Reserved in one piece; the system gives memory to what is touched.
Stacks::Stacks(size_t count) : count_(count) {
    constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* mapping = mmap(nullptr, (count + 1) * STACK_BYTES, PROT_NONE, FLAGS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(mapping);
    for (size_t i = 0; i < count; ++i) {
        char* stack = place(i) + GUARD_BYTES;
        if (mprotect(stack, STACK_BYTES - GUARD_BYTES, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    }
}

Stacks::~Stacks() { munmap(mapping_, (count_ + 1) * STACK_BYTES); }

char* Stacks::place(size_t index) const {
    const uintptr_t first = (reinterpret_cast<uintptr_t>(mapping_) + STACK_BYTES - 1) & ~(STACK_BYTES - 1);
    return reinterpret_cast<char*>(first) + index * STACK_BYTES;
}

} // namespace emulator
