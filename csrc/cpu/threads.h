// Tasks on PyTorch's threads, and scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "interrupts.h"

namespace synpo {

inline int64_t thread_count() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// `count` independent pieces of work: run(i, worker) for i in [0, count). It must not throw, and what it computes must
// not depend on the worker.
template <class Run>
struct Tasks {
  int64_t count;
  Run run;
};
template <class Run>
Tasks(int64_t, Run) -> Tasks<Run>;

// Runs all tasks of some kinds together, on at most `workers` threads with one barrier at the end. A worker
// (0 <= worker < workers) takes the next free task, so a slow core holds nobody up. Inside another parallel region
// everything runs on the calling thread. False when interrupted() left tasks undone: the op is then to return at once.
template <class... Run>
bool run_tasks(int64_t workers, const Tasks<Run>&... kinds) {
  const int64_t total = (kinds.count + ...);
  std::atomic<int64_t> next{0};
  std::atomic<bool> whole{true};
  torch::stable::parallel_for(0, std::min(total, workers), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < total; i = next++) {
        if (interrupted()) {
          whole = false;
          next = total;
          break;
        }
        int64_t first = 0;
        ((i >= first && i < first + kinds.count ? kinds.run(i - first, worker) : void(), first += kinds.count), ...);
      }
    }
  });
  return whole;
}

template <class Run>
bool run_tasks(int64_t workers, int64_t count, const Run& run) {
  return run_tasks(workers, Tasks<const Run&>{count, run});
}

// Uninitialised memory on a cache line's border.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count > 0 ? static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})) : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace synpo
