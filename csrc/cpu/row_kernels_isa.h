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
  using Half = typename Simd<float, Bytes>::Half;
  static constexpr int64_t kLanes = Bytes / 4;
  static_assert(kGroup % kLanes == 0 && kBlock % kGroup == 0, "groups hold whole vectors, blocks whole groups");

  static constexpr float kInfinity = __builtin_inff(), kLowest = -__FLT_MAX__;

  // A vector of neighbouring numbers in float32, in their order. float64 has plain loops of its own in contrastive.cpp.
  static Vec widen_lanes(const double*) { __builtin_unreachable(); }
  static Vec widen_lanes(const float* x) { return load<Vec>(x); }
  static Vec widen_lanes(const BFloat16* x) { return bits<Vec>(upper_half(x)); }
  static Vec widen_lanes(const Float16* x) { return from_half(upper_half(x)); }
  template <class T>
  static Int upper_half(const T* x) {
    return __builtin_convertvector(load<Half>(x), Int) << 16;
  }

  // A group of one view in float32, `padding` behind its end.
  static void widen_group(Dtype dtype, const void* view, int64_t begin, int64_t count, float padding, float* out) {
    with_source(dtype, view, [&](const auto* data) {
      data += begin;
      if (count == kGroup) {
        for (int64_t j = 0; j < kGroup; j += kLanes) store(out + j, widen_lanes(data + j));
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

  // Two vectors of neighbouring numbers in float32, in the order that their format gives without a shuffle: maxima and
  // sums do not ask for another.
  struct Two {
    Vec first, second;
  };
  static Two load_two(const float* x) { return {load<Vec>(x), load<Vec>(x + kLanes)}; }
  static Two load_two(const BFloat16* x) {
    const Int words = load<Int>(x);
    return {bits<Vec>(words << 16), bits<Vec>(words & static_cast<int32_t>(0xffff0000u))};
  }
  static Two load_two(const Float16* x) {
    const Int words = load<Int>(x);
    return {from_half(words << 16), from_half(words)};
  }
  // from_float16 of the upper half of each lane.
  static Vec from_half(Int words) {
    const Int magnitude = (words >> 3) & 0x0fffe000;
    const Vec finite = bits<Vec>(magnitude) * 0x1p112f;
    const Int special = magnitude | 0x7f800000;
    const Int number = select<Int>(magnitude >= 0x0f800000, special, bits<Int>(finite));
    return bits<Vec>(number | (words & static_cast<int32_t>(0x80000000u)));
  }

  // scan for whole groups of finite numbers: no masks to lay, and nothing stored but c where its mass is asked for. The
  // next block is called in while this one is worked on. False where a number is not finite: what was written is void.
  template <bool kBoth, bool kMass, class T>
  static bool scan_finite(const T* l, const T* other, const Combination& law, int64_t count, float scale,
                          BlockSums* sums, float* group_tops) {
    alignas(64) float c[kBoth && kMass ? kBlock : 1];
    Vec l_top = Vec{} - kInfinity, c_top = Vec{} - kInfinity;
    Vec zeros[2] = {};  // sums of 0 * x: NaN as soon as an x is not finite
    const auto combine_one = [&](Vec full, Vec contrast) {
      return rounded(full * law.plus) - rounded(contrast * law.alpha);
    };
    for (int64_t group = 0; group < count; group += kGroup, ++group_tops) {
      Vec tops[2] = {Vec{} - kInfinity, Vec{} - kInfinity};
      for (int64_t j = group; j < group + kGroup; j += 2 * kLanes) {
        const Two full = load_two(l + j);
        Two kept = full;
        __builtin_prefetch(l + j + kBlock);
        if constexpr (kBoth) {
          const Two contrast = load_two(other + j);
          __builtin_prefetch(other + j + kBlock);
          kept = {combine_one(full.first, contrast.first), combine_one(full.second, contrast.second)};
          l_top = larger(full.second, larger(full.first, l_top));
          if constexpr (kMass) {
            store(c + j, kept.first);
            store(c + j + kLanes, kept.second);
          }
        }
        zeros[0] += kept.first * 0.0f;
        zeros[1] += kept.second * 0.0f;
        tops[0] = larger(kept.first, tops[0]);
        tops[1] = larger(kept.second, tops[1]);
      }
      const Vec top = larger(tops[0], tops[1]);
      *group_tops = largest(top);
      c_top = larger(top, c_top);
    }
    if (!all(zeros[0] + zeros[1] == Vec{})) return false;
    sums->finite = true;
    sums->c_top = largest(c_top);
    sums->l_top = kBoth ? largest(l_top) : sums->c_top;
    sums->l_sum = sum_of_weights(l, count, sums->l_top, 1.0f);
    if constexpr (!kMass)
      sums->c_sum = 0.0f;
    else if constexpr (kBoth)
      sums->c_sum = sum_of_weights(c, count, sums->c_top, scale);
    else
      sums->c_sum = scale == 1.0f ? sums->l_sum : sum_of_weights(l, count, sums->l_top, scale);
    return true;
  }

  static void scan(const Row& row, const Combination& law, int64_t begin, int64_t count, float scale, BlockSums* sums,
                   float* group_tops) {
    bool done = false;
    if (count % kGroup == 0) {
      with_source(row.dtype, row.logits, [&](const auto* l) {
        using T = std::remove_const_t<std::remove_reference_t<decltype(*l)>>;
        if constexpr (!std::is_same_v<T, double>) {
          const T* other = row.contrast ? static_cast<const T*>(row.contrast) + begin : nullptr;
          const auto run = other ? (scale == 0.0f ? scan_finite<true, false, T> : scan_finite<true, true, T>)
                                 : (scale == 0.0f ? scan_finite<false, false, T> : scan_finite<false, true, T>);
          done = run(l + begin, other, law, count, scale, sums, group_tops);
        }
      });
    }
    if (!done) scan_any(row, law, begin, count, scale, sums, group_tops);
  }

  // The same for any numbers: masks, infinities and NaN, and a group that is not whole.
  static void scan_any(const Row& row, const Combination& law, int64_t begin, int64_t count, float scale,
                       BlockSums* sums, float* group_tops) {
    alignas(64) float l[kBlock], c[kBlock];
    Group block{Vec{} - kInfinity, Vec{} - kInfinity, Int{} - 1};
    int64_t end = 0;
    for (; end < count; end += kGroup) {
      Group group{block.l_top, Vec{} - kInfinity, block.finite};
      const int64_t size = count - end < kGroup ? count - end : kGroup;
      combine_group(row, law, begin + end, size, l + end, c + end, group);
      *group_tops = largest(group.c_top);
      block = {group.l_top, larger(group.c_top, block.c_top), group.finite};
      ++group_tops;
    }
    sums->finite = all(block.finite);
    sums->l_top = largest(block.l_top);
    sums->c_top = largest(block.c_top);
    sums->l_sum = sum_of_weights(l, end, sums->l_top, 1.0f);
    sums->c_sum = scale == 0.0f ? 0.0f : sum_of_weights(c, end, sums->c_top, scale);
  }

  // x[i] = exp(x[i]) for x <= 0; for x below kSmallest, -inf and NaN too, 2^-125. It is 2^n * 2^r with |r| <= 1/2, and
  // for 2^r the polynomial of degree 5 with 1 at 0 whose coefficients, rounded to float32 one after the other, leave the
  // least relative error, 9.4e-8. n is added to the exponent field, which n >= -125 keeps above 0. All N go step by step:
  // the chain of one is 45 cycles long, more than a processor looks ahead. n is moved to its place at once, so that four
  // vectors fit AVX2's 16 registers.
  static constexpr float kSmallest = -86.6433976f;
  template <int N>
  static void exponentials(Vec (&x)[N]) {
    constexpr float kLog2E = 1.44269504f, kRounder = 12582912.0f;
    Vec p[N];
    Int n[N];
    const Vec smallest = rounded(Vec{} + kSmallest);  // GCC compares and blends with a constant, where one maximum does
    for (int i = 0; i < N; ++i) x[i] = larger(x[i], smallest);
    for (int i = 0; i < N; ++i) {
      // Adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the low bits.
      const Vec shifted = x[i] * kLog2E + kRounder;
      x[i] = x[i] * kLog2E - (shifted - kRounder);
      n[i] = bits<Int>(shifted) << 23;
    }
    for (int i = 0; i < N; ++i) p[i] = x[i] * 1.3269521e-3f + 9.6712913e-3f;
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 5.5507109e-2f;
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 2.4022247e-1f;
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 6.9314700e-1f;
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 1.0f;
    for (int i = 0; i < N; ++i) x[i] = bits<Vec>(bits<Int>(p[i]) + n[i]);
  }

  // The sum of exp((x - top) * scale). What is masked or too small for float32 counts as 2^-125, the largest as 1.
  template <class T>
  static float sum_of_weights(const T* x, int64_t count, float top, float scale) {
    if (!(top > -kInfinity)) return 0.0f;
    return scale == 1.0f ? sum_scaled<true>(x, count, top, scale) : sum_scaled<false>(x, count, top, scale);
  }
  template <bool kOne, class T>
  static float sum_scaled(const T* x, int64_t count, float top, float scale) {
    constexpr int N = 4;
    static_assert(kGroup % (N * kLanes) == 0, "groups hold whole steps");
    Vec sum[2] = {};
    for (int64_t j = 0; j < count; j += N * kLanes) {
      Vec w[N];
      for (int i = 0; i < N; i += 2) {
        const Two two = load_two(x + j + i * kLanes);
        w[i] = two.first;
        w[i + 1] = two.second;
      }
      for (int i = 0; i < N; ++i) w[i] = kOne ? w[i] - top : (w[i] - top) * scale;
      exponentials(w);
      for (int i = 0; i < N; ++i) sum[i & 1] += w[i];
    }
    const Vec both = sum[0] + sum[1];
    float out = 0;
    for (int i = 0; i < kLanes; ++i) out += both[i];
    return out;
  }

  static void weights(float* x, int64_t count, float top, float scale) {
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec scaled = (load<Vec>(x + j) - top) * scale;
      Vec w[1] = {scaled};
      exponentials(w);
      store(x + j, select<Int>(scaled < kSmallest, Vec{}, w[0]));
    }
  }

  static constexpr RowKernels table() { return {combine, scan, weights}; }
};

}  // namespace
}  // namespace synpo
