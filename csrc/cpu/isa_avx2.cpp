// AVX2 with FMA: vectors of 32 bytes, 6 x 2 sums in 16 registers.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "row_kernels_isa.h"
#include "tile_kernels_isa.h"

namespace synpo {
namespace {
constexpr auto kFloat64 = Kernels<Float64, 32, 4, 2>::table();
constexpr auto kFloat32 = Kernels<Float32, 32, 6, 2>::table();
constexpr auto kPairs = Kernels<Bf16Pairs, 32, 4, 2>::table();
constexpr auto kRowTable = RowKernelsOf<32>::table();
}  // namespace

extern const Isa kAvx2{"avx2", &kFloat64, &kFloat32, nullptr, &kRowTable};
extern const Isa kAvx2Pairs{"avx2_pairs", &kFloat64, &kFloat32, &kPairs, &kRowTable};
}  // namespace synpo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
