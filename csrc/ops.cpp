// Every native op on one page. The schemas are defined in Python, beside the op's definition and its plain PyTorch
// kernel (synpo_kernels/vocab_passes.py, contrastive.py); here the CPU key gets a faster kernel for each. Only PyTorch's stable ABI is
// used: one binary serves every torch >= 2.10 and every Python.
#include <torch/csrc/stable/library.h>

#include "cpu/contrastive.h"
#include "cpu/vocab_passes.h"

STABLE_TORCH_LIBRARY_IMPL(synpo, CPU, m) {
  // softmax_sums(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor target_logits, float logit_scale,
  //              float softcap, bool weighted, int workspace_mb) -> (Tensor shift, Tensor sums, Tensor product)
  m.impl("softmax_sums", TORCH_BOX(&synpo::softmax_sums));
  // softmax_grads(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor log_norm, Tensor coef,
  //               float logit_scale, float softcap, Tensor(a!) grad_weight, Tensor(b!)? grad_bias, bool weighted,
  //               int workspace_mb) -> Tensor product
  m.impl("softmax_grads", TORCH_BOX(&synpo::softmax_grads));
  // softmax_store(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor target_logits, float logit_scale,
  //               float softcap, Tensor(a!) tile) -> (Tensor shift, Tensor sums)
  m.impl("softmax_store", TORCH_BOX(&synpo::softmax_store));
  // tile_grads(Tensor tile, Tensor hidden, Tensor weight, Tensor coef, Tensor(a!)? grad_weight,
  //            Tensor(b!)? grad_bias, bool weighted) -> Tensor product
  m.impl("tile_grads", TORCH_BOX(&synpo::tile_grads));
  // contrastive_logits(Tensor logits, Tensor contrast, float alpha, float plausibility) -> Tensor
  m.impl("contrastive_logits", TORCH_BOX(&synpo::contrastive_logits));
  // contrastive_sample(Tensor logits, Tensor? contrast, Tensor seeds, SymInt step, float alpha, float plausibility,
  //                    float temperature, int top_k, float top_p)
  //     -> (Tensor tokens, Tensor logps, Tensor model_logps, Tensor status)
  m.impl("contrastive_sample", TORCH_BOX(&synpo::contrastive_sample));
}
