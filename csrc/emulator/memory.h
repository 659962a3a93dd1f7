// The memory that a kernel may touch: its tensors and its block's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "fault.h"

namespace fastlora::emulator {

enum class Space { kAny, kGlobal, kShared };

struct Range {
  char* begin;
  char* end;
  std::string name;
  bool shared = false;
};

// The ranges of the running kernel, sorted by address.
class Memory {
 public:
  void add(Range range);
  void remove(const char* begin);
  void clear() { ranges_.clear(); }
  // Faults unless [p, p + bytes) lies within one range or on this thread's stack, and p is
  // aligned.
  void check(const void* p, size_t bytes, size_t alignment, const char* verb, Here here,
             Space space = Space::kAny) const;
  const Range* find(const void* p, size_t bytes) const;

 private:
  std::vector<Range> ranges_;
};

Memory& memory();

// Sometimes lets other threads run first: an update that is not atomic shows.
void preempt();
// The running thread is about to write there.
void note_writing(const void* p, size_t bytes, Here here);

// What every load and store helper asks.
template <class T>
const T* readable(const T* p, size_t count = 1, size_t alignment = alignof(T),
                  Here here = Here::current()) {
  memory().check(p, count * sizeof(T), alignment, "reads", here);
  preempt();
  return p;
}
template <class T>
T* writable(T* p, size_t count = 1, size_t alignment = alignof(T), Here here = Here::current()) {
  memory().check(p, count * sizeof(T), alignment, "writes", here);
  preempt();
  note_writing(p, count * sizeof(T), here);
  return p;
}

// Memory that AddressSanitizer shall stop at; nothing without it.
void forbid(const void* begin, size_t bytes);
void allow(const void* begin, size_t bytes);

}  // namespace fastlora::emulator
