// The two ops of contrastive.py on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace synpo {

using torch::stable::Tensor;

Tensor contrastive_logits(const Tensor& logits, const Tensor& contrast, double alpha, double plausibility);

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_sample(const Tensor& logits,
                                                              const std::optional<Tensor>& contrast,
                                                              const Tensor& seeds, int64_t step, double alpha,
                                                              double plausibility, double temperature, int64_t top_k,
                                                              double top_p);

}  // namespace synpo
