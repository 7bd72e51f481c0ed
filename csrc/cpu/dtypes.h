#pragma once

#include "tile_kernels.h"
#include "vocab_passes.h"

namespace synpo {

// The dtype of an input, or an error that names it.
inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Double:
      return Dtype::kFloat64;
    case torch::headeronly::ScalarType::Float:
      return Dtype::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace synpo
