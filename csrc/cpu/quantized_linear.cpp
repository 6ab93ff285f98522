// quantized_linear: y = x W^T + b with W[o, i] = scale[o, i / group_size] * weight[o, i] of int8 or packed int4.
//
// A row of x is a step times integers q of 24 or 8 bits (docs/contract.md). They are multiplied byte by byte: a
// column is one of the three bytes ("limbs") of a row of q, or the only one. So a product is sums of int8 times
// int8, exact in int32, and it does not matter in which order or by which instructions they are made.
//
// Up to 64 elements of a group make a chunk. Of a chunk x is packed as [16 words][16 columns][4 bytes], which is
// how AMX wants its second matrix and how VNNI takes a register for each word. The first matrix is 16 rows of the
// weights where they lie. Where a chunk is shorter, x has zeros, so whatever the weights have there counts nothing.
#include "kernels.h"

namespace zk::cpu {

// Elements of a chunk; columns, rows of x and outputs of a tile; bytes of a chunk of x for 16 columns.
constexpr int64_t kDepth = 64, kTile = 16, kChunkBytes = kDepth * kTile;
// Outputs that a kernel finishes at a time, and rows of x whose integers are held at once.
constexpr int64_t kOutputs = 128, kHeld = 64;

// Instructions for products of bytes, beyond those of the instruction set.
enum class Dot { plain, vnni, amx };

struct QuantizedProduct {
  const uint8_t* weight;  // int8 [outputs, columns], or two a byte
  const void* scale;      // [outputs, groups]
  const void* bias;       // [outputs], or null
  const void* x;          // [rows, columns]
  void* out;              // [rows, outputs of the layer]
  int64_t rows, columns, outputs, groups, size;
  int64_t bytes;   // of a row of the weights
  int64_t limbs;   // 3 or 1
  int64_t across;  // columns from one limb to the next: as many as there are rows, or kTile
  int64_t tiles;   // of columns
  int64_t chunks;  // of a row
  bool packed;
  DType dtype, scale_dtype, bias_dtype;
  Dot dot;
  // Scratch of the call: x packed [block of rows, chunk, tile, kChunkBytes], the steps [rows].
  uint8_t* packed_x;
  float* steps;

