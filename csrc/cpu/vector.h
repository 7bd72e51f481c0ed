// Vectors of any width through the GCC/clang vector extensions, number formats, and exp and tanh on vectors.
//
// Everything has internal linkage on purpose: each instruction set's file (isa_*.cpp) compiles its own copy under its
// own target, and the linker must never let one file's copy serve another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace synpo {
namespace {

template <class T, int Bytes>
struct Simd;
template <int Bytes>
struct Simd<float, Bytes> {
  typedef float Vec __attribute__((vector_size(Bytes), may_alias));
  typedef int32_t Int __attribute__((vector_size(Bytes), may_alias));
  typedef uint16_t Half __attribute__((vector_size(Bytes / 2), may_alias));  // as many 16-bit numbers
};
template <int Bytes>
struct Simd<double, Bytes> {
  typedef double Vec __attribute__((vector_size(Bytes), may_alias));
  typedef int64_t Int __attribute__((vector_size(Bytes), may_alias));
};

template <class Vec, class T>
inline Vec load(const T* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(Vec));
  return v;
}

template <class Vec, class T>
inline void store(T* p, Vec v) {
  std::memcpy(p, &v, sizeof(Vec));
}

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// mask ? a : b, lane by lane; mask lanes are 0 or -1 as comparisons make them.
template <class Int, class Vec>
inline Vec select(Int mask, Vec a, Vec b) {
  return bits<Vec>((mask & bits<Int>(a)) | (~mask & bits<Int>(b)));
}

inline float from_bfloat16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

// Round to nearest even; a NaN stays a NaN (rounding could carry its payload into the sign).
inline uint16_t to_bfloat16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Moving the exponent field up and multiplying by 2^112 re-biases it, subnormals included.
inline float from_float16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu;
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return bits<float>((magnitude >= 0x7c00u ? special : finite) | (static_cast<uint32_t>(x & 0x8000u) << 16));
}

// exp on float lanes, at most 2 units in the last place on [-87.3, 88.7]: 2^n * exp(r) with |r| <= ln(2)/2 and a
// minimax polynomial of degree 6 for exp(r) (the classic Cephes split of ln 2). 0 below -87.3 (results there would be
// subnormal), inf above 88.7, NaN stays NaN: every comparison below is false for it.
template <int Bytes>
inline typename Simd<float, Bytes>::Vec vector_exp(typename Simd<float, Bytes>::Vec x) {
  using Vec = typename Simd<float, Bytes>::Vec;
  using Int = typename Simd<float, Bytes>::Int;
  constexpr float kLowest = -87.33654f, kHighest = 88.72283f;
  const Int below = x < kLowest, above = x > kHighest;
  const Vec zero = {};
  const Vec clamped = select<Int>(below | above, zero, x);
  // Adding and removing 1.5 * 2^23 rounds to the nearest integer, which then stands in the low bits.
  constexpr float kRounder = 12582912.0f;
  const Vec shifted = clamped * 1.44269504088896341f + kRounder;
  const Vec n = shifted - kRounder;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Two factors, so that n = 128 does not overflow the exponent field before the product is formed.
  const Int power = bits<Int>(shifted) - bits<int32_t>(kRounder);
  const Int half = power >> 1;
  const Vec scaled = p * bits<Vec>((half + 127) << 23) * bits<Vec>((power - half + 127) << 23);
  const Vec infinity = zero + __builtin_inff();
  return select<Int>(below, zero, select<Int>(above, infinity, scaled));
}

// tanh on float lanes: x + x^3 q(x^2) for |x| < 0.625 (Cephes), sign(x) * (1 - 2 / (exp(2|x|) + 1)) beyond.
template <int Bytes>
inline typename Simd<float, Bytes>::Vec vector_tanh(typename Simd<float, Bytes>::Vec x) {
  using Vec = typename Simd<float, Bytes>::Vec;
  using Int = typename Simd<float, Bytes>::Int;
  const Int sign = bits<Int>(x) & static_cast<int32_t>(0x80000000u);
  const Vec magnitude = bits<Vec>(bits<Int>(x) ^ sign);
  const Vec large = 1.0f - 2.0f / (vector_exp<Bytes>(magnitude + magnitude) + 1.0f);
  const Vec s = x * x;
  Vec q = s * -5.70498872745e-3f + 2.06390887954e-2f;
  q = q * s + -5.37397155531e-2f;
  q = q * s + 1.33314422036e-1f;
  q = q * s + -3.33332819422e-1f;
  const Vec small = x + x * s * q;
  return select<Int>(magnitude < 0.625f, small, bits<Vec>(bits<Int>(large) | sign));
}

// float64 serves gradient checks and oracles: the C library's functions, lane by lane.
template <int Bytes>
inline typename Simd<double, Bytes>::Vec vector_exp(typename Simd<double, Bytes>::Vec x) {
  for (int i = 0; i < Bytes / 8; ++i) x[i] = std::exp(x[i]);
  return x;
}
template <int Bytes>
inline typename Simd<double, Bytes>::Vec vector_tanh(typename Simd<double, Bytes>::Vec x) {
  for (int i = 0; i < Bytes / 8; ++i) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace
}  // namespace synpo
