// Sixteen lanes: AVX-512 F, DQ, BW and VL. As lanes_avx2.h, with lane 4 b + q for block 4 q + b of sixteen, 32 registers and
// three-input logic.
#pragma once

#include <immintrin.h>

#include "../noise/lanes.h"

namespace zk::cpu {

struct F16 {
  __m512 v;
};
struct U16 {
  __m512i v;
};
struct C16 {
  __m512i even, odd;
};

ZK_HD U16 operator&(U16 a, U16 b) { return {_mm512_and_si512(a.v, b.v)}; }
ZK_HD U16 operator|(U16 a, U16 b) { return {_mm512_or_si512(a.v, b.v)}; }
ZK_HD U16 operator^(U16 a, U16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
ZK_HD U16 operator+(U16 a, U16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
ZK_HD U16 operator>>(U16 a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
ZK_HD U16 operator<<(U16 a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
ZK_HD U16 xor3(U16 a, U16 b, U16 c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)}; }
ZK_HD U16 and_or(U16 a, U16 b, U16 c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0xea)}; }
ZK_HD U16 and_xor(U16 a, U16 b, U16 c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x6a)}; }
ZK_HD C16 operator^(C16 a, C16 b) { return {_mm512_xor_si512(a.even, b.even), _mm512_xor_si512(a.odd, b.odd)}; }
ZK_HD C16 xor3(C16 a, C16 b, C16 c) {
  return {_mm512_ternarylogic_epi32(a.even, b.even, c.even, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, c.odd, 0x96)};
}

ZK_HD F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
ZK_HD F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
ZK_HD F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ZK_HD F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
ZK_HD U16 bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
ZK_HD F16 from_bits(U16 a) { return {_mm512_castsi512_ps(a.v)}; }
ZK_HD F16 signed_to_float(U16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
ZK_HD F16 low_half_to_float(U16 a) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a.v, 16), 16))}; }
ZK_HD U16 select_ge(U16 a, uint32_t threshold, U16 yes, U16 no) {
  const __mmask16 ge = _mm512_cmpge_epu32_mask(a.v, _mm512_set1_epi32(static_cast<int>(threshold)));
  return {_mm512_mask_mov_epi32(no.v, ge, yes.v)};
}
ZK_HD void mul_wide(C16 c, uint32_t m, C16& hi, C16& lo) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
  lo = {_mm512_mul_epu32(c.even, factor), _mm512_mul_epu32(c.odd, factor)};
  hi = {_mm512_srli_epi64(lo.even, 32), _mm512_srli_epi64(lo.odd, 32)};
}
ZK_HD U16 join(C16 c) { return {_mm512_mask_mov_epi32(c.even, 0xaaaa, _mm512_slli_epi64(c.odd, 32))}; }

}  // namespace zk::cpu

namespace zk {
template <>
struct Splat<cpu::F16> {
  static ZK_HD cpu::F16 of(float x) { return {_mm512_set1_ps(x)}; }
};
template <>
struct Splat<cpu::U16> {
  static ZK_HD cpu::U16 of(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
};
template <>
struct Splat<cpu::C16> {
  static ZK_HD cpu::C16 of(uint32_t x) {
    const __m512i v = _mm512_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
};
}  // namespace zk

namespace zk::cpu {

struct Avx512 {
  using F = F16;
  using U = U16;
  using C = C16;
  static constexpr int width = 16;

  // Block indices first .. first + 15; first is a multiple of 16, so no lane carries.
  static ZK_HD C counter(uint32_t first) {
    const __m512i base = _mm512_set1_epi32(static_cast<int>(first));
    return {_mm512_add_epi32(base, _mm512_setr_epi32(0, 0, 8, 0, 1, 0, 9, 0, 2, 0, 10, 0, 3, 0, 11, 0)),
            _mm512_add_epi32(base, _mm512_setr_epi32(4, 0, 12, 0, 5, 0, 13, 0, 6, 0, 14, 0, 7, 0, 15, 0))};
  }

  // 4 x 4 words within each 128-bit quarter.
  static ZK_HD void transpose(const __m512i r[4], U w[4]) {
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    w[0] = {_mm512_unpacklo_epi64(a, c)};
    w[1] = {_mm512_unpackhi_epi64(a, c)};
    w[2] = {_mm512_unpacklo_epi64(b, d)};
    w[3] = {_mm512_unpackhi_epi64(b, d)};
  }

  static ZK_HD void load_words(const uint32_t* p, U w[4]) {
    __m512i r[4];
    for (int q = 0; q < 4; ++q) r[q] = _mm512_loadu_si512(p + 16 * q);
    transpose(r, w);
  }
  static ZK_HD void store_words(uint32_t* p, const U w[4]) {
    const __m512i r[4] = {w[0].v, w[1].v, w[2].v, w[3].v};
    U t[4];
    transpose(r, t);
    for (int q = 0; q < 4; ++q) _mm512_storeu_si512(p + 16 * q, t[q].v);
  }

  // A register of memory holds blocks 2 j and 2 j + 1 as quarters [lo, hi, lo, hi]; rows want four lo or four hi.
  static ZK_HD void load_floats(const float* p, F x[8]) {
    __m512i lo[4], hi[4];
    for (int q = 0; q < 4; ++q) {
      const __m512i a = _mm512_loadu_si512(p + 32 * q), b = _mm512_loadu_si512(p + 32 * q + 16);
      lo[q] = _mm512_shuffle_i32x4(a, b, 0x88);
      hi[q] = _mm512_shuffle_i32x4(a, b, 0xdd);
    }
    U w[8];
    transpose(lo, w);
    transpose(hi, w + 4);
    for (int i = 0; i < 8; ++i) x[i] = from_bits(w[i]);
  }
  static ZK_HD void store_floats(float* p, const F x[8]) {
    __m512i r[8];
    for (int i = 0; i < 8; ++i) r[i] = bits(x[i]).v;
    U lo[4], hi[4];
    transpose(r, lo);
    transpose(r + 4, hi);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int q = 0; q < 4; ++q) {
      _mm512_storeu_si512(p + 32 * q, _mm512_permutex2var_epi64(lo[q].v, first, hi[q].v));
      _mm512_storeu_si512(p + 32 * q + 16, _mm512_permutex2var_epi64(lo[q].v, second, hi[q].v));
    }
  }

  static ZK_HD void unpack_halves(U w, F& x0, F& x1) {
    x0 = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(w.v))};
    x1 = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w.v, 16)))};
  }
  static ZK_HD U pack_halves(F x0, F x1) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x0.v, _MM_FROUND_TO_NEAREST_INT));
    const __m512i b = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x1.v, _MM_FROUND_TO_NEAREST_INT));
    return {_mm512_or_si512(a, _mm512_slli_epi32(b, 16))};
  }
};

}  // namespace zk::cpu
