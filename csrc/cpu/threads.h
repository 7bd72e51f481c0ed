// Tasks on PyTorch's threads, and scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace synpo {

inline int64_t thread_count() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Runs task(i, worker) for every i in [0, count), each once, on at most `workers` threads. A worker (0 <= worker <
// workers) takes the next free task, so a slow core holds nobody up; results must not depend on who runs a task.
// task must not throw. Inside another parallel region everything runs on the calling thread.
template <class Task>
void run_tasks(int64_t workers, int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, workers), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next++; i < count; i = next++) task(i, worker);
  });
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