  // Always inlined, as all that is here: the linker may take any instruction set's copy of a function that is not.
  // A group begins at a whole byte. Of a packed group that begins in half of one, the half before it is read, too.
  ZK_HD int64_t begin(int64_t group) const { return packed ? group * size & ~int64_t{1} : group * size; }
  ZK_HD int64_t chunks_of(int64_t group) const {
    return ((group + 1) * size - begin(group) + kDepth - 1) / kDepth;
  }
  ZK_HD uint8_t* x_of(int64_t block, int64_t chunk) const {
    return packed_x + (block * chunks + chunk) * tiles * kChunkBytes;
  }
};

// Floats of scratch for a thread: a row of x and its integers; the scales of a tile, its sums, and the outputs.
ZK_HD constexpr int64_t row_floats(int64_t columns) { return 2 * (columns + kOutputs); }
ZK_HD constexpr int64_t tile_floats(int64_t groups) {
  return kTile * groups + kOutputs + 2 * kTile * 64 + kTile * kOutputs;
}

// Rows [begin, end) of x to packed_x and steps.
ZK_KERNEL(quantize_rows, const QuantizedProduct&, int64_t begin, int64_t end, float* scratch)
// Blocks [begin, end) of kOutputs outputs.
ZK_KERNEL(quantized_linear, const QuantizedProduct&, int64_t begin, int64_t end, float* scratch)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

#include "tile.h"

namespace zk::cpu {
namespace {

// Registers as the compiler makes them of any instruction set. None is an argument or a result, whose way through
// registers depends on the instruction set.
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t HalfBytes __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

template <class V>
ZK_HD void read(V& to, const void* from) {
  __builtin_memcpy(&to, from, sizeof(V));
}
template <class V>
ZK_HD void write(void* to, const V& from) {
  __builtin_memcpy(to, &from, sizeof(V));
}

// `count` elements in fp32, in the order of memory.
template <class L, DType D>
void to_floats(const void* from, int64_t count, float* to) {
  using T = typename Storage<L, D>::T;
  constexpr int64_t step = 8 * L::width;
  typename L::F v[8];
  for (const T* p = static_cast<const T*>(from); count > 0; p += step, to += step, count -= step) {
    if (count >= step) {
      Storage<L, D>::load(p, v);
      L::store_floats(to, v);
    } else {
      alignas(64) T rest[step] = {};
      alignas(64) float floats[step];
      __builtin_memcpy(rest, p, count * sizeof(T));
      Storage<L, D>::load(rest, v);
      L::store_floats(floats, v);
      __builtin_memcpy(to, floats, count * sizeof(float));
    }
  }
}

template <class L>
void to_floats(DType dtype, const void* from, int64_t at, int64_t count, float* to) {
  if (dtype == DType::f32) {
    __builtin_memcpy(to, static_cast<const float*>(from) + at, count * sizeof(float));
  } else if (dtype == DType::bf16) {
    to_floats<L, DType::bf16>(static_cast<const uint16_t*>(from) + at, count, to);
  } else {
    to_floats<L, DType::f16>(static_cast<const uint16_t*>(from) + at, count, to);
  }
}

// kOutputs floats, of which `count` are wanted, rounded to D.
template <class L, DType D>
void from_floats(const float* from, int64_t count, typename Storage<L, D>::T* to) {
  constexpr int64_t step = 8 * L::width;
  alignas(64) typename Storage<L, D>::T made[kOutputs];
  typename L::F v[8];
  for (int64_t at = 0; at < count; at += step) {
    L::load_floats(from + at, v);
    for (int e = 0; e < 8; ++e) v[e] = without_payload(v[e]);
    Storage<L, D>::template store<false>(made + at, v, {});
  }
  __builtin_memcpy(to, made, count * sizeof(*to));
}

// Adding this number rounds what is at most 2^22 to an integer, to nearest even, and leaves it in the low bits.
constexpr float kMagic = 12582912.0f;

// The step of a row and its integers.
ZK_HD float quantize(const float* x, int64_t count, int64_t limbs, int32_t* q) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(zk::bits(x[i]) & 0x7fffffffu);
    most = magnitude > most ? magnitude : most;
  }
  if (most >= static_cast<int32_t>(kInfinity)) {
    for (int64_t i = 0; i < count; ++i) q[i] = 0;
    return zk::from_bits(0x7fc00000u);
  }
  const int32_t magic = static_cast<int32_t>(zk::bits(kMagic));
  if (limbs == 3) {
    const int32_t exponent = most >> 23 > 22 ? (most >> 23) - 21 : 1;
    const float inverse = zk::from_bits(static_cast<uint32_t>(254 - exponent) << 23);
    for (int64_t i = 0; i < count; ++i)
      q[i] = static_cast<int32_t>(zk::bits(x[i] * inverse + kMagic)) - magic;
    return zk::from_bits(static_cast<uint32_t>(exponent) << 23);
  }
  float step = zk::from_bits(static_cast<uint32_t>(most)) / 127.0f;
  if (step == 0.0f) step = 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t near = static_cast<int32_t>(zk::bits(x[i] / step + kMagic)) - magic;
    q[i] = near > 127 ? 127 : near < -127 ? -127 : near;
  }
  return step;
}

