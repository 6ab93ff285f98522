// The CPU kernel, for any set of lanes L: included by one translation unit per instruction set.
//
// Work proceeds in tiles of L::width blocks of eight elements, aligned to logical indices. A tile that the span covers in
// part goes through a small buffer, so there is no second code path for heads and tails.
#pragma once

#include "../noise/normal.h"
#include "../noise/rademacher.h"
#include "../noise/rounding.h"
#include "combine.h"

namespace zk::cpu {

template <class L, DType D>
struct Storage;

template <class L>
struct Storage<L, DType::f32> {
  using T = float;
  static ZK_HD void load(const T* p, typename L::F x[8]) { L::load_floats(p, x); }
  template <bool Stochastic>
  static ZK_HD void store(T* p, const typename L::F x[8], const Words<typename L::U>&) {
    L::store_floats(p, x);
  }
};

template <class L>
struct Storage<L, DType::bf16> {
  using T = uint16_t;
  using U = typename L::U;
  static ZK_HD void load(const T* p, typename L::F x[8]) {
    U w[4];
    L::load_words(reinterpret_cast<const uint32_t*>(p), w);
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = from_bits(w[i] << 16);
      x[2 * i + 1] = from_bits(w[i] & Splat<U>::of(0xffff0000u));
    }
  }
  template <bool Stochastic>
  static ZK_HD void store(T* p, const typename L::F x[8], const Words<U>& random) {
    U w[4];
    for (int i = 0; i < 4; ++i) {
      const U b0 = bits(x[2 * i]), b1 = bits(x[2 * i + 1]);
      w[i] = Stochastic ? high_halves(bf16_stochastic(b0, random.w[i] & Splat<U>::of(0xffffu)),
                                      bf16_stochastic(b1, random.w[i] >> 16))
                        : L::pack_bf16(b0, b1);
    }
    L::store_words(reinterpret_cast<uint32_t*>(p), w);
  }
};

template <class L>
struct Storage<L, DType::f16> {
  using T = uint16_t;
  using U = typename L::U;
  static ZK_HD void load(const T* p, typename L::F x[8]) { L::load_halves(p, x); }
  template <bool Stochastic>
  static ZK_HD void store(T* p, const typename L::F x[8], const Words<U>& random) {
    typename L::F y[8];
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = Stochastic ? half_stochastic(x[2 * i], random.w[i] & Splat<U>::of(0xffffu)) : x[2 * i];
      y[2 * i + 1] = Stochastic ? half_stochastic(x[2 * i + 1], random.w[i] >> 16) : x[2 * i + 1];
    }
    L::store_halves(p, y);
  }
};

template <class L>
ZK_HD PhiloxState<L> begin_draw(const PhiloxKey& key, uint64_t block, uint32_t stream, Domain domain) {
  return {L::counter(static_cast<uint32_t>(block)), static_cast<uint32_t>(block >> 32), stream, domain, key};
}

template <class L>
ZK_HD Words<typename L::U> draw(const PhiloxKey& key, uint64_t block, uint32_t stream, Domain domain) {
  return philox<L>(L::counter(static_cast<uint32_t>(block)), static_cast<uint32_t>(block >> 32), stream, domain, key);
}

// The noise of a run of tiles, asked for in order: every direction of a tile, then the next tile.
// scratch: kScratchPerDirection bytes a direction.
template <class L, Domain Dist>
struct Noise;

// Words are drawn one request ahead, two rounds next to each pair of the transform: each alone is a chain of dependent
// instructions that leaves the machine idle half of the time.
template <class L>
struct Noise<L, kNormal> {
  using F = typename L::F;
  const Direction* directions;
  int64_t count;
  uint32_t stream;
  Words<typename L::U> words{};
  F z[8];

  ZK_HD Noise(const Direction* directions, int64_t count, uint32_t stream, uint64_t block, void*)
      : directions(directions), count(count), stream(stream) {
    if (count > 0) words = draw<L>(directions[0].key, block, stream, kNormal);
  }
  ZK_HD uint64_t enter(uint64_t, uint64_t stop) { return stop; }
  ZK_HD void take(int64_t k, uint64_t block) {
    const bool last = k + 1 == count;
    const PhiloxKey& key = directions[last ? 0 : k + 1].key;
    PhiloxState<L> state = begin_draw<L>(key, last ? block + L::width : block, stream, kNormal);
    normal8(words, z, Splat<typename L::U>::of(kMantissa), [&](int p) __attribute__((always_inline)) {
      state.round(key, 2 * p + 2);
      state.round(key, 2 * p + 3);
    });
    words = state.words();
  }
  ZK_HD void add_to(const F from[8], F c, F to[8]) const {
    for (int e = 0; e < 8; ++e) to[e] = fma(c, z[e], from[e]);
  }
};

