// The leaf kernels of contrastive.cpp that an instruction set provides: parts of one row of logits, in both views.
#pragma once

#include <cstdint>

#include "tile_kernels.h"

namespace synpo {

// Blocks are the unit of work and of summation: their sums are added in order, so that no result depends on who ran
// what. Groups are the unit of looking again: a group whose largest number is too small is never read twice.
constexpr int64_t kBlock = 2048, kGroup = 128;

// A row: neighbouring tokens lie side by side. `contrast` is null when there is one view.
struct Row {
  const void* logits;
  const void* contrast;
  Dtype dtype;
};

// c = plus * l - alpha * l' (c = l with one view); -inf where l < floor and where either view is -inf.
struct Combination {
  float plus, alpha, floor;
};

// What a block adds to the softmax of l, and to that of c * scale: sums of exp(x - top).
struct BlockSums {
  float l_top, l_sum, c_top, c_sum;
  bool finite;  // no NaN and no +inf in l, nor in l' and c where c > -inf
};

struct RowKernels {
  // c[0..count) for tokens [begin, begin + count), count <= kBlock, rounded as the scalar expression is (no fused
  // multiply-add), and -inf up to the next whole group. Returns BlockSums::finite.
  bool (*combine)(const Row& row, const Combination& law, int64_t begin, int64_t count, float* c);
  // The sums of a block, and the largest c of each of its groups, without a floor. scale = 0: c_sum is not wanted.
  void (*scan)(const Row& row, const Combination& law, int64_t begin, int64_t count, float scale, BlockSums* sums,
               float* group_tops);
  // x = exp((x - top) * scale) in place, x <= top; 0 for -inf. count is a multiple of 16.
  void (*weights)(float* x, int64_t count, float top, float scale);
};

}  // namespace synpo