template <class L>
void quantize_all(const QuantizedProduct& op, int64_t begin, int64_t end, float* scratch) {
  float* x = scratch;
  auto* q = reinterpret_cast<int32_t*>(scratch + op.columns + kOutputs);
  for (int64_t row = begin; row < end; ++row) {
    to_floats<L>(op.dtype, op.x, row * op.columns, op.columns, x);
    op.steps[row] = quantize(x, op.columns, op.limbs, q);
    const int64_t block = row / kTile, column = row % kTile;
    int64_t chunk = 0;
    for (int64_t g = 0; g < op.groups; ++g) {
      const int64_t first = g * op.size, stop = first + op.size;
      for (int64_t at = op.begin(g); at < stop; at += kDepth, ++chunk) {
        alignas(64) int32_t values[kDepth];
        if (at >= first && at + kDepth <= stop) {
          __builtin_memcpy(values, q + at, sizeof(values));
        } else {
          for (int64_t i = 0; i < kDepth; ++i) values[i] = at + i >= first && at + i < stop ? q[at + i] : 0;
        }
        if (op.packed) {  // the elements of low halves, and then those of high halves
          alignas(64) int32_t halves[kDepth];
          for (int64_t i = 0; i < kDepth / 2; ++i) {
            halves[i] = values[2 * i];
            halves[kDepth / 2 + i] = values[2 * i + 1];
          }
          __builtin_memcpy(values, halves, sizeof(values));
        }
        uint8_t* to = op.x_of(block, chunk);
        for (int64_t limb = 0; limb < op.limbs; ++limb) {
          alignas(64) int8_t low[kDepth];
          for (int64_t i = 0; i < kDepth; ++i) low[i] = static_cast<int8_t>(values[i]);
          for (int64_t i = 0; i < kDepth; ++i) values[i] = (values[i] - low[i]) >> 8;
          const int64_t c = limb * op.across + column;
          uint8_t* words = to + c / kTile * kChunkBytes + c % kTile * 4;
          for (int64_t i = 0; i < kDepth / 4; ++i) __builtin_memcpy(words + i * kTile * 4, low + 4 * i, 4);
        }
      }
    }
  }
}

// A chunk of 16 rows of the weights in bytes: where it lies, or in a buffer [16, 64].
struct Weights {
  const QuantizedProduct& op;
  int64_t output;  // the first

  // Whether all of the 16 rows of `count` bytes at `byte` are inside the weights. What they have behind a group
  // or a row meets zeros.
  ZK_HD bool inside(int64_t byte, int64_t count) const {
    return (output + kTile - 1) * op.bytes + byte + count <= op.outputs * op.bytes;
  }
  // Of an element's chunk; `flip` is xored to each byte.
  ZK_HD void stage(int64_t first, uint8_t flip, uint8_t* to) const {
    const int64_t byte = op.packed ? first / 2 : first, wanted = op.packed ? kDepth / 2 : kDepth;
    const bool all = inside(byte, wanted);
    const uint8_t* from = op.weight + output * op.bytes + byte;
    const uint8_t* end = op.weight + op.outputs * op.bytes;
    for (int64_t i = 0; i < kTile; ++i, from += op.bytes, to += kDepth) {
      alignas(64) uint8_t copy[kDepth];
      const uint8_t* row = from;
      if (!all) {
        for (int64_t k = 0; k < wanted; ++k) copy[k] = from < end && k < end - from ? from[k] : 0;
        row = copy;
      }
      if (op.packed) {
        HalfBytes b;
        read(b, row);
        write(to, (((b & 15) ^ 8) - 8) ^ flip);
        write(to + kDepth / 2, (((b >> 4) ^ 8) - 8) ^ flip);
      } else {
        Bytes b;
        read(b, row);
        write(to, b ^ flip);
      }
    }
  }
};

