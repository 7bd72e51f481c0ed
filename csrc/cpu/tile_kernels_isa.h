// The leaf kernels of tile_kernels.h, written once for any vector width. Each isa_*.cpp includes this file after
// choosing its target, so everything has internal linkage (see vector.h).
//
// The product follows the usual blocking: a micro-tile of M rows x NV vectors stays in registers, a panel of kDepth
// units in the first-level cache, kRows rows of `a` in the second.
#pragma once

#include "tile_kernels.h"
#include "vector.h"

namespace synpo {
namespace {

constexpr int64_t kRows = 96, kDepth = 256;

struct BFloat16 {
  uint16_t raw;
};
struct Float16 {
  uint16_t raw;
};
template <class Acc>
inline Acc widen(double x) {
  return static_cast<Acc>(x);
}
template <class Acc>
inline Acc widen(float x) {
  return x;
}
template <class Acc>
inline Acc widen(BFloat16 x) {
  return from_bfloat16(x.raw);
}
template <class Acc>
inline Acc widen(Float16 x) {
  return from_float16(x.raw);
}
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, double& out) { out = x; }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, float& out) { out = static_cast<float>(x); }
inline void narrow(float x, uint16_t& out) { out = to_bfloat16(x); }
inline void narrow(double x, uint16_t& out) { out = to_bfloat16(static_cast<float>(x)); }

template <class F>
inline void with_source(Dtype dtype, const void* data, F f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(static_cast<const double*>(data));
    case Dtype::kFloat32:
      return f(static_cast<const float*>(data));
    case Dtype::kBFloat16:
      return f(static_cast<const BFloat16*>(data));
    case Dtype::kFloat16:
      return f(static_cast<const Float16*>(data));
  }
}

template <class Acc, class T, class Operand>
inline void convert_row(const T* src, int64_t stride, int64_t n, Acc scale, Operand* dst) {
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) narrow(widen<Acc>(src[j]) * scale, dst[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) narrow(widen<Acc>(src[j * stride]) * scale, dst[j]);
  }
}

// The inner step of the product: acc += a * b on all lanes.
template <class Mode, int Bytes>
struct MultiplyAdd {
  using Vec = typename Simd<typename Mode::Acc, Bytes>::Vec;
  using Packed = Vec;
  static Vec step(Vec acc, typename Mode::Unit a, Packed b) { return acc + b * a; }
};

// Two bfloat16 products per lane in float32 arithmetic. It stands in for the processor's instruction where that does
// not exist, so that the packing of pairs is tested everywhere.
template <int Bytes>
struct MultiplyAdd<Bf16Pairs, Bytes> {
  using Vec = typename Simd<float, Bytes>::Vec;
  typedef uint32_t Packed __attribute__((vector_size(Bytes), may_alias));
  static Vec step(Vec acc, uint32_t a, Packed b) {
    acc = acc + bits<Vec>(b << 16) * bits<float>(a << 16);
    return acc + bits<Vec>(b & 0xffff0000u) * bits<float>(a & 0xffff0000u);
  }
};

