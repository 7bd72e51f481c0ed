// AVX-512 with its bfloat16 dot product: two products per lane and instruction, summed in float32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#include "row_kernels_isa.h"
#include "tile_kernels_isa.h"

namespace synpo {
namespace {
struct DotPairs {
  using Vec = Simd<float, 64>::Vec;
  typedef uint32_t Packed __attribute__((vector_size(64), may_alias));
  static Vec step(Vec acc, uint32_t a, Packed b) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    return bits<Vec>(_mm512_dpbf16_ps(bits<__m512>(acc), bits<__m512bh>(b), bits<__m512bh>(pair)));
  }
};
constexpr auto kFloat64 = Kernels<Float64, 64, 6, 4>::table();
constexpr auto kFloat32 = Kernels<Float32, 64, 6, 4>::table();
constexpr auto kPairs = Kernels<Bf16Pairs, 64, 6, 4, DotPairs>::table();
constexpr auto kRowTable = RowKernelsOf<64>::table();
}  // namespace

extern const Isa kAvx512Bf16{"avx512_bf16", &kFloat64, &kFloat32, &kPairs, &kRowTable};
}  // namespace synpo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