// The sums of a group, int32 [16 outputs, 16 tiles].
void plain_sums(const QuantizedProduct& op, const Weights& weights, int64_t first, int64_t chunks,
                const uint8_t* x, int32_t* sums) {
  alignas(64) uint8_t staged[kChunkBytes];
  const int64_t width = op.tiles * kTile;
  for (int64_t i = 0; i < kTile * width; ++i) sums[i] = 0;
  for (int64_t c = 0; c < chunks; ++c, first += kDepth, x += op.tiles * kChunkBytes) {
    weights.stage(first, 0, staged);
#if defined(__AVX512BW__) || defined(__AVX2__)
    // Of each word the bytes 0 and 2, and 1 and 3, in 16 bits each.
    alignas(64) int32_t even[kTile * kTile], odd[kTile * kTile];
    typedef int16_t Shorts __attribute__((vector_size(64)));
    for (int64_t i = 0; i < kTile; ++i) {
      Shorts w;
      read(w, staged + i * kDepth);
      write(even + i * kTile, (w << 8) >> 8);
      write(odd + i * kTile, w >> 8);
    }
#if defined(__AVX512BW__)
    constexpr int64_t lanes = 16, together = 16;
    using R = __m512i;
    const auto load = [](const void* p) ZK_INLINE { return _mm512_loadu_si512(p); };
    const auto splat = [](int32_t v) ZK_INLINE { return _mm512_set1_epi32(v); };
    const auto low = [](R v) ZK_INLINE { return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8); };
    const auto high = [](R v) ZK_INLINE { return _mm512_srai_epi16(v, 8); };
    const auto plus = [](R a, R b) ZK_INLINE { return _mm512_add_epi32(a, b); };
    const auto pairs = [](R a, R b) ZK_INLINE { return _mm512_madd_epi16(a, b); };
    const auto store = [](void* p, R v) ZK_INLINE { _mm512_storeu_si512(p, v); };
#else
    constexpr int64_t lanes = 8, together = 8;
    using R = __m256i;
    const auto load = [](const void* p) ZK_INLINE { return _mm256_loadu_si256(static_cast<const R*>(p)); };
    const auto splat = [](int32_t v) ZK_INLINE { return _mm256_set1_epi32(v); };
    const auto low = [](R v) ZK_INLINE { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); };
    const auto high = [](R v) ZK_INLINE { return _mm256_srai_epi16(v, 8); };
    const auto plus = [](R a, R b) ZK_INLINE { return _mm256_add_epi32(a, b); };
    const auto pairs = [](R a, R b) ZK_INLINE { return _mm256_madd_epi16(a, b); };
    const auto store = [](void* p, R v) ZK_INLINE { _mm256_storeu_si256(static_cast<R*>(p), v); };
#endif
    const int64_t used = (op.limbs - 1) * op.across + (op.rows < kTile ? op.rows : kTile);
    for (int64_t column = 0; column < used; column += lanes) {
      const uint8_t* of = x + column / kTile * kChunkBytes + column % kTile * 4;
      for (int64_t begin = 0; begin < kTile; begin += together) {
        R sum[together];
        int32_t* to = sums + begin * width + column;
        for (int64_t i = 0; i < together; ++i) sum[i] = load(to + i * width);
        for (int64_t k = 0; k < kTile; ++k) {
          const R v = load(of + k * 64), a = low(v), b = high(v);
          for (int64_t i = 0; i < together; ++i) {
            const int64_t at = (begin + i) * kTile + k;
            sum[i] = plus(sum[i], plus(pairs(a, splat(even[at])), pairs(b, splat(odd[at]))));
          }
        }
        for (int64_t i = 0; i < together; ++i) store(to + i * width, sum[i]);
      }
    }
#else
    for (int64_t tile = 0; tile < op.tiles; ++tile) {
      for (int64_t k = 0; k < kTile; ++k) {
        Ints v;
        read(v, x + tile * kChunkBytes + k * 64);
        const Ints bytes[4] = {(v << 24) >> 24, (v << 16) >> 24, (v << 8) >> 24, v >> 24};
        for (int64_t i = 0; i < kTile; ++i) {
          const auto* w = reinterpret_cast<const int8_t*>(staged) + i * kDepth + 4 * k;
          Ints sum;
          read(sum, sums + i * width + tile * kTile);
          sum += bytes[0] * w[0] + bytes[1] * w[1] + bytes[2] * w[2] + bytes[3] * w[3];
          write(sums + i * width + tile * kTile, sum);
        }
      }
    }
