// AVX-512: vectors of 64 bytes, 6 x 4 sums and 4 vectors of the panel in 32 registers.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include "row_kernels_isa.h"
#include "tile_kernels_isa.h"

namespace synpo {
namespace {
constexpr auto kFloat64 = Kernels<Float64, 64, 6, 4>::table();
constexpr auto kFloat32 = Kernels<Float32, 64, 6, 4>::table();
constexpr auto kRowTable = RowKernelsOf<64>::table();
}  // namespace

extern const Isa kAvx512{"avx512", &kFloat64, &kFloat32, nullptr, &kRowTable};
}  // namespace synpo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
