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
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace harmonium {

namespace {

// A worker spins this many pauses (about 50 microseconds: the gap between two kernels of a step) before it sleeps.
constexpr int kSpins = 2000;
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

  std::mutex job_mutex;
  std::mutex mutex;
  std::condition_variable wake;
  bool stop = false;

  alignas(64) std::atomic<std::uint64_t> epoch{0};   // a new value is a new job (or stop)
  alignas(64) std::atomic<std::int64_t> next{0};     // next task to take
  alignas(64) std::atomic<int> busy{0};              // workers that have not finished this job
  alignas(64) std::atomic<int> sleeping{0};
  TaskFn fn = nullptr;
  void* context = nullptr;
  std::int64_t num_tasks = 0;

  void run(int thread) {
    for (;;) {
      const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      fn(context, task, thread);
    }
  }

  void work(int thread) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && epoch.load(std::memory_order_acquire) == seen; ++i) pause();
      if (epoch.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return epoch.load(std::memory_order_acquire) != seen; });
        sleeping.fetch_sub(1);
      }
      seen = epoch.load(std::memory_order_acquire);
      if (stop) return;
      run(thread);
      busy.fetch_sub(1, std::memory_order_release);
    }
  }

  void announce() {
    epoch.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
  }

  void halt() {
    if (!workers.empty()) {
      {
        std::lock_guard<std::mutex> lock(mutex);
        stop = true;
      }
      epoch.fetch_add(1);
      wake.notify_all();
      for (auto& worker : workers) worker.join();
      workers.clear();
      stop = false;
      epoch.store(0);
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

void pin(std::thread& worker, int core) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(worker.native_handle(), sizeof set, &set);  // best effort: refused cores are not an error
#else
  (void)worker, (void)core;
#endif
}

}  // namespace

int num_threads() { return pool().count; }

void set_num_threads(int count, const int* cores, int num_cores) {
  Pool& p = pool();
  p.halt();
  p.count = count;
  p.scratch.resize(static_cast<std::size_t>(count) * kSlots);
  for (int i = 1; i < count; ++i) {
    p.workers.emplace_back([&p, i] { p.work(i); });
    if (count <= num_cores) pin(p.workers.back(), cores[i]);
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
  p.busy.store(p.count - 1, std::memory_order_relaxed);
  p.announce();
  p.run(0);
  for (int i = 0; p.busy.load(std::memory_order_acquire) != 0; ++i) {
    if (i < kSpins) pause();
    else std::this_thread::yield();
  }
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
