// Eight lanes: AVX2, FMA and F16C.
//
// In Philox each lane computes one of eight consecutive blocks, so its rounds need no shuffles. Then join()
// brings the words into the order of memory. Which lane computes which block is free, because counter()
// chooses it; it is chosen so that join() needs only shuffles within 128-bit halves. Afterwards lane l of
// register i is word l % 4 of block 2 i + l / 4, which stands for a pair of elements. In half precision such
// a pair is one word of memory.
#pragma once

#include <immintrin.h>

#include "../noise/lanes.h"
#include "../noise/rounding.h"

namespace zk::cpu {

struct F8 {
  __m256 v;
};
struct U8 {
  __m256i v;
};
// Philox words in 64-bit lanes, the even lanes and the odd ones in a register each. Their upper halves hold
// garbage. The multiply instruction takes and returns words in this form, which saves the four shuffles and
// blends that packed words would need in each round.
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
ZK_HD F8 low_half_to_float(U8 a) {
  return {_mm256_cvtepi32_ps(_mm256_madd_epi16(a.v, _mm256_set1_epi32(1)))};
}
ZK_HD U8 select_ge(U8 a, uint32_t threshold, U8 yes, U8 no) {
  return {_mm256_blendv_epi8(no.v, yes.v,
                             _mm256_cmpgt_epi32(a.v, _mm256_set1_epi32(static_cast<int>(threshold) - 1)))};
}
ZK_HD void mul_wide(C8 c, uint32_t m, C8& hi, C8& lo) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
  lo = {_mm256_mul_epu32(c.even, factor), _mm256_mul_epu32(c.odd, factor)};
  hi = {_mm256_srli_epi64(lo.even, 32), _mm256_srli_epi64(lo.odd, 32)};
}
ZK_HD void join(const C8 x[4], U8 w[4]) {
  const auto gather = [](__m256i a, __m256i b, __m256i c, __m256i d, U8& first, U8& second) {
    const __m256 ab = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
    const __m256 cd = _mm256_shuffle_ps(_mm256_castsi256_ps(c), _mm256_castsi256_ps(d), 0x88);
    first = {_mm256_castps_si256(_mm256_shuffle_ps(ab, cd, 0x88))};
    second = {_mm256_castps_si256(_mm256_shuffle_ps(ab, cd, 0xdd))};
  };
  gather(x[0].even, x[1].even, x[2].even, x[3].even, w[0], w[1]);
  gather(x[0].odd, x[1].odd, x[2].odd, x[3].odd, w[2], w[3]);
}
ZK_HD U8 next_word(const U8 w[4], int i) { return {_mm256_shuffle_epi32(w[i].v, 0x39)}; }

