#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace harmonium {

namespace {

// A worker spins this many pauses (about half a millisecond, longer than what lies between two kernels of a step)
// before it sleeps: to wake one takes as long as a small kernel.
constexpr int kSpins = 20000;
constexpr int kSlots = 8;
constexpr std::int64_t kHugePage = 2 << 20;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

struct Scratch {
  void* data = nullptr;
  std::int64_t bytes = 0;
};

struct Pool {
  std::vector<std::thread> workers;
  std::vector<Scratch> scratch;  // [thread * kSlots + slot]
  int count = 1;
  std::vector<int> cores;

  std::mutex job_mutex;
  std::mutex mutex;
  std::condition_variable wake;

  // A job's number (high half), whether it may still be joined (kOpen), and how many workers are in it. A worker
  // that wakes late finds the job closed and is not waited for: on a busy machine a worker may get no core for
  // milliseconds, longer than most jobs take.
  alignas(64) std::atomic<std::uint64_t> state{0};
  alignas(64) std::atomic<std::int64_t> next{0};  // next task to take
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  // Written only while no job is open and no worker in one.
  TaskFn fn = nullptr;
  void* context = nullptr;
  std::int64_t num_tasks = 0;

  static constexpr std::uint64_t kOpen = std::uint64_t{1} << 31;
  static std::uint64_t number(std::uint64_t s) { return s >> 32; }

  void run(int thread) {
    for (;;) {
      const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      fn(context, task, thread);
    }
  }

  // Returns the state once its number is no longer `seen`.
  std::uint64_t wait_for_job(std::uint64_t seen) {
    const auto is_new = [&] { return number(state.load(std::memory_order_acquire)) != seen; };
    for (int i = 0; i < kSpins && !is_new(); ++i) pause();
    if (!is_new()) {
      std::unique_lock<std::mutex> lock(mutex);
      sleeping.fetch_add(1, std::memory_order_seq_cst);
      wake.wait(lock, [&] { return number(state.load(std::memory_order_seq_cst)) != seen; });
      sleeping.fetch_sub(1, std::memory_order_relaxed);
    }
    return state.load(std::memory_order_acquire);
  }

  void work(int thread) {
    std::uint64_t seen = 0;
    for (;;) {
      std::uint64_t s = wait_for_job(seen);
      seen = number(s);
      if (stop.load(std::memory_order_acquire)) return;
      while ((s & kOpen) && number(s) == seen) {
        if (!state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        run(thread);
        state.fetch_sub(1, std::memory_order_release);
        break;
      }
    }
  }

  // A new number; to be joined if `open`.
  void announce(bool open) {
    const std::uint64_t s = state.load(std::memory_order_relaxed);
    state.store((number(s) + 1) << 32 | (open ? kOpen : 0), std::memory_order_seq_cst);
    if (sleeping.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
  }

  // No more workers join; wait for those that did.
  void finish() {
    std::uint64_t s = state.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int i = 0; (s & (kOpen - 1)) != 0; ++i) {
      if (i < kSpins) pause();
      else std::this_thread::yield();
      s = state.load(std::memory_order_acquire);
    }
  }

  void halt() {
    if (!workers.empty()) {
      stop.store(true, std::memory_order_release);
      announce(false);
      for (auto& worker : workers) worker.join();
      workers.clear();
      stop.store(false);
      state.store(0);
    }
    for (auto& s : scratch) std::free(s.data);
    scratch.clear();
  }
};

// Never destroyed: worker threads may outlive static destructors at interpreter exit.
Pool& pool() {
  static Pool* p = [] {
    auto* made = new Pool;
    made->scratch.resize(kSlots);
    // A child of fork has no workers: it starts with a pool of one.
    pthread_atfork(nullptr, nullptr, [] {
      Pool& mine = pool();
      for (auto& worker : mine.workers) worker.detach();
      new (&mine) Pool;
      mine.scratch.resize(kSlots);
    });
    return made;
  }();
  return *p;
}

// To any of the cores, not to one each: the caller is a thread like any other, and while a worker sleeps it may have
// moved to that worker's core. Bound to it, the worker then shares it with the caller for milliseconds of a step, until
// the system moves the caller away.
void keep_to(std::thread& worker, const int* cores, int num_cores) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int i = 0; i < num_cores; ++i) CPU_SET(cores[i], &set);
  pthread_setaffinity_np(worker.native_handle(), sizeof set, &set);  // best effort: refused cores are not an error
#else
  (void)worker, (void)cores, (void)num_cores;
#endif
}

}  // namespace

int num_threads() { return pool().count; }

void set_num_threads(int count, const int* cores, int num_cores) {
  Pool& p = pool();
  std::lock_guard<std::mutex> one_job(p.job_mutex);
  std::vector<int> wanted(cores, cores + num_cores);
  if (p.count == count && p.cores == wanted) return;
  p.halt();
  p.count = count;
  p.cores = std::move(wanted);
  p.scratch.resize(static_cast<std::size_t>(count) * kSlots);
  for (int i = 1; i < count; ++i) {
    p.workers.emplace_back([&p, i] { p.work(i); });
    if (count <= num_cores) keep_to(p.workers.back(), cores, num_cores);
  }
}

void parallel_for(std::int64_t num_tasks, TaskFn fn, void* context) {
  Pool& p = pool();
  // Python threads may call kernels at the same time (bindings release the GIL): one job at a time.
  std::lock_guard<std::mutex> one_job(p.job_mutex);
  if (p.count == 1 || num_tasks <= 1) {
    for (std::int64_t task = 0; task < num_tasks; ++task) fn(context, task, 0);
    return;
  }
  p.fn = fn;
  p.context = context;
  p.num_tasks = num_tasks;
  p.next.store(0, std::memory_order_relaxed);
  p.announce(true);
  p.run(0);
  p.finish();
}

void* thread_scratch(int thread, int slot, std::int64_t bytes) {
  Scratch& s = pool().scratch[static_cast<std::size_t>(thread) * kSlots + slot];
  if (s.bytes < bytes) {
    std::free(s.data);
    const std::int64_t align = bytes >= kHugePage ? kHugePage : 64;
    const std::int64_t size = (bytes + align - 1) / align * align;
    s.data = std::aligned_alloc(align, size);
    s.bytes = s.data ? size : 0;
#if defined(__linux__)
    if (s.data && align == kHugePage) madvise(s.data, size, MADV_HUGEPAGE);
#endif
  }
  return s.data;
}

}  // namespace harmonium
