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
      const U low = Stochastic ? bf16_stochastic(b0, random.w[i] & Splat<U>::of(0xffffu)) : bf16_nearest(b0);
      const U high = Stochastic ? bf16_stochastic(b1, random.w[i] >> 16) : bf16_nearest(b1);
      w[i] = and_or(high, Splat<U>::of(0xffff0000u), low >> 16);
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
  ZK_HD void enter(uint64_t) {}
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
  using U = typename L::U;
  static constexpr int groups = kRademacherBlocks / L::width;
  const Direction* directions;
  int64_t count;
  uint32_t stream;
  Words<U>* signs;  // the words of the 32 blocks of a tile of 4096, [direction][group]
  uint64_t signs_of = ~uint64_t{0};
  U bits[4];  // bit 30 for the first and bit 31 for the second element of a pair

  ZK_HD Noise(const Direction* directions, int64_t count, uint32_t stream, uint64_t, void* scratch)
      : directions(directions), count(count), stream(stream), signs(static_cast<Words<U>*>(scratch)) {}
  ZK_HD void enter(uint64_t block) {
    if (block / (kRademacherTile / 8) == signs_of) return;
    signs_of = block / (kRademacherTile / 8);
    for (int64_t k = 0; k < count; ++k) {
      for (int g = 0; g < groups; ++g) {
        signs[k * groups + g] = draw<L>(directions[k].key, signs_of * kRademacherBlocks + g * L::width, stream, kRademacher);
      }
    }
  }
  ZK_HD void take(int64_t k, uint64_t block) {
    const int vec = static_cast<int>(block & (kRademacherTile / 8 - 1));
    const Words<U>& words = signs[k * groups + (vec & 31) / L::width];
    for (int i = 0; i < 4; ++i) bits[i] = L::sign_bits(words.w, i, vec >> 5);
  }
  ZK_HD void add_to(const F from[8], F c, F to[8]) const {
    for (int e = 0; e < 8; ++e) to[e] = add(from[e], signed_coefficient(bits[e >> 1], 30 + (e & 1), c));  // fma(c, +-1, from)
  }
};

template <class T>
struct Pointers {
  const T* in;
  T *out, *plus, *minus;
};

// One tile: acc = decay * theta + sum c_k z_k, rounded once; then the fan-out.
template <class L, DType D, Domain Dist, bool Stochastic>
ZK_HD void combine_tile(const Combine& op, uint32_t stream, uint64_t block,
                        const Pointers<typename Storage<L, D>::T>& at, Noise<L, Dist>& noise) {
  using F = typename L::F;
  using S = Storage<L, D>;
  noise.enter(block);
  F acc[8];
  S::load(at.in, acc);
  if (op.has_decay) {
    for (int e = 0; e < 8; ++e) acc[e] = mul(Splat<F>::of(op.decay), acc[e]);
  }
  for (int64_t k = 0; k < op.count; ++k) {
    noise.take(k, block);
    noise.add_to(acc, Splat<F>::of(op.directions[k].coeff), acc);
  }
  if (at.out != nullptr) {
    Words<typename L::U> random{};
    if constexpr (Stochastic && D != DType::f32) random = draw<L>(op.rounding, block, stream, kRounding);
    S::template store<Stochastic>(at.out, acc, random);
  }
  if (op.fan_out) {
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

// Asks for the tile kPrefetch bytes ahead. The hardware's own prefetch stops at pages and starts late: in place on data in
// memory this takes Rademacher bf16 from 0.33 to 0.28 ns an element, a plain pass over the same bytes taking 0.30
// (AVX-512), and from 0.55 to 0.36 with AVX2; 1024 and 4096 bytes were no better.
constexpr uint64_t kPrefetch = 2048;

ZK_HD void prefetch(const void* p, uint64_t bytes) {
  const auto address = reinterpret_cast<uint64_t>(p) + kPrefetch;
  for (uint64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const void*>(address + b), 1);
}

template <class L, DType D, Domain Dist, bool Stochastic>
void combine_elements(const Combine& op, const Span& span, void* scratch) {
  using T = typename Storage<L, D>::T;
  constexpr int64_t tile = 8 * L::width;
  const Pointers<T> whole = {static_cast<const T*>(span.in), static_cast<T*>(span.out), static_cast<T*>(span.plus),
                             static_cast<T*>(span.minus)};
  // Logical indices; positions in the tensor are differences, to stay inside the arrays.
  uint64_t at = span.offset + static_cast<uint64_t>(span.begin);
  const uint64_t end = span.offset + static_cast<uint64_t>(span.end);
  Noise<L, Dist> noise(op.directions, op.count + (op.fan_out ? 1 : 0), span.stream, (at - at % tile) / 8, scratch);
  while (at < end) {
    const uint64_t base = at - at % tile;
    const uint64_t stop = end - base < static_cast<uint64_t>(tile) ? end : base + tile;
    const int64_t first = static_cast<int64_t>(at - span.offset);
    const auto moved = [first](T* p) { return p != nullptr ? p + first : nullptr; };
    const Pointers<T> here = {whole.in + first, moved(whole.out), moved(whole.plus), moved(whole.minus)};
    if (stop - at == static_cast<uint64_t>(tile)) {
      prefetch(here.in, tile * sizeof(T));
      if (here.out != here.in) prefetch(here.out, tile * sizeof(T));
      combine_tile<L, D, Dist, Stochastic>(op, span.stream, base / 8, here, noise);
    } else {
      alignas(64) T theta[tile] = {}, plus[tile], minus[tile];
      const int64_t skip = static_cast<int64_t>(at - base), bytes = static_cast<int64_t>(stop - at) * sizeof(T);
      __builtin_memcpy(theta + skip, here.in, bytes);
      const Pointers<T> buffered = {theta, here.out != nullptr ? theta : nullptr, plus, minus};
      combine_tile<L, D, Dist, Stochastic>(op, span.stream, base / 8, buffered, noise);
      if (here.out != nullptr) __builtin_memcpy(here.out, theta + skip, bytes);
      if (op.fan_out) {
        __builtin_memcpy(here.plus, plus + skip, bytes);
        __builtin_memcpy(here.minus, minus + skip, bytes);
      }
    }
    at = stop;
  }
}

template <class L, DType D>
void combine_dtype(const Combine& op, const Span& span, void* scratch) {
  if (op.dist == kNormal) {
    op.stochastic ? combine_elements<L, D, kNormal, true>(op, span, scratch)
                  : combine_elements<L, D, kNormal, false>(op, span, scratch);
  } else {
    op.stochastic ? combine_elements<L, D, kRademacher, true>(op, span, scratch)
                  : combine_elements<L, D, kRademacher, false>(op, span, scratch);
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