ZK_HD F8 sqrt_full(F8 a) { return sqrt(a); }
ZK_HD F8 div(F8 a, F8 b) { return {_mm256_div_ps(a.v, b.v)}; }
ZK_HD F8 select_top(U8 a, F8 yes, F8 no) { return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(a.v))}; }
ZK_HD F8 clamp(F8 x, F8 low, F8 high) {
  return {_mm256_min_ps(_mm256_max_ps(x.v, low.v), high.v)};
}  // max(NaN, b) is b
ZK_HD U8 nearest_int(F8 x) { return {_mm256_cvtps_epi32(x.v)}; }
ZK_HD U8 floor_int(F8 x) { return {_mm256_cvttps_epi32(_mm256_floor_ps(x.v))}; }

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

  // The block indices first .. first + 7. `first` is a multiple of 8, so no addition carries into the next
  // word.
  static ZK_HD C counter(uint32_t first) {
    const __m256i base = _mm256_set1_epi32(static_cast<int>(first));
    return {_mm256_add_epi32(base, _mm256_setr_epi32(0, 0, 2, 0, 1, 0, 3, 0)),
            _mm256_add_epi32(base, _mm256_setr_epi32(4, 0, 6, 0, 5, 0, 7, 0))};
  }

  static ZK_HD void load_words(const uint32_t* p, U w[4]) {
    for (int i = 0; i < 4; ++i) w[i] = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i)};
  }
  static ZK_HD void store_words(uint32_t* p, const U w[4]) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, w[i].v);
  }

  // Eight pairs in the order of memory become their first and their second elements; zip() does the reverse.
  static ZK_HD void unzip(__m256 a, __m256 b, F& x0, F& x1) {
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    x0 = {_mm256_shuffle_ps(low, high, 0x88)};
    x1 = {_mm256_shuffle_ps(low, high, 0xdd)};
  }
  static ZK_HD void zip(F x0, F x1, __m256& a, __m256& b) {
    const __m256 low = _mm256_unpacklo_ps(x0.v, x1.v), high = _mm256_unpackhi_ps(x0.v, x1.v);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }

  // Eight consecutive floats, one in each lane.
  static ZK_HD F load_row(const float* p) { return {_mm256_loadu_ps(p)}; }
  static ZK_HD void store_row(float* p, F x) { _mm256_storeu_ps(p, x.v); }
  // Adds the float of each lane to one of eight consecutive doubles, which are aligned to 32 bytes.
  static ZK_HD void add_row(double* p, F x) {
    _mm256_store_pd(p, _mm256_add_pd(_mm256_load_pd(p), _mm256_cvtps_pd(_mm256_castps256_ps128(x.v))));
    _mm256_store_pd(p + 4,
                    _mm256_add_pd(_mm256_load_pd(p + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))));
  }

  static ZK_HD void load_floats(const float* p, F x[8]) {
    for (int i = 0; i < 8; i += 2)
      unzip(_mm256_loadu_ps(p + 8 * i), _mm256_loadu_ps(p + 8 * i + 8), x[i], x[i + 1]);
  }
  static ZK_HD void store_floats(float* p, const F x[8]) {
    for (int i = 0; i < 8; i += 2) {
      __m256 a, b;
      zip(x[i], x[i + 1], a, b);
      _mm256_storeu_ps(p + 8 * i, a);
      _mm256_storeu_ps(p + 8 * i + 8, b);
    }
  }

  static ZK_HD void load_halves(const uint16_t* p, F x[8]) {
    const auto* row = reinterpret_cast<const __m128i*>(p);
    for (int i = 0; i < 8; i += 2) {
      unzip(_mm256_cvtph_ps(_mm_loadu_si128(row + i)), _mm256_cvtph_ps(_mm_loadu_si128(row + i + 1)), x[i],
            x[i + 1]);
    }
  }
  static ZK_HD void store_halves(uint16_t* p, const F x[8]) {
    auto* row = reinterpret_cast<__m128i*>(p);
    for (int i = 0; i < 8; i += 2) {
      __m256 a, b;
      zip(x[i], x[i + 1], a, b);
      _mm_storeu_si128(row + i, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
      _mm_storeu_si128(row + i + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
    }
  }

  // Lane l takes bytes 2 l and 2 l + 1.
  static ZK_HD void load_byte_pairs(const uint8_t* p, U w[4]) {
    for (int i = 0; i < 4; ++i)
      w[i] = {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i))};
  }
  static ZK_HD void store_byte_pairs(uint8_t* p, const U w[4]) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    for (int i = 0; i < 4; i += 2) {
      const __m256i both = _mm256_packus_epi32(_mm256_and_si256(w[i].v, low),
                                               _mm256_and_si256(w[i + 1].v, low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i), _mm256_permute4x64_epi64(both, 0xd8));
    }
  }

  // Bits 30 and 31 of each lane become the mask bits of its two elements. A register has 16 elements, two
  // mask bytes.
  static ZK_HD U mask_bits(const uint8_t* bytes, int i) {
    const int word = bytes[2 * i] | bytes[2 * i + 1] << 8;
    return {_mm256_sllv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(30, 28, 26, 24, 22, 20, 18, 16))};
  }

  // Copies a buffer to memory past the caches. Both are aligned to 64 bytes.
  static ZK_HD void stream(void* to, const void* from, int64_t bytes) {
    auto* t = static_cast<__m256i*>(to);
    const auto* f = static_cast<const __m256i*>(from);
    for (int64_t i = 0; i < bytes / 32; ++i) _mm256_stream_si256(t + i, _mm256_load_si256(f + i));
  }
  static ZK_HD void stream_end() { _mm_sfence(); }

  // bf16_nearest (noise/rounding.h) of two elements at once, in 16-bit halves of a word. The average of the
  // dropped half and of (0x7ffe + the last kept bit) has the carry of the rounding as its highest bit. This
  // takes 9 instructions instead of 11 (with AVX-512, 8 instead of 10).
  static ZK_HD U pack_bf16(U b0, U b1) {
    const __m256i high = _mm256_blend_epi16((b0 >> 16).v, b1.v, 0xaa),
                  low = _mm256_blend_epi16(b0.v, (b1 << 16).v, 0xaa);
    const U half = and_or(U{high}, Splat<U>::of(0x00010001u), Splat<U>::of(0x7ffe7ffeu));
    return {_mm256_add_epi16(high, _mm256_srli_epi16(_mm256_avg_epu16(low, half.v), 15))};
  }

  // +c or -c for the pairs of register i: the two sign bits of a pair choose among four floats. signs[16 q]
  // holds the sign bytes of vecs 4 q .. 4 q + 3, each the signs of eight elements.
  static ZK_HD void plus_minus(const uint32_t* signs, int, int i, F c, F& c0, F& c1) {
    const int first = 16 * (i & 1);
    const __m256i two = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(signs[16 * (i >> 1)])),
                                          _mm256_setr_epi32(first, first + 2, first + 4, first + 6, first + 8,
                                                            first + 10, first + 12, first + 14));
    const F minus = from_bits(bits(c) ^ Splat<U>::of(0x80000000u));
    c0 = {_mm256_permutevar_ps(_mm256_blend_ps(c.v, minus.v, 0xaa), two)};
    c1 = {_mm256_permutevar_ps(_mm256_blend_ps(c.v, minus.v, 0xcc), two)};
  }
};

}  // namespace zk::cpu
