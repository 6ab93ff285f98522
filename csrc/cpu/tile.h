// What the CPU kernels share, for any set of lanes L: storage of a dtype, noise, masks, and the walk over
// tiles.
//
// Work proceeds in tiles of L::width blocks of eight elements, which are aligned to logical indices. A tile
// that the span covers only in part is computed in a small buffer, so heads and tails of a tensor need no
// code of their own.
#pragma once

#include "../noise/integers.h"
#include "../noise/masks.h"
#include "../noise/normal.h"
#include "../noise/rademacher.h"
#include "../noise/rounding.h"
#include "../noise/wire.h"
#include "kernels.h"
#include ZK_LANES_HEADER

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

// A word holds two elements, as it does in half precision, so the elements of a register are those of its
// noise.
template <class L>
struct Storage<L, DType::i8> {
  using T = uint8_t;
  using F = typename L::F;
  using U = typename L::U;
  static ZK_HD void load(const T* p, F x[8]) {
    // a word with the byte in its highest place is the value times 2^24
    const F unit = Splat<F>::of(0x1p-24f);
    U w[4];
    L::load_byte_pairs(p, w);
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = mul(signed_to_float(w[i] << 24), unit);
      x[2 * i + 1] = mul(signed_to_float((w[i] << 16) & Splat<U>::of(0xff000000u)), unit);
    }
  }
  template <bool Stochastic>
  static ZK_HD void store(T* p, const F x[8], const Words<U>& random) {
    U w[4];
    for (int i = 0; i < 4; ++i) {
      U low, high;
      if constexpr (Stochastic) {
        low = integer_stochastic(x[2 * i], random.w[i] & Splat<U>::of(0xffffu));
        high = integer_stochastic(x[2 * i + 1], random.w[i] >> 16);
      } else {
        low = nearest_int(x[2 * i]);
        high = nearest_int(x[2 * i + 1]);
      }
      w[i] = and_or(low, Splat<U>::of(0xffu), high << 8);
    }
    L::store_byte_pairs(p, w);
  }
};

// The codes of a wire buffer, without their scales. Only encode writes them, so there is no store here.
template <class L>
struct Storage<L, DType::e4m3> {
  using T = uint8_t;
  using U = typename L::U;
  static ZK_HD void load(const T* p, typename L::F x[8]) {
    const U rest = Splat<U>::of(0x07f00000u), sign = Splat<U>::of(0x80000000u);
    U w[4];
    L::load_byte_pairs(p, w);
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = e4m3_value((w[i] << 20) & rest, (w[i] << 24) & sign);
      x[2 * i + 1] = e4m3_value((w[i] << 12) & rest, (w[i] << 16) & sign);
    }
  }
};

template <class L>
ZK_HD PhiloxState<L> begin_draw(const PhiloxKey& key, uint64_t block, Stream stream, Domain domain) {
  return {L::counter(static_cast<uint32_t>(block)), static_cast<uint32_t>(block >> 32), stream.low,
          stream.with(domain), key};
}

template <class L>
ZK_HD Words<typename L::U> draw(const PhiloxKey& key, uint64_t block, Stream stream, Domain domain) {
  return philox<L>(L::counter(static_cast<uint32_t>(block)), static_cast<uint32_t>(block >> 32), stream.low,
                   stream.with(domain), key);
}

// The noise of a run of tiles. The caller asks for it in order: all `count` directions of a tile, then the
// next tile. scratch has kScratchPerDirection bytes for each direction. The functions:
//   enter(block, stop)   prepares the blocks from `block` on, and returns the first block that it has not
//                        prepared, at most `stop`; the caller enters again there
//   take(k, tile)        makes z the noise of direction k for a tile
//   add_to(from, c, to)  to = from + c z
//   values(to)           to = z
template <class L, Domain Dist>
struct Noise;

// The random words are drawn one request ahead: while the transform turns the words at hand into normals, two
// rounds of Philox for the next request run beside each pair of elements. Each of the two alone is a chain of
// dependent instructions, during which the machine would idle half of the time.
template <class L>
struct Noise<L, kNormal> {
  using F = typename L::F;
  const PhiloxKey* keys;
  int64_t count;
  Stream stream;
  Words<typename L::U> words{};
  F z[8];

  ZK_HD Noise(const PhiloxKey* keys, int64_t count, Stream stream, uint64_t block, void*)
      : keys(keys), count(count), stream(stream) {
    if (count > 0) words = draw<L>(keys[0], block, stream, kNormal);
  }
  ZK_HD uint64_t enter(uint64_t, uint64_t stop) { return stop; }
  template <class Tile>
  ZK_HD void take(int64_t k, const Tile& tile) {
    const bool last = k + 1 == count;
    const PhiloxKey& key = keys[last ? 0 : k + 1];
    PhiloxState<L> state = begin_draw<L>(key, last ? tile.block + L::width : tile.block, stream, kNormal);
    normal8(words, z, Splat<typename L::U>::of(kMantissa), [&](int p) __attribute__((always_inline)) {
      state.round(key, 2 * p + 2);
      state.round(key, 2 * p + 3);
    });
    words = state.words();
  }
  ZK_HD void add_to(const F from[8], F c, F to[8]) const {
    for (int e = 0; e < 8; ++e) to[e] = fma(c, z[e], from[e]);
  }
  ZK_HD void values(F to[8]) const {
    for (int e = 0; e < 8; ++e) to[e] = z[e];
  }
};

