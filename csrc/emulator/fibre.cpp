#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

// A switch on x86-64 costs some nanoseconds; elsewhere the C library's costs a system call.
#if defined(__x86_64__) && !defined(FASTLORA_UCONTEXT)
#define FASTLORA_SWITCH 1
#else
#define FASTLORA_SWITCH 0
#include <ucontext.h>
#endif

// AddressSanitizer has to be told which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
#define FASTLORA_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTLORA_ASAN 1
#endif
#endif
#ifdef FASTLORA_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastlora::emulator {
namespace {

#ifdef FASTLORA_ASAN
constexpr size_t kStackBytes = 512 << 10;  // its frames are several times larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

}  // namespace

#if FASTLORA_SWITCH
// Saves what a function must keep, stores the stack pointer at `from` and goes on with that of
// `to`.
extern "C" void fastlora_switch_stack(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden fastlora_switch_stack
.globl fastlora_switch_stack
.type fastlora_switch_stack, @function
.p2align 4
fastlora_switch_stack:
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
.size fastlora_switch_stack, .-fastlora_switch_stack
)");
#endif

struct Fibre::Context {
#if FASTLORA_SWITCH
  void *fibre = nullptr, *caller = nullptr;  // stack pointers
#else
  ucontext_t fibre, caller;
#endif
#ifdef FASTLORA_ASAN
  void *fake_fibre = nullptr, *fake_caller = nullptr;  // AddressSanitizer's own stacks
  const void* caller_stack = nullptr;
  size_t caller_bytes = 0;
#endif
};

namespace {
thread_local Fibre* g_starting = nullptr;  // the entry function of a context takes no pointer
}

size_t Fibre::stack_bytes() { return kStackBytes; }

Fibre::Fibre() : context_(new Context) {
  // A page that nobody may touch lies below: an overflow stops instead of corrupting a neighbour.
  void* memory = mmap(nullptr, kStackBytes + page(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page(), PROT_NONE);
  stack_ = static_cast<char*>(memory) + page();
}

Fibre::~Fibre() {
  munmap(stack_ - page(), kStackBytes + page());
  delete context_;
}

void Fibre::main(void* pointer) {
  auto* self = static_cast<Fibre*>(pointer);
#ifdef FASTLORA_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->context_->caller_stack,
                                  &self->context_->caller_bytes);
#endif
  self->body_();
  self->done_ = true;
  self->pause();  // for the last time
}

void Fibre::start(std::function<void()> body) {
  body_ = std::move(body);
  done_ = false;
#ifdef FASTLORA_ASAN
  __asan_unpoison_memory_region(stack_, kStackBytes);
  context_->fake_fibre = nullptr;
#endif
#if FASTLORA_SWITCH
  // As if the fibre had called fastlora_switch_stack: six registers, then where to return to. The
  // stack is 16-byte aligned before the call that never was.
  auto* top = reinterpret_cast<void**>(stack_ + kStackBytes) - 8;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(+[] { Fibre::main(g_starting); });
  top[7] = nullptr;
  context_->fibre = top;
#else
  getcontext(&context_->fibre);
  context_->fibre.uc_stack.ss_sp = stack_;
  context_->fibre.uc_stack.ss_size = kStackBytes;
  context_->fibre.uc_link = nullptr;
  makecontext(&context_->fibre, +[] { Fibre::main(g_starting); }, 0);
#endif
}

void Fibre::resume() {
  g_starting = this;
#ifdef FASTLORA_ASAN
  __sanitizer_start_switch_fiber(&context_->fake_caller, stack_, kStackBytes);
#endif
#if FASTLORA_SWITCH
  fastlora_switch_stack(&context_->caller, context_->fibre);
#else
  swapcontext(&context_->caller, &context_->fibre);
#endif
#ifdef FASTLORA_ASAN
  __sanitizer_finish_switch_fiber(context_->fake_caller, nullptr, nullptr);
#endif
}

void Fibre::pause() {
#ifdef FASTLORA_ASAN
  __sanitizer_start_switch_fiber(done_ ? nullptr : &context_->fake_fibre, context_->caller_stack,
                                 context_->caller_bytes);
#endif
#if FASTLORA_SWITCH
  fastlora_switch_stack(&context_->fibre, context_->caller);
#else
  swapcontext(&context_->fibre, &context_->caller);
#endif
#ifdef FASTLORA_ASAN
  __sanitizer_finish_switch_fiber(context_->fake_fibre, &context_->caller_stack,
                                  &context_->caller_bytes);
#endif
}

}  // namespace fastlora::emulator
