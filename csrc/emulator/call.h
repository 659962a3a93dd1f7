// One call of an operator's C++ entry on the emulator. Its kernels see copies of its tensors
// between red zones, never the tensors, and run several times under different Runs; all bits must
// agree.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../tensor.h"
#include "block.h"

namespace fastlora::emulator {

enum class Role {
  kIn,      // read; a changed byte is a fault
  kOut,     // written as a whole; what it held must not matter
  kInOut,   // read and written
  kScratch  // written, then read by later kernels; the result is not looked at
};

class Call {
 public:
  // `runs` ways of execution, the first ones the extremes, the others drawn from `seed`.
  Call(const char* op, int runs, uint64_t seed);

  void add(std::string name, TensorView& view, Role role);
  // Runs `entry`, which reads the added views, on copies; then writes the results back. Throws
  // Fault, or what `entry` throws, and has changed no tensor then.
  void run(const std::function<void()>& entry);

  // What `launch` calls.
  void launch(Launch& l, bool dependent);

 private:
  struct Argument {
    std::string name;
    TensorView* view;
    Role role;
    char* begin;
    size_t bytes, element;  // that it spans, that one element has
    size_t span;            // which of the spans holds it
  };
  struct Span {  // tensors that overlap share one
    char* begin;
    size_t bytes;
    std::vector<char> memory;   // with red zones
    char* copy = nullptr;       // what stands for `begin` in `memory`
    std::vector<char> mine;     // 1: a byte of an output's element
    std::vector<char> ignored;  // 1: scratch alone
    std::vector<char> result;   // of the first run
    std::string name;
  };
  void find_spans();
  void prepare(const Run& run);
  void one(const Run& run, const std::function<void()>& entry);
  void check(const Run& run);
  void compare(const Run& run);
  [[noreturn]] void differ(const Run& run, size_t span, size_t byte);
  void for_each_element(const Argument& a, const std::function<void(size_t)>& f) const;

  std::string op_;
  std::vector<Run> runs_;
  std::vector<Argument> arguments_;
  std::vector<Span> spans_;
  std::vector<std::vector<char>> before_;  // of the last kernel, for a dependent one after it
  std::vector<std::string> kernels_;       // launched in this run, in order
  const Run* run_ = nullptr;
  uint64_t launches_ = 0;
};

Call& current_call();

// The names of the kernels that the last call launched, in order.
const std::vector<std::string>& launches();

// The compute capability of the emulated GPU, 90 for 9.0.
int capability();
void set_capability(int value);

// More than 48 KB of shared memory, static and dynamic, have to be allowed for a kernel before its
// launch.
void allow_shared_memory(const void* kernel, size_t bytes);
bool shared_memory_allowed(const void* kernel, size_t bytes);

}  // namespace fastlora::emulator
