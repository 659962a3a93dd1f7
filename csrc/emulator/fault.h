// What the emulator says when a kernel does what a GPU would not forgive, or not always.
#pragma once

#include <stdexcept>
#include <string>

namespace fastlora::emulator {

// A place in the source: the default argument of whatever wants to know its caller.
struct Here {
  const char* file;
  int line;
  static constexpr Here current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Here& other) const {
    return line == other.line && std::string(file) == other.file;
  }
  bool operator!=(const Here& other) const { return !(*this == other); }
};

std::string describe(Here here);  // "lora_linear.cu:90"

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws Fault: kernel, block and thread that are running, what, where.
[[noreturn]] void fail(const std::string& what, Here here);

}  // namespace fastlora::emulator
