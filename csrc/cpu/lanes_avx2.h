// Eight lanes: AVX2, FMA and F16C. A lane belongs to one of eight consecutive blocks, so Philox and the normal transform
// need no shuffles; only loads and stores transpose. Which lane has which block is free, because the counter says so:
// lane 4 b + q has block 2 q + b, which is what transposing within 128-bit halves gives.
#pragma once

#include <immintrin.h>

#include "../noise/lanes.h"

namespace zk::cpu {

struct F8 {
  __m256 v;
};
struct U8 {
  __m256i v;
};
// Philox words as 64-bit lanes (even and odd lanes) whose upper halves are garbage: the multiply instruction takes and
// gives them so, which saves the four shuffles and blends a round that packed words need.
struct C8 {
  __m256i even, odd;
};

ZK_HD U8 operator&(U8 a, U8 b) { return {_mm256_and_si256(a.v, b.v)}; }
ZK_HD U8 operator|(U8 a, U8 b) { return {_mm256_or_si256(a.v, b.v)}; }
ZK_HD U8 operator^(U8 a, U8 b) { return {_mm256_xor_si256(a.v, b.v)}; }
ZK_HD U8 operator+(U8 a, U8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
ZK_HD U8 operator>>(U8 a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
ZK_HD U8 operator<<(U8 a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
ZK_HD U8 xor3(U8 a, U8 b, U8 c) { return a ^ b ^ c; }
ZK_HD U8 and_or(U8 a, U8 b, U8 c) { return (a & b) | c; }
ZK_HD U8 and_xor(U8 a, U8 b, U8 c) { return (a & b) ^ c; }
ZK_HD C8 operator^(C8 a, C8 b) { return {_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)}; }
ZK_HD C8 xor3(C8 a, C8 b, C8 c) { return a ^ b ^ c; }

ZK_HD F8 add(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
ZK_HD F8 mul(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
ZK_HD F8 fma(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ZK_HD F8 sqrt(F8 a) { return {_mm256_sqrt_ps(a.v)}; }
ZK_HD U8 bits(F8 a) { return {_mm256_castps_si256(a.v)}; }
ZK_HD F8 from_bits(U8 a) { return {_mm256_castsi256_ps(a.v)}; }
ZK_HD F8 signed_to_float(U8 a) { return {_mm256_cvtepi32_ps(a.v)}; }
ZK_HD F8 low_half_to_float(U8 a) { return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a.v, 16), 16))}; }
ZK_HD U8 select_ge(U8 a, uint32_t threshold, U8 yes, U8 no) {
  return {_mm256_blendv_epi8(no.v, yes.v, _mm256_cmpgt_epi32(a.v, _mm256_set1_epi32(static_cast<int>(threshold) - 1)))};
}
ZK_HD void mul_wide(C8 c, uint32_t m, C8& hi, C8& lo) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
  lo = {_mm256_mul_epu32(c.even, factor), _mm256_mul_epu32(c.odd, factor)};
  hi = {_mm256_srli_epi64(lo.even, 32), _mm256_srli_epi64(lo.odd, 32)};
}
ZK_HD U8 join(C8 c) { return {_mm256_blend_epi32(c.even, _mm256_slli_epi64(c.odd, 32), 0xaa)}; }

}  // namespace zk::cpu

namespace zk {
template <>
struct Splat<cpu::F8> {
  static ZK_HD cpu::F8 of(float x) { return {_mm256_set1_ps(x)}; }
};
template <>
struct Splat<cpu::U8> {
  static ZK_HD cpu::U8 of(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
};
template <>
struct Splat<cpu::C8> {
  static ZK_HD cpu::C8 of(uint32_t x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
};
}  // namespace zk

namespace zk::cpu {

struct Avx2 {
  using F = F8;
  using U = U8;
  using C = C8;
  static constexpr int width = 8;

  // Block indices first .. first + 7; first is a multiple of 8, so no lane carries.
  static ZK_HD C counter(uint32_t first) {
    const __m256i base = _mm256_set1_epi32(static_cast<int>(first));
    return {_mm256_add_epi32(base, _mm256_setr_epi32(0, 0, 4, 0, 1, 0, 5, 0)),
            _mm256_add_epi32(base, _mm256_setr_epi32(2, 0, 6, 0, 3, 0, 7, 0))};
  }

  // 4 x 4 words within each 128-bit half.
  static ZK_HD void transpose(const __m256i r[4], U w[4]) {
    const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    w[0] = {_mm256_unpacklo_epi64(a, c)};
    w[1] = {_mm256_unpackhi_epi64(a, c)};
    w[2] = {_mm256_unpacklo_epi64(b, d)};
    w[3] = {_mm256_unpackhi_epi64(b, d)};
  }

  static ZK_HD void load_words(const uint32_t* p, U w[4]) {
    __m256i r[4];
    for (int q = 0; q < 4; ++q) r[q] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + q);
    transpose(r, w);
  }
  static ZK_HD void store_words(uint32_t* p, const U w[4]) {
    const __m256i r[4] = {w[0].v, w[1].v, w[2].v, w[3].v};
    U t[4];
    transpose(r, t);
    for (int q = 0; q < 4; ++q) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + q, t[q].v);
  }

  // A block is a row of eight floats; r[q] takes half of block 2 q and half of block 2 q + 1.
  static ZK_HD void load_floats(const float* p, F x[8]) {
    for (int half = 0; half < 2; ++half) {
      __m256i r[4];
      for (int q = 0; q < 4; ++q) {
        const auto* row = reinterpret_cast<const __m128i*>(p + 16 * q + 4 * half);
        r[q] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(row)), _mm_loadu_si128(row + 2), 1);
      }
      U w[4];
      transpose(r, w);
      for (int i = 0; i < 4; ++i) x[4 * half + i] = from_bits(w[i]);
    }
  }
  static ZK_HD void store_floats(float* p, const F x[8]) {
    for (int half = 0; half < 2; ++half) {
      __m256i r[4];
      for (int i = 0; i < 4; ++i) r[i] = bits(x[4 * half + i]).v;
      U t[4];
      transpose(r, t);
      for (int q = 0; q < 4; ++q) {
        auto* row = reinterpret_cast<__m128i*>(p + 16 * q + 4 * half);
        _mm_storeu_si128(row, _mm256_castsi256_si128(t[q].v));
        _mm_storeu_si128(row + 2, _mm256_extracti128_si256(t[q].v, 1));
      }
    }
  }

  // A word holds the fp16 of elements 2p and 2p + 1; F16C wants eight fp16 in a row.
  static ZK_HD void unpack_halves(U w, F& x0, F& x1) {
    const __m256i low = _mm256_and_si256(w.v, _mm256_set1_epi32(0xffff));
    const __m256i row = _mm256_packus_epi32(low, _mm256_srli_epi32(w.v, 16));  // [x0 0-3, x1 0-3 | x0 4-7, x1 4-7]
    const __m256 a = _mm256_cvtph_ps(_mm256_castsi256_si128(row));
    const __m256 b = _mm256_cvtph_ps(_mm256_extracti128_si256(row, 1));
    x0 = {_mm256_permute2f128_ps(a, b, 0x20)};
    x1 = {_mm256_permute2f128_ps(a, b, 0x31)};
  }
  static ZK_HD U pack_halves(F x0, F x1) {
    const __m256i a = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x0.v, _MM_FROUND_TO_NEAREST_INT));
    const __m256i b = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x1.v, _MM_FROUND_TO_NEAREST_INT));
    return {_mm256_or_si256(a, _mm256_slli_epi32(b, 16))};
  }
};

}  // namespace zk::cpu