template <class L>
struct Noise<L, kRademacher> {
  using F = typename L::F;
  const Direction* directions;
  int64_t count;
  uint32_t stream;
  uint32_t* signs;  // of a tile of 4096, [direction][vec / 4 % 8][vec / 32]: the bytes of four consecutive vecs
  const uint32_t* here = nullptr;
  int vec = 0;

  ZK_HD Noise(const Direction* directions, int64_t count, uint32_t stream, uint64_t, void* scratch)
      : directions(directions), count(count), stream(stream), signs(static_cast<uint32_t*>(scratch)) {}
  ZK_HD uint64_t enter(uint64_t block, uint64_t stop) {
    const uint64_t sign_tile = block / (kRademacherTile / 8), next = (sign_tile + 1) * (kRademacherTile / 8);
    for (int64_t k = 0; k < count; ++k) {
      alignas(64) uint8_t bytes[kRademacherBlocks][16];
      for (int b = 0; b < kRademacherBlocks; b += L::width) {
        const auto words = draw<L>(directions[k].key, sign_tile * kRademacherBlocks + b, stream, kRademacher);
        L::store_words(reinterpret_cast<uint32_t*>(bytes[b]), words.w);
      }
      auto* of_direction = reinterpret_cast<uint8_t*>(signs + k * (kRademacherTile / 32));
      for (int quad = 0; quad < kRademacherBlocks / 4; ++quad) {
        for (int row = 0; row < 16; ++row) {
          for (int b = 0; b < 4; ++b) of_direction[64 * quad + 4 * row + b] = bytes[4 * quad + b][row];
        }
      }
    }
    return next < stop ? next : stop;
  }
  ZK_HD void take(int64_t k, uint64_t block) {
    vec = static_cast<int>(block & (kRademacherTile / 8 - 1));
    here = signs + k * (kRademacherTile / 32) + (vec / 4 & 7) * 16 + (vec >> 5);
  }
  ZK_HD void add_to(const F from[8], F c, F to[8]) const {
    for (int i = 0; i < 4; ++i) {  // fma(c, +-1, from)
      F c0, c1;
      L::plus_minus(here, vec, i, c, c0, c1);
      to[2 * i] = add(from[2 * i], c0);
      to[2 * i + 1] = add(from[2 * i + 1], c1);
    }
  }
};

template <class T>
struct Pointers {
  const T* in;
  T *out, *plus, *minus;  // null where not written
  ZK_HD void advance(int64_t n) {
    in += n;
    if (out != nullptr) out += n;
    if (plus != nullptr) plus += n, minus += n;
  }
};

// One tile: acc = decay * theta + sum c_k z_k, rounded once; then the fan-out.
// Plain: one direction, no decay, no fan-out, so that nothing is asked at run time.
template <class L, DType D, Domain Dist, bool Stochastic, bool Plain>
ZK_HD void combine_tile(const Combine& op, uint32_t stream, uint64_t block,
                        const Pointers<typename Storage<L, D>::T>& at, Noise<L, Dist>& noise) {
  using F = typename L::F;
  using S = Storage<L, D>;
  F acc[8];
  S::load(at.in, acc);
  if (!Plain && op.has_decay) {
    for (int e = 0; e < 8; ++e) acc[e] = mul(Splat<F>::of(op.decay), acc[e]);
  }
  for (int64_t k = 0; k < (Plain ? 1 : op.count); ++k) {
    noise.take(k, block);
    noise.add_to(acc, Splat<F>::of(op.directions[k].coeff), acc);
  }
  if (Plain || at.out != nullptr) {
    Words<typename L::U> random{};
    if constexpr (Stochastic) random = draw<L>(op.rounding, block, stream, kRounding);
    S::template store<Stochastic>(at.out, acc, random);
  }
  if (!Plain && op.fan_out) {
    if (at.out != nullptr) S::load(at.out, acc);  // as rounded
    const Direction& probe = op.directions[op.count];
    noise.take(op.count, block);
    F side[8];
    noise.add_to(acc, Splat<F>::of(probe.coeff), side);
    S::template store<false>(at.plus, side, {});
    noise.add_to(acc, Splat<F>::of(-probe.coeff), side);
    S::template store<false>(at.minus, side, {});
  }
}

// Asks for the tile kPrefetch bytes ahead: the hardware's own prefetch stops at pages and starts late. Rademacher bf16 in
// place, in memory: 0.074 ns an element without, 0.080 with 2 KiB, 0.069 with 4, 0.068 with 8 or 16, a plain pass 0.066.
constexpr uint64_t kPrefetch = 8192;

ZK_HD void prefetch(const void* p, uint64_t bytes) {
  const auto address = reinterpret_cast<uint64_t>(p) + kPrefetch;
  for (uint64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const void*>(address + b), 1);
}

// Outputs of this many bytes that are not the input bypass the caches, as a large memcpy does, which saves reading what is
// overwritten: Rademacher bf16 out of place 0.083 instead of 0.104 ns an element.
constexpr uint64_t kStream = 8 << 20;

