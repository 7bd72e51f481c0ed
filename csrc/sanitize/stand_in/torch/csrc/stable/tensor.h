// What csrc/cpu uses of PyTorch's stable ABI, in a page of plain C++: sanitizers then see every allocation and every
// thread, and the kernels build for a processor that has no PyTorch here.
#pragma once

#include <cstdint>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#define STD_TORCH_CHECK(condition, ...) \
  do {                                  \
    if (!(condition)) torch::stable::fail(__VA_ARGS__); \
  } while (false)

namespace torch::headeronly {
enum class ScalarType { Byte, Long, Half, BFloat16, Float, Double };
}

namespace torch::stable {

using headeronly::ScalarType;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Memory of exactly its size, which a view shares.
class Tensor {
 public:
  Tensor(std::vector<int64_t> sizes, ScalarType dtype) : sizes_(std::move(sizes)), strides_(sizes_.size()), dtype_(dtype) {
    int64_t count = 1;
    for (int64_t i = dim() - 1; i >= 0; --i) {
      strides_[i] = count;
      count *= sizes_[i];
    }
    memory_ = std::shared_ptr<char[]>(new char[count * element_size()]());
  }
  // The columns of a matrix, each `step` apart from `first` on.
  Tensor columns(int64_t first, int64_t step, int64_t count) const {
    Tensor view = *this;
    view.offset_ += first * strides_[1];
    view.sizes_[1] = count;
    view.strides_[1] *= step;
    return view;
  }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  bool is_contiguous() const {
    int64_t count = 1;
    for (int64_t i = dim() - 1; i >= 0; count *= sizes_[i--])
      if (sizes_[i] != 1 && strides_[i] != count) return false;
    return true;
  }
  ScalarType scalar_type() const { return dtype_; }
  int64_t element_size() const {
    switch (dtype_) {
      case ScalarType::Byte:
        return 1;
      case ScalarType::Half:
      case ScalarType::BFloat16:
        return 2;
      case ScalarType::Float:
        return 4;
      case ScalarType::Long:
      case ScalarType::Double:
        break;
    }
    return 8;
  }
  const void* const_data_ptr() const { return memory_.get() + offset_ * element_size(); }
  void* mutable_data_ptr() const { return memory_.get() + offset_ * element_size(); }

 private:
  std::vector<int64_t> sizes_, strides_;
  ScalarType dtype_;
  int64_t offset_ = 0;
  std::shared_ptr<char[]> memory_;
};

}  // namespace torch::stable
