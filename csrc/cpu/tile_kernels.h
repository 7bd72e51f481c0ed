// The leaf kernels that an instruction set provides: packing, one blocked matrix product, the softmax epilogue.
//
// A mode says what the operands of the product are. `Unit` is what one step of the product's inner loop broadcasts:
// one number, or in Bf16Pairs two neighbouring bfloat16 numbers, which the processor multiplies and adds at once.
#pragma once

#include <cstdint>

namespace synpo {

struct RowKernels;

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A strided (rows, columns) view of an input; strides count elements.
struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
  Dtype dtype;
};

struct Float64 {
  using Acc = double;
  using Operand = double;
  using Unit = double;
};
struct Float32 {
  using Acc = float;
  using Operand = float;
  using Unit = float;
};
struct Bf16Pairs {
  using Acc = float;
  using Operand = uint16_t;
  using Unit = uint32_t;
};
template <class Mode>
constexpr int64_t kUnitSize = sizeof(typename Mode::Unit) / sizeof(typename Mode::Operand);

// What the epilogue does to one row's logits; see exp_row.
template <class Acc>
struct RowLaw {
  Acc logit_scale, softcap;
  bool raise;  // raise the reference where a logit passes it by more than kGuard
};
// The same guard as in vocab_passes.py: exp(40) is far from overflow in float32 and bfloat16.
constexpr double kGuard = 40.0;

template <class Mode>
struct TileKernels {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  using Unit = typename Mode::Unit;

  int64_t panel;  // columns of a packed panel

  // dst[i][j] = src[row + i][column + j], rounded to Operand, zero up to the next whole unit.
  void (*copy)(const Matrix& src, int64_t row, int64_t rows, int64_t column, int64_t columns, Operand* dst,
               int64_t dst_stride);
  // Panels of src^T: panel p holds, unit after unit along `depth` columns of src, rows [p * panel, (p + 1) * panel),
  // zero past `rows`.
  void (*pack_transposed)(const Matrix& src, int64_t row, int64_t rows, int64_t depth, Unit* panels);
  // Panels of row_scale * src: `depth` rows from `row`, `columns` columns from `column`. row_scale may be null.
  void (*pack)(const Matrix& src, int64_t row, int64_t depth, int64_t column, int64_t columns, const Acc* row_scale,
               Unit* panels);
  // dst = src^T in units: dst[t / unit][c], from src[t][c].
  void (*transpose_units)(const Operand* src, int64_t src_stride, int64_t rows, int64_t columns, Unit* dst,
                          int64_t dst_stride);
  // c[m][n] = (accumulate ? c : 0) + a @ panels; a's element (i, k) is a[i * a_row + k * a_unit]. The panels are
  // panel_stride units apart. `whole` promises that c may be written up to the end of its last panel.
  void (*multiply)(const Unit* a, int64_t a_row, int64_t a_unit, const Unit* panels, int64_t panel_stride,
                   int64_t units, Acc* c, int64_t c_stride, int64_t m, int64_t n, bool whole, bool accumulate);
  // In place, x -> exp(z - shift) * d for one row of raw products x (z and d as in vocab_passes.py), 0 at `excluded`
  // when 0 <= excluded < n and at the padding [n, padded). Sets the shift used and the sum of exp(z - shift).
  void (*exp_row)(Acc* x, int64_t n, int64_t padded, const Acc* bias, const RowLaw<Acc>& law, Acc reference,
                  int64_t excluded, Acc* shift, Acc* sum);
  // Rounds a row to Operand, or to any dtype.
  void (*store_operands)(const Acc* x, int64_t n, Operand* dst);
  void (*store_row)(const Acc* x, int64_t n, Dtype dtype, void* dst);
  // x *= factor
  void (*scale_operands)(Operand* x, int64_t n, Acc factor);
  void (*scale_row)(void* x, int64_t n, Dtype dtype, Acc factor);
  // out[j] -= sum_i coef[i] * x[i][j]
  void (*subtract_column_sums)(const Operand* x, int64_t x_stride, int64_t rows, int64_t columns, const Acc* coef,
                               Acc* out);
};

// One instruction set. `pairs` is null where bf16 x bf16 products have no instruction: bf16 is then widened.
struct Isa {
  const char* name;
  const TileKernels<Float64>* float64;
  const TileKernels<Float32>* float32;
  const TileKernels<Bf16Pairs>* pairs;
  const RowKernels* rows;
};

extern const Isa kPortable, kPortablePairs, kAvx2, kAvx2Pairs, kAvx512, kAvx512Bf16;

template <class Mode>
const TileKernels<Mode>* kernels_of(const Isa& isa);
template <>
inline const TileKernels<Float64>* kernels_of<Float64>(const Isa& isa) {
  return isa.float64;
}
template <>
inline const TileKernels<Float32>* kernels_of<Float32>(const Isa& isa) {
  return isa.float32;
}
template <>
inline const TileKernels<Bf16Pairs>* kernels_of<Bf16Pairs>(const Isa& isa) {
  return isa.pairs;
}

}  // namespace synpo
