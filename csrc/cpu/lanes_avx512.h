// Sixteen lanes: AVX-512 F, DQ, BW and VL. It follows lanes_avx2.h, which explains the layout of the lanes.
// AVX-512 adds 32 registers, logic with three inputs, and shuffles of two registers.
#pragma once

#include <immintrin.h>

#include "../noise/lanes.h"
#include "../noise/rounding.h"

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
ZK_HD C16 operator^(C16 a, C16 b) {
  return {_mm512_xor_si512(a.even, b.even), _mm512_xor_si512(a.odd, b.odd)};
}
ZK_HD C16 xor3(C16 a, C16 b, C16 c) {
  return {_mm512_ternarylogic_epi32(a.even, b.even, c.even, 0x96),
          _mm512_ternarylogic_epi32(a.odd, b.odd, c.odd, 0x96)};
}

ZK_HD F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
ZK_HD F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
ZK_HD F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ZK_HD F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
ZK_HD U16 bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
ZK_HD F16 from_bits(U16 a) { return {_mm512_castsi512_ps(a.v)}; }
ZK_HD F16 signed_to_float(U16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
ZK_HD F16 low_half_to_float(U16 a) {
  return {_mm512_cvtepi32_ps(_mm512_madd_epi16(a.v, _mm512_set1_epi32(1)))};
}
ZK_HD U16 select_ge(U16 a, uint32_t threshold, U16 yes, U16 no) {
  const __mmask16 ge = _mm512_cmpge_epu32_mask(a.v, _mm512_set1_epi32(static_cast<int>(threshold)));
  return {_mm512_mask_mov_epi32(no.v, ge, yes.v)};
}
ZK_HD void mul_wide(C16 c, uint32_t m, C16& hi, C16& lo) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
  lo = {_mm512_mul_epu32(c.even, factor), _mm512_mul_epu32(c.odd, factor)};
  hi = {_mm512_srli_epi64(lo.even, 32), _mm512_srli_epi64(lo.odd, 32)};
}
ZK_HD void join(const C16 x[4], U16 w[4]) {
  const auto gather = [](__m512i a, __m512i b, __m512i c, __m512i d, U16& first, U16& second) {
    const __m512 ab = _mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0x88);
    const __m512 cd = _mm512_shuffle_ps(_mm512_castsi512_ps(c), _mm512_castsi512_ps(d), 0x88);
    first = {_mm512_castps_si512(_mm512_shuffle_ps(ab, cd, 0x88))};
    second = {_mm512_castps_si512(_mm512_shuffle_ps(ab, cd, 0xdd))};
  };
  gather(x[0].even, x[1].even, x[2].even, x[3].even, w[0], w[1]);
  gather(x[0].odd, x[1].odd, x[2].odd, x[3].odd, w[2], w[3]);
}
ZK_HD U16 next_word(const U16 w[4], int i) {
  return {_mm512_shuffle_epi32(w[i].v, static_cast<_MM_PERM_ENUM>(0x39))};
}