// Whole tiles: the blocks [block, stop).
template <class L, DType D, Domain Dist, bool Stochastic, bool Plain>
__attribute__((noinline)) void combine_tiles(const Combine& op, uint32_t stream, uint64_t block, uint64_t stop,
                                             Pointers<typename Storage<L, D>::T> at, void* scratch) {
  using T = typename Storage<L, D>::T;
  constexpr int64_t tile = 8 * L::width, bytes = tile * sizeof(T);
  alignas(64) T out[tile], plus[tile], minus[tile];
  const auto streams = [&](const T* p) {
    return p != nullptr && p != at.in && reinterpret_cast<uint64_t>(p) % 64 == 0 && (stop - block) * 8 * sizeof(T) >= kStream;
  };
  const bool stream_out = streams(at.out), stream_sides = !Plain && streams(at.plus) && streams(at.minus);
  Noise<L, Dist> noise(op.directions, Plain ? 1 : op.count + op.fan_out, stream, block, scratch);
  while (block < stop) {
    for (const uint64_t pause = noise.enter(block, stop); block < pause; block += L::width) {
      prefetch(at.in, bytes);
      if (at.out != at.in && !stream_out) prefetch(at.out, bytes);
      const Pointers<T> to = {at.in, stream_out ? out : at.out, stream_sides ? plus : at.plus,
                              stream_sides ? minus : at.minus};
      combine_tile<L, D, Dist, Stochastic, Plain>(op, stream, block, to, noise);
      if (stream_out) L::stream(at.out, out, bytes);
      if (stream_sides) L::stream(at.plus, plus, bytes), L::stream(at.minus, minus, bytes);
      at.advance(tile);
    }
  }
  if (stream_out || stream_sides) L::stream_end();
}

template <class L, DType D, Domain Dist, bool Stochastic, bool Plain>
void combine_elements(const Combine& op, const Span& span, void* scratch) {
  using T = typename Storage<L, D>::T;
  constexpr uint64_t tile = 8 * L::width;
  Pointers<T> at = {static_cast<const T*>(span.in), static_cast<T*>(span.out), static_cast<T*>(span.plus),
                    static_cast<T*>(span.minus)};
  at.advance(span.begin);
  // Logical indices.
  uint64_t index = span.offset + static_cast<uint64_t>(span.begin);
  const uint64_t end = span.offset + static_cast<uint64_t>(span.end);
  while (index < end) {
    const uint64_t skip = index % tile, left = end - index, block = index / tile * L::width;
    uint64_t count = left / tile * tile;
    if (skip == 0 && count > 0) {
      combine_tiles<L, D, Dist, Stochastic, Plain>(op, span.stream, block, block + count / 8, at, scratch);
    } else {
      alignas(64) T theta[tile] = {}, plus[tile], minus[tile];
      count = left < tile - skip ? left : tile - skip;
      const uint64_t bytes = count * sizeof(T);
      __builtin_memcpy(theta + skip, at.in, bytes);
      combine_tiles<L, D, Dist, Stochastic, Plain>(op, span.stream, block, block + L::width,
                                                   {theta, at.out != nullptr ? theta : nullptr, plus, minus}, scratch);
      if (at.out != nullptr) __builtin_memcpy(at.out, theta + skip, bytes);
      if (op.fan_out) {
        __builtin_memcpy(at.plus, plus + skip, bytes);
        __builtin_memcpy(at.minus, minus + skip, bytes);
      }
    }
    index += count;
    at.advance(static_cast<int64_t>(count));
  }
}

template <class L, DType D, Domain Dist, bool Stochastic>
void combine_form(const Combine& op, const Span& span, void* scratch) {
  op.count == 1 && !op.has_decay && !op.fan_out ? combine_elements<L, D, Dist, Stochastic, true>(op, span, scratch)
                                                : combine_elements<L, D, Dist, Stochastic, false>(op, span, scratch);
}

template <class L, DType D>
void combine_dtype(const Combine& op, const Span& span, void* scratch) {
  constexpr bool rounds = D != DType::f32;
  if (op.dist == kNormal) {
    op.stochastic ? combine_form<L, D, kNormal, rounds>(op, span, scratch)
                  : combine_form<L, D, kNormal, false>(op, span, scratch);
  } else {
    op.stochastic ? combine_form<L, D, kRademacher, rounds>(op, span, scratch)
                  : combine_form<L, D, kRademacher, false>(op, span, scratch);
  }
}

template <class L>
void combine_span(const Combine& op, const Span& span, void* scratch) {
  switch (op.dtype) {
    case DType::f32: return combine_dtype<L, DType::f32>(op, span, scratch);
    case DType::bf16: return combine_dtype<L, DType::bf16>(op, span, scratch);
    case DType::f16: return combine_dtype<L, DType::f16>(op, span, scratch);
  }
}

}  // namespace zk::cpu
