// The ops of the stable ABI that csrc/cpu uses; see tensor.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <thread>

namespace torch::stable {

inline Tensor new_zeros(const Tensor&, std::vector<int64_t> sizes, ScalarType dtype) { return {std::move(sizes), dtype}; }

inline std::atomic<uint32_t> num_threads{1};
inline uint32_t get_num_threads() { return num_threads; }

// Splits [begin, end) evenly over threads, the caller's among them, as at::parallel_for does.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  const int64_t most = (end - begin + grain_size - 1) / grain_size;
  const int64_t workers = std::min<int64_t>(num_threads, most);
  if (workers <= 0) return;
  const int64_t part = (end - begin + workers - 1) / workers;
  std::vector<std::thread> others;
  for (int64_t from = begin + part; from < end; from += part)
    others.emplace_back([&f, from, end, part] { f(from, std::min(end, from + part)); });
  f(begin, std::min(end, begin + part));
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
