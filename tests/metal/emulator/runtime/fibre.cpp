// Fibres for x86-64 (System V): a switch saves the six callee-saved registers and exchanges stack pointers.
#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#error "the Metal emulator's fibres are written for x86-64"
#endif

extern "C" void emulator_switch_stack(void** save_here, void* resume);

asm(R"(
.text
.globl emulator_switch_stack
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
.size emulator_switch_stack, . - emulator_switch_stack
)");

namespace emulator {
namespace {

constexpr size_t stack_bytes = 256 * 1024;
constexpr size_t guard_bytes = 4096;
constexpr int saved_registers = 6;

void* scheduler_stack_pointer;

}  // namespace

Fibre::Fibre() {
  void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // The guard page turns a stack overflow into a clean crash.
  if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE) != 0) {
    perror("emulator: no memory for a fibre's stack");
    exit(2);
  }
  mapping_ = static_cast<char*>(memory);
}

Fibre::~Fibre() { munmap(mapping_, guard_bytes + stack_bytes); }

void Fibre::prepare(void (*entry)()) {
  void** top = reinterpret_cast<void**>(mapping_ + guard_bytes + stack_bytes);
  // From the top: padding that leaves the stack aligned as after a call, a null return address, the entry that `ret` of
  // the switch jumps to, and the registers that the switch pops.
  *--top = nullptr;
  *--top = nullptr;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < saved_registers; i++) *--top = nullptr;
  stack_pointer_ = top;
}

void Fibre::enter() { emulator_switch_stack(&scheduler_stack_pointer, stack_pointer_); }

void Fibre::leave() { emulator_switch_stack(&stack_pointer_, scheduler_stack_pointer); }

}  // namespace emulator
