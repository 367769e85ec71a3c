#include "fiber.h"

namespace emulator {

#ifdef EMULATOR_UCONTEXT

// Portable, but swapcontext makes a system call each time to save the signal mask.
static ucontext_t scheduler_context;

void Fiber::start(char* stack, size_t, void (*entry)()) {
  stack_ = stack;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::resume() { swapcontext(&scheduler_context, &context_); }
void Fiber::suspend() { swapcontext(&context_, &scheduler_context); }

#else

// Saves the callee-saved registers on the old stack, the stack pointer in *save, and returns on
// the new stack. All other registers are dead across a call by the System V ABI.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
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
)");

constexpr int kSavedRegisters = 6;
static void* scheduler_stack_pointer;

void Fiber::start(char* stack, size_t index, void (*entry)()) {
  stack_ = stack;
  // Stack tops at equal offsets would all fall into the same cache sets: stagger them.
  char* top = stack + kStackBytes - (index % 32) * 192;
  auto* frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--frame = nullptr;                         // as if a caller had pushed its return address
  *--frame = reinterpret_cast<void*>(entry);  // where the first switch returns to
  for (int i = 0; i < kSavedRegisters; ++i) *--frame = nullptr;
  stack_pointer_ = frame;
}

void Fiber::resume() { emulator_switch_stack(&scheduler_stack_pointer, stack_pointer_); }
void Fiber::suspend() { emulator_switch_stack(&stack_pointer_, scheduler_stack_pointer); }

#endif

}  // namespace emulator
