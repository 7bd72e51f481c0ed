// Vectors of 16 bytes on the baseline of every processor (SSE2, NEON, or the compiler's own lowering).
#include "row_kernels_isa.h"
#include "tile_kernels_isa.h"

namespace synpo {
namespace {
#if defined(__aarch64__)
constexpr int kVectors = 4;  // 32 registers: 6 x 4 sums, 4 vectors of the panel
#else
constexpr int kVectors = 2;
#endif
constexpr auto kFloat64 = Kernels<Float64, 16, 4, 4>::table();
constexpr auto kFloat32 = Kernels<Float32, 16, 6, kVectors>::table();
constexpr auto kPairs = Kernels<Bf16Pairs, 16, 4, 2>::table();
constexpr auto kRowTable = RowKernelsOf<16>::table();
}  // namespace

extern const Isa kPortable{"portable", &kFloat64, &kFloat32, nullptr, &kRowTable};
extern const Isa kPortablePairs{"portable_pairs", &kFloat64, &kFloat32, &kPairs, &kRowTable};
}  // namespace synpo
