// Fibres: stacks of their own that are switched by hand, one for each thread of a block.
#pragma once

#include <cstddef>
#include <functional>

namespace fastlora::emulator {

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The next `resume` begins with `body`, whatever an earlier one left unfinished. `body` must not
  // throw.
  void start(std::function<void()> body);
  // Runs the fibre until it calls `pause` or ends. Not to be called on a fibre.
  void resume();
  // Back to where `resume` was called; to be called on this fibre.
  void pause();
  bool done() const { return done_; }

  // The memory of its stack, for a poison that uninitialised locals may show.
  char* stack() const { return stack_; }
  static size_t stack_bytes();

 private:
  struct Context;
  static void main(void* self);

  std::function<void()> body_;
  bool done_ = true;
  char* stack_ = nullptr;
  Context* context_ = nullptr;
};

}  // namespace fastlora::emulator
