// A fibre: a stack of its own that is entered and left by hand, one for each Metal thread of a threadgroup.
#pragma once
#include <cstddef>

namespace emulator {

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes `entry`, which must never return, what the next enter() starts.
  void prepare(void (*entry)());
  // Runs the fibre until it calls leave(). Called by the scheduler.
  void enter();
  // Goes back to the scheduler. Called on the fibre itself.
  void leave();

 private:
  char* mapping_;
  void* stack_pointer_ = nullptr;
};

}  // namespace emulator
