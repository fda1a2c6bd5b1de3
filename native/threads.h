// The one pool of threads. Every kernel that runs on several cores goes through parallel_for.
#pragma once

#include <cstdint>
#include <type_traits>

namespace harmonium {

// Number of threads that share a parallel_for, the caller included.
int num_threads();

// Make the pool use `count` threads, the caller included. Workers run on the `cores` if there are at least `count` of
// them (else anywhere), the caller where it likes. Nothing happens if that is so already. Else not to be called while
// kernels run: it frees their scratch.
void set_num_threads(int count, const int* cores, int num_cores);

// Function of a task: `task` in [0, num_tasks), `thread` in [0, num_threads()) for scratch that a thread owns.
using TaskFn = void (*)(void* context, std::int64_t task, int thread);

// Run fn for every task, tasks taken in order by whichever thread is free; returns when all are done. What a
// task computes must not depend on `thread` or on the number of threads: results are the same for any pool.
// Not re-entrant: a task does not call parallel_for.
void parallel_for(std::int64_t num_tasks, TaskFn fn, void* context);

// The same for a callable: parallel(n, [&](int64_t task, int thread) {...}).
template <typename F>
void parallel(std::int64_t num_tasks, F&& f) {
  using Fn = typename std::remove_reference<F>::type;
  parallel_for(
      num_tasks, [](void* c, std::int64_t task, int thread) { (*static_cast<Fn*>(c))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Scratch of at least `bytes` bytes, 64-byte aligned, owned by thread `thread` of the pool and kept between calls;
// contents are undefined. `slot` (0 to 7) tells independent buffers apart. Grows by replacing, so pointers from
// an earlier call with the same thread and slot are dead. Returns nullptr when memory is out.
void* thread_scratch(int thread, int slot, std::int64_t bytes);

}  // namespace harmonium
