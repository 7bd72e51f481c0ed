// The four inner ops of vocab_passes.py on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace synpo {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> softmax_sums(const Tensor& hidden, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const Tensor& targets,
                                                const Tensor& target_logits, double logit_scale, double softcap,
                                                bool weighted, int64_t workspace_mb);

Tensor softmax_grads(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& targets, const Tensor& log_norm, const Tensor& coef, double logit_scale,
                     double softcap, const Tensor& grad_weight, const std::optional<Tensor>& grad_bias, bool weighted,
                     int64_t workspace_mb);

std::tuple<Tensor, Tensor> softmax_store(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const Tensor& targets, const Tensor& target_logits, double logit_scale,
                                         double softcap, const Tensor& tile);

Tensor tile_grads(const Tensor& tile, const Tensor& hidden, const Tensor& weight, const Tensor& coef,
                  const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias, bool weighted);

}  // namespace synpo