#endif
  }
}

#if defined(__AVX512BW__)
// vpdpbusd takes unsigned bytes for one side: those of the weights are 128 larger, and 128 times the sum of x is
// taken off again.
__attribute__((target("avx512vnni"))) void vnni_sums(const QuantizedProduct& op, const Weights& weights,
                                                     int64_t first, int64_t chunks, const uint8_t* x,
                                                     int32_t* sums) {
  alignas(64) uint8_t staged[kChunkBytes];
  const int64_t width = op.tiles * kTile;
  for (int64_t c = 0; c < chunks; ++c, first += kDepth) {
    weights.stage(first, 0x80, staged);
    for (int64_t tile = 0; tile < op.tiles; ++tile, x += kChunkBytes) {
      __m512i sum[kTile], of_x = _mm512_setzero_si512();
      int32_t* to = sums + tile * kTile;
      for (int64_t i = 0; i < kTile; ++i) {
        sum[i] = c == 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(to + i * width);
      }
      for (int64_t k = 0; k < kTile; ++k) {
        const __m512i v = _mm512_loadu_si512(x + k * 64);
        of_x = _mm512_dpbusd_epi32(of_x, _mm512_set1_epi8(1), v);
        for (int64_t i = 0; i < kTile; ++i) {
          int32_t w;
          __builtin_memcpy(&w, staged + i * kDepth + 4 * k, 4);
          sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_set1_epi32(w), v);
        }
      }
      of_x = _mm512_slli_epi32(of_x, 7);
      for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * width, _mm512_sub_epi32(sum[i], of_x));
    }
  }
}

// Tiles 0 to 3 have sums [16 outputs, 16 columns], 4 weights [16 outputs, 64 bytes], 5 x [16 words, 16 columns].
// As assembly, because not all compilers' functions for them say that they read memory.
#define ZK_TILE_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"(int64_t{stride}) : "memory")
#define ZK_TILE_STORE(t, p, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"(int64_t{stride}) : "memory")
#define ZK_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t : :)
#define ZK_TILE_DOT(sum, w, x) asm volatile("tdpbssd %%tmm" #x ", %%tmm" #w ", %%tmm" #sum : :)

