// The kernels of row_kernels.h, written once for any vector width; included as tile_kernels_isa.h is.
#pragma once

#include "row_kernels.h"
#include "tile_kernels_isa.h"
#include "vector.h"

namespace synpo {
namespace {

template <int Bytes>
struct RowKernelsOf {
  using Vec = typename Simd<float, Bytes>::Vec;
  using Int = typename Simd<float, Bytes>::Int;
  static constexpr int64_t kLanes = Bytes / 4;
  static_assert(kGroup % kLanes == 0 && kBlock % kGroup == 0, "groups hold whole vectors, blocks whole groups");

  static constexpr float kInfinity = __builtin_inff(), kLowest = -__FLT_MAX__;

  // A group of one view in float32, `padding` behind its end.
  static void widen_group(Dtype dtype, const void* view, int64_t begin, int64_t count, float padding, float* out) {
    with_source(dtype, view, [&](const auto* data) {
      data += begin;
      if (count == kGroup) {
        for (int64_t j = 0; j < kGroup; ++j) out[j] = static_cast<float>(widen<float>(data[j]));
      } else {
        for (int64_t j = 0; j < kGroup; ++j) out[j] = j < count ? static_cast<float>(widen<float>(data[j])) : padding;
      }
    });
  }

  static Vec larger(Vec a, Vec b) { return a > b ? a : b; }
  static float largest(Vec v) {
    float out = v[0];
    for (int i = 1; i < kLanes; ++i) out = v[i] > out ? v[i] : out;
    return out;
  }
  // Keeps a product from being fused with the subtraction behind it, which would round once where the definition of c
  // rounds twice: equal tokens would then differ, and so would the greedy choice between processors.
  static Vec rounded(Vec product) {
#if defined(__x86_64__)
    asm("" : "+x"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#endif
    return product;
  }

  // One group: l and c in float32, their largest numbers, and whether all are finite.
  struct Group {
    Vec l_top, c_top;
    Int finite;
  };
  static void combine_group(const Row& row, const Combination& law, int64_t begin, int64_t count, float* l, float* c,
                            Group& group) {
    const Vec floor = Vec{} + (law.floor > kLowest ? law.floor : kLowest);  // l < kLowest is l = -inf
    widen_group(row.dtype, row.logits, begin, count, -kInfinity, l);
    if (row.contrast) {
      widen_group(row.dtype, row.contrast, begin, count, 0.0f, c);
      for (int64_t j = 0; j < kGroup; j += kLanes) {
        const Vec full = load<Vec>(l + j), other = load<Vec>(c + j);
        const Vec combined = rounded(full * law.plus) - rounded(other * law.alpha);
        const Int masked = (full < floor) | (other < kLowest);
        const Vec kept = select<Int>(masked, Vec{} - kInfinity, combined);
        group.finite &= (full < kInfinity) & (kept < kInfinity) & ((other < kInfinity) | masked);
        group.l_top = larger(full, group.l_top);
        group.c_top = larger(kept, group.c_top);
        store(c + j, kept);
      }
    } else {
      for (int64_t j = 0; j < kGroup; j += kLanes) {
        const Vec full = load<Vec>(l + j);
        const Vec kept = select<Int>(full < floor, Vec{} - kInfinity, full);
        group.finite &= full < kInfinity;
        group.l_top = larger(full, group.l_top);
        group.c_top = larger(kept, group.c_top);
        store(c + j, kept);
      }
    }
  }
  // The same for one view without a floor, where c is l.
  static void widen_top(const Row& row, int64_t begin, int64_t count, float* l, Group& group) {
    widen_group(row.dtype, row.logits, begin, count, -kInfinity, l);
    for (int64_t j = 0; j < kGroup; j += kLanes) {
      const Vec full = load<Vec>(l + j);
      group.finite &= full < kInfinity;
      group.c_top = larger(full, group.c_top);
    }
    group.l_top = larger(group.c_top, group.l_top);
  }
  static bool all(Int mask) {
    bool out = true;
    for (int i = 0; i < kLanes; ++i) out &= mask[i] != 0;
    return out;
  }

  static bool combine(const Row& row, const Combination& law, int64_t begin, int64_t count, float* c) {
    alignas(64) float l[kGroup];
    Group group{Vec{} - kInfinity, Vec{} - kInfinity, Int{} - 1};
    for (int64_t j = 0; j < count; j += kGroup)
      combine_group(row, law, begin + j, count - j < kGroup ? count - j : kGroup, l, c + j, group);
    return all(group.finite);
  }

  static void scan(const Row& row, const Combination& law, int64_t begin, int64_t count, float scale, BlockSums* sums,
                   float* group_tops) {
    alignas(64) float l[kBlock], c[kBlock];
    Group block{Vec{} - kInfinity, Vec{} - kInfinity, Int{} - 1};
    int64_t end = 0;
    for (; end < count; end += kGroup) {
      Group group{block.l_top, Vec{} - kInfinity, block.finite};
      const int64_t size = count - end < kGroup ? count - end : kGroup;
      if (row.contrast)
        combine_group(row, law, begin + end, size, l + end, c + end, group);
      else
        widen_top(row, begin + end, size, l + end, group);
      *group_tops = largest(group.c_top);
      block = {group.l_top, larger(group.c_top, block.c_top), group.finite};
      ++group_tops;
    }
    sums->finite = all(block.finite);
    sums->l_top = largest(block.l_top);
    sums->c_top = largest(block.c_top);
    sums->l_sum = sum_of_weights(l, end, sums->l_top, 1.0f);
    if (scale == 1.0f && !row.contrast)
      sums->c_sum = sums->l_sum;
    else
      sums->c_sum = scale == 0.0f ? 0.0f : sum_of_weights(row.contrast ? c : l, end, sums->c_top, scale);
  }

  // exp(x) for x <= 0, 0 below -87, NaN stays NaN: vector_exp without what larger x need. The power of 2 is added to
  // the exponent field, which x >= -87 keeps above 0.
  static Vec weight(Vec x) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, in the low bits
    const Int below = x < -87.0f;
    const Vec clamped = bits<Vec>(~below & bits<Int>(x));
    const Vec shifted = clamped * 1.44269504088896341f + kRounder;
    const Vec n = shifted - kRounder;
    const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return bits<Vec>(~below & (bits<Int>(p) + (bits<Int>(shifted) << 23)));
  }

  static float sum_of_weights(const float* x, int64_t count, float top, float scale) {
    if (!(top > -kInfinity)) return 0.0f;
    Vec sum[2] = {};
    for (int64_t j = 0; j < count; j += 2 * kLanes)
      for (int i = 0; i < 2; ++i) sum[i] += weight((load<Vec>(x + j + i * kLanes) - top) * scale);
    const Vec both = sum[0] + sum[1];
    float out = 0;
    for (int i = 0; i < kLanes; ++i) out += both[i];
    return out;
  }

  static void weights(float* x, int64_t count, float top, float scale) {
    for (int64_t j = 0; j < count; j += kLanes) store(x + j, weight((load<Vec>(x + j) - top) * scale));
  }

  static constexpr RowKernels table() { return {combine, scan, weights}; }
};

}  // namespace
}  // namespace synpo