// dst[k][v] = src[v][k] for 8 x 8 numbers of 32 bits.
inline void transpose_8x8(const uint32_t* src, int64_t src_stride, uint32_t* dst, int64_t dst_stride) {
  typedef uint32_t V __attribute__((vector_size(32), may_alias));
  V r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = load<V>(src + i * src_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(dst + i * dst_stride, __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    store(dst + (i + 4) * dst_stride, __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

template <class Unit>
inline void transpose_block(const Unit* src, int64_t src_stride, int64_t rows, int64_t columns, Unit* dst,
                            int64_t dst_stride) {
  int64_t whole = 0;
  if constexpr (sizeof(Unit) == 4) {
    whole = columns & ~int64_t{7};
    const auto* from = reinterpret_cast<const uint32_t*>(src);
    auto* to = reinterpret_cast<uint32_t*>(dst);
    for (int64_t k = 0; k < whole; k += 8)
      for (int64_t v = 0; v < rows; v += 8)
        transpose_8x8(from + v * src_stride + k, src_stride, to + k * dst_stride + v, dst_stride);
  }
  for (int64_t k = whole; k < columns; ++k)
    for (int64_t v = 0; v < rows; ++v) dst[k * dst_stride + v] = src[v * src_stride + k];
}

template <class Mode, int Bytes, int M, int NV, class Step = MultiplyAdd<Mode, Bytes>>
struct Kernels {
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  using Unit = typename Mode::Unit;
  using Vec = typename Simd<Acc, Bytes>::Vec;
  using Int = typename Simd<Acc, Bytes>::Int;
  static constexpr int64_t kLanes = Bytes / sizeof(Acc);
  static constexpr int64_t kPanel = NV * kLanes;
  static constexpr int64_t kUnit = kUnitSize<Mode>;
  static_assert(kPanel % 8 == 0, "transpose_block works on 8 x 8 blocks");

  static void copy(const Matrix& src, int64_t row, int64_t rows, int64_t column, int64_t columns, Operand* dst,
                   int64_t dst_stride) {
    with_source(src.dtype, src.data, [&](const auto* data) {
      for (int64_t i = 0; i < rows; ++i) {
        Operand* out = dst + i * dst_stride;
        convert_row<Acc>(data + (row + i) * src.row_stride + column * src.column_stride, src.column_stride, columns,
                         Acc(1), out);
        if (columns % kUnit) out[columns] = Operand{};
      }
    });
  }

  static void pack_transposed(const Matrix& src, int64_t row, int64_t rows, int64_t depth, Unit* panels) {
    constexpr int64_t kChunk = 64;  // units staged at a time: panel rows x 64 units stay in the first-level cache
    constexpr int64_t kStaged = (kChunk + 8) * kUnit;
    alignas(64) Operand staged[kPanel * kStaged];
    const int64_t units = (depth + kUnit - 1) / kUnit;
    const bool direct = src.dtype == kOperandDtype && src.column_stride == 1 && src.row_stride % kUnit == 0 &&
                        depth % kUnit == 0 && reinterpret_cast<uintptr_t>(src.data) % sizeof(Unit) == 0;
    for (int64_t v = 0; v < rows; v += kPanel, panels += units * kPanel) {
      const int64_t count = rows - v < kPanel ? rows - v : kPanel;
      if (direct && count == kPanel) {
        const Operand* from = static_cast<const Operand*>(src.data) + (row + v) * src.row_stride;
        transpose_block(reinterpret_cast<const Unit*>(from), src.row_stride / kUnit, kPanel, units, panels, kPanel);
        continue;
      }
      std::memset(staged, 0, sizeof staged);
      for (int64_t u = 0; u < units; u += kChunk) {
        const int64_t part = units - u < kChunk ? units - u : kChunk;
        const int64_t from = u * kUnit;
        const int64_t numbers = depth - from < part * kUnit ? depth - from : part * kUnit;
        copy(src, row + v, count, from, numbers, staged, kStaged);
        transpose_block(reinterpret_cast<const Unit*>(staged), kStaged / kUnit, kPanel, part, panels + u * kPanel,
                        kPanel);
      }
    }
  }

  static void pack(const Matrix& src, int64_t row, int64_t depth, int64_t column, int64_t columns,
                   const Acc* row_scale, Unit* panels) {
    const int64_t units = (depth + kUnit - 1) / kUnit;
    constexpr int64_t kBlock = 8;  // rows read together: sequential reads, and writes of 8 vectors at a place
    with_source(src.dtype, src.data, [&](const auto* data) {
      for (int64_t u0 = 0; u0 < units; u0 += kBlock) {
        const int64_t u1 = units - u0 < kBlock ? units : u0 + kBlock;
        for (int64_t c = 0; c < columns; c += kPanel) {
          const int64_t count = columns - c < kPanel ? columns - c : kPanel;
          for (int64_t u = u0; u < u1; ++u) {
            alignas(64) Operand numbers[kUnit][kPanel];
            if (count < kPanel || depth % kUnit) std::memset(numbers, 0, sizeof numbers);
            for (int64_t half = 0; half < kUnit && u * kUnit + half < depth; ++half) {
              const int64_t k = u * kUnit + half;
              const auto* from = data + (row + k) * src.row_stride + (column + c) * src.column_stride;
              const Acc scale = row_scale ? row_scale[k] : Acc(1);
              // The full panel has a constant length, which the compiler unrolls.
              if (count == kPanel)
                convert_row<Acc>(from, src.column_stride, kPanel, scale, numbers[half]);
              else
                convert_row<Acc>(from, src.column_stride, count, scale, numbers[half]);
            }
            Unit* out = panels + c * units + u * kPanel;
            if constexpr (kUnit == 1) {
              std::memcpy(out, numbers, sizeof numbers);
            } else {
              for (int64_t j = 0; j < kPanel; ++j)
                out[j] = static_cast<Unit>(numbers[0][j]) | static_cast<Unit>(numbers[1][j]) << 16;
            }
          }
        }
      }
    });
  }

  static void transpose_units(const Operand* src, int64_t src_stride, int64_t rows, int64_t columns, Unit* dst,
                              int64_t dst_stride) {
    for (int64_t t = 0; t < rows; t += kUnit) {
      Unit* out = dst + t / kUnit * dst_stride;
      const Operand* first = src + t * src_stride;
      if constexpr (kUnit == 1) {
        std::memcpy(out, first, columns * sizeof(Unit));
      } else {
        const bool second = t + 1 < rows;
        for (int64_t c = 0; c < columns; ++c)
          out[c] = first[c] | (second ? static_cast<Unit>(first[src_stride + c]) << 16 : 0u);
      }
    }
  }

  template <int R>
  static void micro_tile(const Unit* a, int64_t a_row, int64_t a_unit, const Unit* b, int64_t units, Acc* c,
                         int64_t c_stride, int64_t columns, bool accumulate) {
    using Packed = typename Step::Packed;
    Vec acc[R][NV];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
    for (int64_t k = 0; k < units; ++k) {
      Packed p[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) p[j] = *reinterpret_cast<const Packed*>(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Unit x = a[i * a_row];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] = Step::step(acc[i][j], x, p[j]);
      }
      a += a_unit;
      b += kPanel;
    }
    if (columns >= kPanel) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
          Acc* out = c + i * c_stride + j * kLanes;
          store(out, accumulate ? load<Vec>(out) + acc[i][j] : acc[i][j]);
        }
    } else {
      for (int i = 0; i < R; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          Acc& out = c[i * c_stride + j];
          const Acc value = acc[i][j / kLanes][j % kLanes];
          out = accumulate ? out + value : value;
        }
    }
  }

  template <int R>
  static void micro_rows(int64_t rows, const Unit* a, int64_t a_row, int64_t a_unit, const Unit* b, int64_t units,
                         Acc* c, int64_t c_stride, int64_t columns, bool accumulate) {
    if (rows == R) return micro_tile<R>(a, a_row, a_unit, b, units, c, c_stride, columns, accumulate);
    if constexpr (R > 1) micro_rows<R - 1>(rows, a, a_row, a_unit, b, units, c, c_stride, columns, accumulate);
  }

  static void multiply(const Unit* a, int64_t a_row, int64_t a_unit, const Unit* panels, int64_t panel_stride,
                       int64_t units, Acc* c, int64_t c_stride, int64_t m, int64_t n, bool whole, bool accumulate) {
    // Even chunks, so that a depth just above kDepth does not end in a sliver; one, of nothing, that still writes c.
    const int64_t chunks = units > 0 ? (units + kDepth - 1) / kDepth : 1, depth = (units + chunks - 1) / chunks;
    for (int64_t chunk = 0, k = 0; chunk < chunks; ++chunk, k += depth) {
      const int64_t part = units - k < depth ? units - k : depth;
      for (int64_t i0 = 0; i0 < m; i0 += kRows) {
        const int64_t i1 = m - i0 < kRows ? m : i0 + kRows;
        for (int64_t j = 0; j < n; j += kPanel) {
          const Unit* b = panels + j / kPanel * panel_stride + k * kPanel;
          for (int64_t i = i0; i < i1; i += M) {
            micro_rows<M>(i1 - i < M ? i1 - i : M, a + i * a_row + k * a_unit, a_row, a_unit, b, part,
                          c + i * c_stride + j, c_stride, whole ? kPanel : n - j, accumulate || k > 0);
          }
        }
      }
    }
  }

  static void exp_row(Acc* x, int64_t n, int64_t padded, const Acc* bias, const RowLaw<Acc>& law, Acc reference,
                      int64_t excluded, Acc* shift, Acc* sum) {
    const Acc inverse_cap = law.softcap > 0 ? 1 / law.softcap : 0;
    if (bias || law.logit_scale != 1 || law.softcap > 0) {
      for (int64_t j = 0; j < padded; j += kLanes) {
        Vec z = load<Vec>(x + j);
        if (bias) z += load<Vec>(bias + j);
        z *= law.logit_scale;
        if (law.softcap > 0) z = law.softcap * vector_tanh<Bytes>(z * inverse_cap);
        store(x + j, z);
      }
    }
    const Acc nothing = -static_cast<Acc>(__builtin_inf());
    for (int64_t j = n; j < padded; ++j) x[j] = nothing;
    const bool excludes = excluded >= 0 && excluded < n;
    if (excludes) x[excluded] = nothing;
    if (law.raise) {
      Vec top = Vec{} + nothing;
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec z = load<Vec>(x + j);
        top = select<Int>(z > top, z, top);
      }
      Acc highest = nothing;
      for (int64_t j = 0; j < kLanes; ++j) highest = top[j] > highest ? top[j] : highest;
      if (highest - reference > static_cast<Acc>(kGuard)) reference = highest;
    }
    Vec total = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec z = load<Vec>(x + j);
      const Vec e = vector_exp<Bytes>(z - reference);
      total += e;
      if (law.softcap > 0) {
        const Vec t = z * inverse_cap;
        store(x + j, e * (law.logit_scale - law.logit_scale * (t * t)));
      } else {
        store(x + j, e * law.logit_scale);
      }
    }
    // 0 * d is NaN where z is -inf and a softcap makes d infinite.
    for (int64_t j = n; j < padded; ++j) x[j] = 0;
    if (excludes) x[excluded] = 0;
    Acc s = 0;
    for (int64_t j = 0; j < kLanes; ++j) s += total[j];
    *shift = reference;
    *sum = s;
  }

  static void store_operands(const Acc* x, int64_t n, Operand* dst) { convert_row<Acc>(x, 1, n, Acc(1), dst); }

  static void store_row(const Acc* x, int64_t n, Dtype dtype, void* dst) {
    if (dtype == Dtype::kFloat64) {
      convert_row<Acc>(x, 1, n, Acc(1), static_cast<double*>(dst));
    } else if (dtype == Dtype::kFloat32) {
      convert_row<Acc>(x, 1, n, Acc(1), static_cast<float*>(dst));
    } else {
      convert_row<Acc>(x, 1, n, Acc(1), static_cast<uint16_t*>(dst));
    }
  }

  static constexpr Dtype kOperandDtype = sizeof(Operand) == 8   ? Dtype::kFloat64
                                         : sizeof(Operand) == 4 ? Dtype::kFloat32
                                                                : Dtype::kBFloat16;
  static void scale_operands(Operand* x, int64_t n, Acc factor) { scale_row(x, n, kOperandDtype, factor); }

  static void scale_row(void* x, int64_t n, Dtype dtype, Acc factor) {
    if (dtype == Dtype::kFloat64) {
      convert_row<Acc>(static_cast<double*>(x), 1, n, factor, static_cast<double*>(x));
    } else if (dtype == Dtype::kFloat32) {
      convert_row<Acc>(static_cast<float*>(x), 1, n, factor, static_cast<float*>(x));
    } else {
      convert_row<Acc>(static_cast<BFloat16*>(x), 1, n, factor, static_cast<uint16_t*>(x));
    }
  }

  static void subtract_column_sums(const Operand* x, int64_t x_stride, int64_t rows, int64_t columns, const Acc* coef,
                                   Acc* out) {
    using Source = std::conditional_t<kUnit == 1, Operand, BFloat16>;
    const auto* from = reinterpret_cast<const Source*>(x);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) out[j] -= coef[i] * widen<Acc>(from[i * x_stride + j]);
  }

  static constexpr TileKernels<Mode> table() {
    return {kPanel,         copy,      pack_transposed, pack,      transpose_units,     multiply, exp_row,
            store_operands, store_row, scale_operands,  scale_row, subtract_column_sums};
  }
};

}  // namespace
}  // namespace synpo