__attribute__((target("amx-tile,amx-int8"))) void amx_sums(const QuantizedProduct& op, const Weights& weights,
                                                           int64_t first, int64_t chunks, const uint8_t* x,
                                                           int32_t* sums) {
  alignas(64) uint8_t staged[kChunkBytes];
  const uint8_t* at = op.weight + weights.output * op.bytes + first;
  const auto chunk = [&](const uint8_t*& from, int64_t& stride) ZK_INLINE {
    const bool lies = !op.packed && weights.inside(first, kDepth);
    if (!lies) weights.stage(first, 0, staged);
    from = lies ? at : staged;
    stride = lies ? op.bytes : kDepth;
    first += kDepth;
    at += kDepth;
  };
  const uint8_t* from;
  int64_t stride;
  if (op.tiles == 3) {
    ZK_TILE_ZERO(0);
    ZK_TILE_ZERO(1);
    ZK_TILE_ZERO(2);
    for (int64_t c = 0; c < chunks; ++c, x += 3 * kChunkBytes) {
      chunk(from, stride);
      ZK_TILE_LOAD(4, from, stride);
      ZK_TILE_LOAD(5, x, 64);
      ZK_TILE_DOT(0, 4, 5);
      ZK_TILE_LOAD(6, x + kChunkBytes, 64);
      ZK_TILE_DOT(1, 4, 6);
      ZK_TILE_LOAD(7, x + 2 * kChunkBytes, 64);
      ZK_TILE_DOT(2, 4, 7);
    }
    ZK_TILE_STORE(0, sums, 192);
    ZK_TILE_STORE(1, sums + kTile, 192);
    ZK_TILE_STORE(2, sums + 2 * kTile, 192);
    return;
  }
  ZK_TILE_ZERO(0);
  int64_t c = 0;
  if (chunks >= 4) {  // four sums, so that no product waits for the one before it
    ZK_TILE_ZERO(1);
    ZK_TILE_ZERO(2);
    ZK_TILE_ZERO(3);
    for (; c + 4 <= chunks; c += 4, x += 4 * kChunkBytes) {
      chunk(from, stride);
      ZK_TILE_LOAD(4, from, stride);
      ZK_TILE_LOAD(5, x, 64);
      ZK_TILE_DOT(0, 4, 5);
      chunk(from, stride);
      ZK_TILE_LOAD(6, from, stride);
      ZK_TILE_LOAD(7, x + kChunkBytes, 64);
      ZK_TILE_DOT(1, 6, 7);
      chunk(from, stride);
      ZK_TILE_LOAD(4, from, stride);
      ZK_TILE_LOAD(5, x + 2 * kChunkBytes, 64);
      ZK_TILE_DOT(2, 4, 5);
      chunk(from, stride);
      ZK_TILE_LOAD(6, from, stride);
      ZK_TILE_LOAD(7, x + 3 * kChunkBytes, 64);
      ZK_TILE_DOT(3, 6, 7);
    }
  }
  const bool many = c > 0;
  for (; c < chunks; ++c, x += kChunkBytes) {
    chunk(from, stride);
    ZK_TILE_LOAD(4, from, stride);
    ZK_TILE_LOAD(5, x, 64);
    ZK_TILE_DOT(0, 4, 5);
  }
  ZK_TILE_STORE(0, sums, 64);
  if (!many) return;
  alignas(64) int32_t more[3][kTile * kTile];
  ZK_TILE_STORE(1, more[0], 64);
  ZK_TILE_STORE(2, more[1], 64);
  ZK_TILE_STORE(3, more[2], 64);
  for (int64_t i = 0; i < kTile * kTile; ++i) sums[i] += more[0][i] + more[1][i] + more[2][i];
}

// All tiles are of 16 rows of 64 bytes. The thread may have sizes of its own, which are put back.
__attribute__((target("amx-tile"))) void set_tiles(uint8_t before[64]) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("sttilecfg (%0)" : : "r"(before) : "memory");
  asm volatile("ldtilecfg (%0)" : : "r"(&config) : "memory");
}

__attribute__((target("amx-tile"))) void put_tiles_back(const uint8_t before[64]) {
  if (before[0] == 0) {
    asm volatile("tilerelease" : :);
  } else {
    asm volatile("ldtilecfg (%0)" : : "r"(before) : "memory");
  }
}
#endif

ZK_HD void sums_of(const QuantizedProduct& op, const Weights& weights, int64_t first, int64_t chunks,
                   const uint8_t* x, int32_t* sums) {
#if defined(__AVX512BW__)
  if (op.dot == Dot::amx) return amx_sums(op, weights, first, chunks, x, sums);
  if (op.dot == Dot::vnni) return vnni_sums(op, weights, first, chunks, x, sums);
#endif
  plain_sums(op, weights, first, chunks, x, sums);
}

// a 2^k + b: the product is exact, so one rounding and two are the same.
template <class L>
ZK_HD typename L::F plus_limb(typename L::F a, float power, typename L::F b) {
  const auto factor = Splat<typename L::F>::of(power);
  if constexpr (L::width > 1) return fma(a, factor, b);
  return add(mul(a, factor), b);
}

