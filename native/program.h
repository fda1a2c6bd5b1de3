// Calls of kernels that are recorded once and run many times: what Python would say in every layer of every step.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "bindings.h"

namespace harmonium {

// The calls between `begin` and `end` of the thread that records. They keep pointers: whoever records keeps the arrays,
// and their contents are what `run` works on.
class Program {
 public:
  void begin();
  void end();
  // All calls in their order, without the interpreter's lock. Raises what they raise.
  void run() const;
  std::int64_t size() const { return static_cast<std::int64_t>(calls_.size()); }

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  // What this thread records; null: nothing.
  static Program* current();

 private:
  std::vector<std::function<void()>> calls_;
};

// Do it now, without the interpreter's lock; or leave it to the program that this thread records. `work` is copied, so it
// must hold by value what it needs, and check what may have changed when it runs.
template <typename Work>
void perform(Work&& work) {
  if (Program* program = Program::current()) {
    program->add(std::forward<Work>(work));
    return;
  }
  nb::gil_scoped_release release;
  work();
}

}  // namespace harmonium