ZK_HD F16 sqrt_full(F16 a) { return sqrt(a); }
ZK_HD F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
ZK_HD F16 select_top(U16 a, F16 yes, F16 no) {
  return {_mm512_mask_mov_ps(no.v, _mm512_movepi32_mask(a.v), yes.v)};
}
ZK_HD F16 clamp(F16 x, F16 low, F16 high) {
  return {_mm512_min_ps(_mm512_max_ps(x.v, low.v), high.v)};
}  // max(NaN, b) is b
ZK_HD U16 nearest_int(F16 x) { return {_mm512_cvtps_epi32(x.v)}; }
// Whether a NaN is among eight registers: a comparison for two of them, and a branch.
ZK_HD bool may_be_nan(const F16 x[8]) {
  unsigned found = 0;
  for (int i = 0; i < 8; i += 2) found |= _mm512_cmp_ps_mask(x[i].v, x[i + 1].v, _CMP_UNORD_Q);
  return found != 0;
}
ZK_HD U16 floor_int(F16 x) {
  return {_mm512_cvt_roundps_epi32(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}

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

  // The block indices first .. first + 15. `first` is a multiple of 16, so no addition carries into the next
  // word.
  static ZK_HD C counter(uint32_t first) {
    const __m512i base = _mm512_set1_epi32(static_cast<int>(first));
    return {_mm512_add_epi32(base, _mm512_setr_epi32(0, 0, 4, 0, 1, 0, 5, 0, 2, 0, 6, 0, 3, 0, 7, 0)),
            _mm512_add_epi32(base, _mm512_setr_epi32(8, 0, 12, 0, 9, 0, 13, 0, 10, 0, 14, 0, 11, 0, 15, 0))};
  }

  static ZK_HD void load_words(const uint32_t* p, U w[4]) {
    for (int i = 0; i < 4; ++i) w[i] = {_mm512_loadu_si512(p + 16 * i)};
  }
  static ZK_HD void store_words(uint32_t* p, const U w[4]) {
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(p + 16 * i, w[i].v);
  }

  // Sixteen pairs in the order of memory become their first and their second elements; zip() does the
  // reverse.
  static ZK_HD void unzip(__m512 a, __m512 b, F& x0, F& x1) {
    x0 = {_mm512_permutex2var_ps(a,
                                 _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                                 b)};
    x1 = {_mm512_permutex2var_ps(a,
                                 _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),
                                 b)};
  }
  static ZK_HD void zip(F x0, F x1, __m512& a, __m512& b) {
    a = _mm512_permutex2var_ps(x0.v,
                               _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                               x1.v);
    b = _mm512_permutex2var_ps(
        x0.v, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), x1.v);
  }

  // Sixteen consecutive floats, one in each lane.
  static ZK_HD F load_row(const float* p) { return {_mm512_loadu_ps(p)}; }
  static ZK_HD void store_row(float* p, F x) { _mm512_storeu_ps(p, x.v); }
  // Adds the float of each lane to one of sixteen consecutive doubles, which are aligned to 64 bytes.
  static ZK_HD void add_row(double* p, F x) {
    _mm512_store_pd(p, _mm512_add_pd(_mm512_load_pd(p), _mm512_cvtps_pd(_mm512_castps512_ps256(x.v))));
    _mm512_store_pd(p + 8,
                    _mm512_add_pd(_mm512_load_pd(p + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))));
  }

  static ZK_HD void load_floats(const float* p, F x[8]) {
    for (int i = 0; i < 8; i += 2)
      unzip(_mm512_loadu_ps(p + 16 * i), _mm512_loadu_ps(p + 16 * i + 16), x[i], x[i + 1]);
  }
  static ZK_HD void store_floats(float* p, const F x[8]) {
    for (int i = 0; i < 8; i += 2) {
      __m512 a, b;
      zip(x[i], x[i + 1], a, b);
      _mm512_storeu_ps(p + 16 * i, a);
      _mm512_storeu_ps(p + 16 * i + 16, b);
    }
  }

  static ZK_HD void load_halves(const uint16_t* p, F x[8]) {
    const auto* row = reinterpret_cast<const __m256i*>(p);
    for (int i = 0; i < 8; i += 2) {
      unzip(_mm512_cvtph_ps(_mm256_loadu_si256(row + i)), _mm512_cvtph_ps(_mm256_loadu_si256(row + i + 1)),
            x[i], x[i + 1]);
    }
  }
  static ZK_HD void store_halves(uint16_t* p, const F x[8]) {
    auto* row = reinterpret_cast<__m256i*>(p);
    for (int i = 0; i < 8; i += 2) {
      __m512 a, b;
      zip(x[i], x[i + 1], a, b);
      _mm256_storeu_si256(row + i, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
      _mm256_storeu_si256(row + i + 1, _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
    }
  }

  // Lane l takes bytes 2 l and 2 l + 1.
  static ZK_HD void load_byte_pairs(const uint8_t* p, U w[4]) {
    for (int i = 0; i < 4; ++i)
      w[i] = {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i))};
  }
  static ZK_HD void store_byte_pairs(uint8_t* p, const U w[4]) {
    for (int i = 0; i < 4; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, _mm512_cvtepi32_epi16(w[i].v));
  }

  // Bits 30 and 31 of each lane become the mask bits of its two elements. A register has 32 elements, four
  // mask bytes.
  static ZK_HD U mask_bits(const uint8_t* bytes, int i) {
    int32_t word;
    __builtin_memcpy(&word, bytes + 4 * i, 4);
    const __m512i shift = _mm512_setr_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_sllv_epi32(_mm512_set1_epi32(word), shift)};
  }

  // Copies a buffer to memory past the caches. Both are aligned to 64 bytes.
  static ZK_HD void stream(void* to, const void* from, int64_t bytes) {
    auto* t = static_cast<__m512i*>(to);
    const auto* f = static_cast<const __m512i*>(from);
    for (int64_t i = 0; i < bytes / 64; ++i) _mm512_stream_si512(t + i, _mm512_load_si512(f + i));
  }
  static ZK_HD void stream_end() { _mm_sfence(); }

  // lanes_avx2.h explains both functions.
  static ZK_HD U pack_bf16(U b0, U b1) {
    const U high = high_halves(b0, b1), low = and_or(b0, Splat<U>::of(0xffffu), b1 << 16);
    const U half = and_or(high, Splat<U>::of(0x00010001u), Splat<U>::of(0x7ffe7ffeu));
    return {_mm512_add_epi16(high.v, _mm512_srli_epi16(_mm512_avg_epu16(low.v, half.v), 15))};
  }
  static ZK_HD void plus_minus(const uint32_t* signs, int, int i, F c, F& c0, F& c1) {
    const __m512i two = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(signs[16 * i])),
                                          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                                            28, 30));
    const F minus = from_bits(bits(c) ^ Splat<U>::of(0x80000000u));
    c0 = {_mm512_permutevar_ps(_mm512_mask_blend_ps(0xaaaa, c.v, minus.v), two)};
    c1 = {_mm512_permutevar_ps(_mm512_mask_blend_ps(0xcccc, c.v, minus.v), two)};
  }
};

}  // namespace zk::cpu