// Rows of up to 16 outputs from `output` on, for the rows of x of a block: fp32, [row, kOutputs].
template <class L>
ZK_HD void tile(const QuantizedProduct& op, int64_t output, int64_t block, const float* scales,
                const float* bias, int32_t* sums, float* to) {
  using F = typename L::F;
  const int64_t width = op.tiles * kTile, left = op.rows - block * kTile, rows = left < kTile ? left : kTile;
  alignas(64) float totals[kTile][kTile] = {};
  const Weights weights{op, output};
  int64_t chunk = 0;
  for (int64_t g = 0; g < op.groups; ++g) {
    const int64_t count = op.chunks_of(g);
    sums_of(op, weights, op.begin(g), count, op.x_of(block, chunk), sums);
    chunk += count;
    for (int64_t i = 0; i < kTile; ++i) {
      const F scale = Splat<F>::of(scales[i * op.groups + g]);
      for (int64_t row = 0; row < rows; row += L::width) {
        const auto limb = [&](int64_t j) ZK_INLINE {
          alignas(64) float integers[L::width];
          __builtin_memcpy(integers, sums + i * width + j * op.across + row, sizeof(integers));
          return signed_to_float(bits(L::load_row(integers)));
        };
        F sum = limb(0);
        if (op.limbs == 3) sum = plus_limb<L>(limb(2), 65536.0f, plus_limb<L>(limb(1), 256.0f, sum));
        L::store_row(totals[i] + row, add(L::load_row(totals[i] + row), mul(sum, scale)));
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float step = op.steps[block * kTile + row];
    for (int64_t i = 0; i < kTile; ++i) {
      const float y = totals[i][row] * step;
      to[row * kOutputs + i] = bias == nullptr ? y : y + bias[i];
    }
  }
}

template <class L, DType D>
void multiply(const QuantizedProduct& op, int64_t begin, int64_t end, float* scratch) {
  float *scales = scratch, *bias = scales + kTile * op.groups, *y = bias + kOutputs;
  auto* sums = reinterpret_cast<int32_t*>(y + kTile * kOutputs);
#if defined(__AVX512BW__)
  uint8_t before[64];
  if (op.dot == Dot::amx) set_tiles(before);
#endif
  auto* out = static_cast<typename Storage<L, D>::T*>(op.out);
  for (int64_t at = begin * kOutputs; at < op.outputs && at < end * kOutputs; at += kOutputs) {
    const int64_t count = op.outputs - at < kOutputs ? op.outputs - at : kOutputs;
    if (op.bias != nullptr) to_floats<L>(op.bias_dtype, op.bias, at, count, bias);
    for (int64_t block = 0; block * kTile < op.rows; ++block) {
      for (int64_t i = 0; i < count; i += kTile) {
        const int64_t outputs = count - i < kTile ? count - i : kTile;
        to_floats<L>(op.scale_dtype, op.scale, (at + i) * op.groups, outputs * op.groups, scales);
        tile<L>(op, at + i, block, scales, op.bias == nullptr ? nullptr : bias + i, sums, y + i);
      }
      for (int64_t row = block * kTile; row < op.rows && row < (block + 1) * kTile; ++row) {
        from_floats<L, D>(y + row % kTile * kOutputs, count, out + row * op.outputs + at);
      }
    }
  }
#if defined(__AVX512BW__)
  if (op.dot == Dot::amx) put_tiles_back(before);
#endif
}

}  // namespace

void ZK_ISA::quantize_rows(const QuantizedProduct& op, int64_t begin, int64_t end, float* scratch) {
  quantize_all<ZK_LANES>(op, begin, end, scratch);
}

void ZK_ISA::quantized_linear(const QuantizedProduct& op, int64_t begin, int64_t end, float* scratch) {
  switch (op.dtype) {
    case DType::f32: return multiply<ZK_LANES, DType::f32>(op, begin, end, scratch);
    case DType::bf16: return multiply<ZK_LANES, DType::bf16>(op, begin, end, scratch);
    case DType::f16: return multiply<ZK_LANES, DType::f16>(op, begin, end, scratch);
    default: return;
  }
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

// Bytes of memory aligned to 64.
class Memory {
 public:
  explicit Memory(int64_t bytes) : memory_(new std::byte[bytes + 64]) {
    void* p = memory_.get();
    size_t space = bytes + 64;
    start_ = std::align(64, bytes, p, space);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(start_);
  }

 private:
  std::unique_ptr<std::byte[]> memory_;
  void* start_;
};

Dot dot_of(const std::string& isa) {
  if (isa == "amx" || (isa == "auto" && has_amx())) return Dot::amx;
  if (isa == "vnni" || (isa == "auto" && has_vnni())) return Dot::vnni;
  return Dot::plain;
}

Tensor quantized_linear_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, int64_t x_bits,
                            std::string isa) {
  check_quantized_linear(x, weight, scale, bias, x_bits);
  Tensor out = torch::stable::new_empty(x, {x.size(0), scale.size(0)});
  if (out.numel() == 0) return out;
  QuantizedProduct op{};
  op.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  op.scale = scale.const_data_ptr();
  op.bias = bias ? bias->const_data_ptr() : nullptr;
  op.columns = x.size(1);
  op.outputs = scale.size(0);
  op.groups = op.columns == 0 ? 0 : scale.size(1);
  op.size = op.groups == 0 ? 0 : op.columns / op.groups;
  op.packed = weight.scalar_type() == torch::headeronly::ScalarType::Byte;
  op.bytes = weight.size(1);
  op.limbs = x_bits / 8;
  op.dtype = dtype_of(x);
  op.scale_dtype = dtype_of(scale);
  op.bias_dtype = bias ? dtype_of(*bias) : op.scale_dtype;
  op.dot = dot_of(isa);
  for (int64_t g = 0; g < op.groups; ++g) op.chunks += op.chunks_of(g);
  const auto quantize = ZK_KERNEL_OF(quantize_rows, isa);
  const auto kernel = ZK_KERNEL_OF(quantized_linear, isa);
  const int64_t held = std::min(kHeld, x.size(0)), blocks = (held + kTile - 1) / kTile;
  op.tiles = op.limbs == 1 || op.limbs * held <= kTile ? 1 : op.limbs;
  op.across = op.tiles == 1 && op.limbs > 1 ? held : kTile;
  const Memory packed(blocks * op.chunks * op.tiles * kChunkBytes), steps(kHeld * sizeof(float));
  op.packed_x = packed.as<uint8_t>();
  op.steps = steps.as<float>();
  const int64_t bytes = size_of(op.dtype), groups = (op.outputs + kOutputs - 1) / kOutputs;
  for (int64_t row = 0; row < x.size(0); row += held) {
    op.rows = std::min(held, x.size(0) - row);
    op.x = ahead(x.const_data_ptr(), row * op.columns * bytes);
    op.out = ahead(out.mutable_data_ptr(), row * op.outputs * bytes);
    const int64_t work = op.rows * std::max<int64_t>(op.columns, 1);
    torch::stable::parallel_for(0, op.rows, std::max<int64_t>(1, kGrain * op.rows / work),
                                [&](int64_t begin, int64_t end) {
      const Memory scratch(row_floats(op.columns) * sizeof(float));
      quantize(op, begin, end, scratch.as<float>());
    });
    // A thread gets at least 2^18 bytes of weights.
    const int64_t grain = std::max<int64_t>(1,
                                            (int64_t{1} << 18) / (kOutputs * std::max<int64_t>(op.bytes, 1)));
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      const Memory scratch(tile_floats(op.groups) * sizeof(float));
      kernel(op, begin, end, scratch.as<float>());
    });
  }
  return out;
}

}  // namespace

ZK_REGISTER(
    quantized_linear,
    "quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int x_bits, str isa) -> Tensor")

}  // namespace zk::cpu

#endif