template <class L>
struct Noise<L, kRademacher> {
  using F = typename L::F;
  const PhiloxKey* keys;
  int64_t count;
  Stream stream;
  // The sign bits of a tile of 4096 elements, for each direction. A vec is eight elements, whose signs are a
  // byte; a word at [direction][vec / 4 % 8][vec / 32] holds those of four consecutive vecs.
  uint32_t* signs;
  const uint32_t* here = nullptr;
  int vec = 0;

  ZK_HD Noise(const PhiloxKey* keys, int64_t count, Stream stream, uint64_t, void* scratch)
      : keys(keys), count(count), stream(stream), signs(static_cast<uint32_t*>(scratch)) {}
  ZK_HD uint64_t enter(uint64_t block, uint64_t stop) {
    const uint64_t sign_tile = block / (kRademacherTile / 8), next = (sign_tile + 1) * (kRademacherTile / 8);
    for (int64_t k = 0; k < count; ++k) {
      alignas(64) uint8_t bytes[kRademacherBlocks][16];
      for (int b = 0; b < kRademacherBlocks; b += L::width) {
        const auto words = draw<L>(keys[k], sign_tile * kRademacherBlocks + b, stream, kRademacher);
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
  template <class Tile>
  ZK_HD void take(int64_t k, const Tile& tile) {
    vec = static_cast<int>(tile.block & (kRademacherTile / 8 - 1));
    here = signs + k * (kRademacherTile / 32) + (vec / 4 & 7) * 16 + (vec >> 5);
  }
  ZK_HD void add_to(const F from[8], F c, F to[8]) const {
    for (int i = 0; i < 4; ++i) {  // from + (+-c) is the contract's fma(c, +-1, from): the product is exact
      F c0, c1;
      L::plus_minus(here, vec, i, c, c0, c1);
      to[2 * i] = add(from[2 * i], c0);
      to[2 * i + 1] = add(from[2 * i + 1], c1);
    }
  }
  ZK_HD void values(F to[8]) const {
    for (int i = 0; i < 4; ++i) L::plus_minus(here, vec, i, Splat<F>::of(1.0f), to[2 * i], to[2 * i + 1]);
  }
};

// An output of at least this many bytes that the operation does not read is written past the caches, as a
// large memcpy does. The memory then need not be read before it is overwritten. Rademacher bf16 out of place
// takes 0.083 instead of 0.104 ns an element.
constexpr int64_t kStream = 8 << 20;

// A tile. Its elements [skip, skip + count) are to be computed, and the first of them is element `first` of
// the tensor. `run` is the number of elements in the run of whole tiles to which this one belongs.
template <class L, bool Whole>
struct Tile {
  static constexpr int64_t size = 8 * L::width;
  static constexpr bool whole = Whole;
  uint64_t block;
  int64_t first;
  int64_t skip = 0, count = size, run = 0;

  // The same tile for an array that begins with element `origin` of the tensor.
  ZK_HD Tile from(int64_t origin) const { return {block, first - origin, skip, count, run}; }

  // Calls body(pointer) with the tile's elements of an array as large as the tensor. A whole tile is read
  // where it lies, a partial one from a copy that is filled up with zeros.
  template <class T, class Body>
  ZK_HD void read(const void* array, const Body& body) const {
    const T* p = static_cast<const T*>(array) + first;
    if constexpr (Whole) {
      body(p);
    } else {
      alignas(64) T buffer[size] = {};
      __builtin_memcpy(buffer + skip, p, count * sizeof(T));
      body(static_cast<const T*>(buffer));
    }
  }
  // Calls body(pointer), which writes the tile. `fresh` says that the operation does not read the array.
  template <class T, class Body>
  ZK_HD void write(void* array, bool fresh, const Body& body) const {
    alignas(64) T buffer[size];
    T* p = static_cast<T*>(array) + first;
    if constexpr (Whole) {
      const bool streams = fresh && run * sizeof(T) >= kStream && reinterpret_cast<uint64_t>(p) % 64 == 0;
      body(streams ? buffer : p);
      if (streams) L::stream(p, buffer, sizeof(buffer));
    } else {
      body(static_cast<T*>(buffer));
      __builtin_memcpy(p, buffer + skip, count * sizeof(T));
    }
  }
};

// Computes the whole tiles of blocks [block, stop). It is a function of its own so that no condition of a
// partial tile is tested here. `body` comes by value: what it holds by value can then stay in registers,
// because no store through a pointer can change it.
template <class L, class Begin, class Body>
__attribute__((noinline)) void whole_tiles(uint64_t block, uint64_t stop, int64_t first, const Begin& begin,
                                           Body body) {
  auto noise = begin(block);
  const int64_t run = static_cast<int64_t>(stop - block) * 8;
  while (block < stop) {
    for (const uint64_t pause = noise.enter(block, stop); block < pause;
         block += L::width, first += 8 * L::width) {
      body(Tile<L, true>{block, first, 0, 8 * L::width, run}, noise);
    }
  }
  if (run >= kStream / 4) L::stream_end();
}

template <class L, class Begin, class Body>
__attribute__((noinline)) void part_tile(const Tile<L, false>& tile, const Begin& begin, const Body& body) {
  auto noise = begin(tile.block);
  noise.enter(tile.block, tile.block + L::width);
  body(tile, noise);
}

// Calls body(tile, noise) for the tiles of a span; begin(block) makes the noise from that block on. Blocks
// and `index` count logical elements; `first` counts elements of the tensor, so that no pointer leaves its
// array.
template <class L, class Begin, class Body>
void for_tiles(const Span& span, const Begin& begin, const Body& body) {
  constexpr int64_t size = Tile<L, true>::size;
  for (int64_t first = span.begin; first < span.end;) {
    const uint64_t index = span.offset + static_cast<uint64_t>(first), block = index / size * L::width;
    const int64_t skip = static_cast<int64_t>(index % size), left = span.end - first;
    int64_t count = left / size * size;
    if (skip == 0 && count > 0) {
      whole_tiles<L>(block, block + count / 8, first, begin, body);
    } else {
      count = left < size - skip ? left : size - skip;
      part_tile<L>({block, first, skip, count}, begin, body);
    }
    first += count;
  }
}

template <class L, DType D, class Tile>
ZK_HD void load(const void* array, const Tile& tile, typename L::F x[8]) {
  using S = Storage<L, D>;
  tile.template read<typename S::T>(array, [&](const auto* p) ZK_INLINE { S::load(p, x); });
}

template <class L, DType D, bool Stochastic, class Tile>
ZK_HD void store(void* array, const Tile& tile, const typename L::F x[8], const Words<typename L::U>& random,
                 bool fresh = false) {
  using S = Storage<L, D>;
  tile.template write<typename S::T>(array, fresh,
                                     [&](auto* p) ZK_INLINE { S::template store<Stochastic>(p, x, random); });
}

// Loads a state or a curvature. Rounding does not look for NaNs (noise/rounding.h), so those of fp32 arrays
// are made canonical here; those of bf16 end in zeros and are harmless.
template <class L, class Tile>
ZK_HD void load_state(DType dtype, const void* array, const Tile& tile, typename L::F x[8]) {
  if (dtype == DType::bf16) return load<L, DType::bf16>(array, tile, x);
  load<L, DType::f32>(array, tile, x);
  for (int e = 0; e < 8; ++e) x[e] = without_payload(x[e]);
}

// Sets the top bit of kept[e] where the masks keep the element. Returns false, and sets nothing, if there is
// no mask.
template <class L, class Tile>
ZK_HD bool draw_mask(const Terms& op, const Span& span, const Tile& tile, typename L::U kept[8]) {
  using U = typename L::U;
  if (span.mask == nullptr && !op.has_mask_seed) return false;
  for (int e = 0; e < 8; ++e) kept[e] = Splat<U>::of(0x80000000u);
  if (span.mask != nullptr) {
    const int64_t lead = static_cast<int64_t>(span.offset % 8);  // the place of element 0 in its byte
    const int64_t from = (tile.first + lead) / 8, to = (tile.first + lead + tile.count + 7) / 8;
    alignas(64) uint8_t bytes[L::width] = {};
    __builtin_memcpy(bytes + tile.skip / 8, span.mask + from, to - from);
    for (int e = 0; e < 8; ++e) kept[e] = kept_by_bit(L::mask_bits(bytes, e >> 1), 30 + (e & 1));
  }
  if (op.has_mask_seed) {
    const Words<U> fields = draw<L>(op.mask, tile.block, span.stream, kMask);
    for (int e = 0; e < 8; ++e) kept[e] = kept[e] & kept_by_field(fields, e, op.mask_keep);
  }
  return true;
}

// Fetches the memory that lies kPrefetch bytes ahead, because the hardware's own prefetch stops at each page
// and starts late. Rademacher bf16 in place, from memory, takes 0.074 ns an element without it, 0.080 with 2
// KiB, 0.069 with 4 and 0.068 with 8 or 16; a plain pass over the same bytes takes 0.066.
constexpr uint64_t kPrefetch = 8192;

ZK_HD void prefetch(const void* p, uint64_t bytes) {
  const auto address = reinterpret_cast<uint64_t>(p) + kPrefetch;
  for (uint64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const void*>(address + b), 1);
}

}  // namespace zk::cpu
