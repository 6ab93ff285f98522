// What the kernels share: the drawing of noise, the search of the table, and the access to eight elements.
//
// A thread owns whole Philox blocks of eight elements. So a block is one access of 16 bytes in half
// precision, and no random number is thrown away. Chunks that lie inside their tensor and are aligned take
// the fast path. All others (the first and the last chunk of a tensor, shards that start inside a block) go
// through the same arithmetic element by element.
//
// Threads neither communicate nor synchronise, so tests/cuda_on_host runs the kernels on the CPU, thread by
// thread.
#pragma once

#include "../noise/rademacher.h"
#include "pair.cuh"
#include "storage.cuh"
#include "update.h"

#if defined(__CUDACC__)
#define ZK_DEVICE __device__ __forceinline__
#define ZK_GLOBAL __global__ void __launch_bounds__(zk::cuda::kThreads)
#define ZK_GRID_CONSTANT const __grid_constant__
#define ZK_UNROLL _Pragma("unroll")
#define ZK_NO_UNROLL _Pragma("unroll 1")
#else
#define ZK_DEVICE inline
#define ZK_GLOBAL void
#define ZK_GRID_CONSTANT const
#define ZK_UNROLL
#define ZK_NO_UNROLL
#endif

namespace zk::cuda {

ZK_DEVICE uint64_t seed_at(const int64_t* seeds, int k) { return static_cast<uint64_t>(seeds[k]); }

ZK_DEVICE Words<uint32_t> draw(const PhiloxKey& key, uint64_t block, Stream stream, Domain domain) {
  return philox<Scalar>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream.low,
                        stream.with(domain), key);
}

// The word that holds byte number `byte`. An index would move the registers to memory, so words are selected.
ZK_DEVICE uint32_t word_of(const Words<uint32_t>& x, int byte) {
  const uint32_t low = byte & 4 ? x.w[1] : x.w[0], high = byte & 4 ? x.w[3] : x.w[2];
  return byte & 8 ? high : low;
}

// The tensor to which chunk number `chunk` belongs. It is the same one for all threads of a block, so the
// table is read like constants.
template <class Table>
ZK_DEVICE int tensor_of(const Table& table, uint32_t chunk) {
  int low = 0, high = table.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Eight elements from position `first` on, of which some may lie outside of [0, numel). They are read and
// written one by one.
struct EdgeAccess {
  int64_t first, numel;

  ZK_DEVICE bool inside(int e) const { return first + e >= 0 && first + e < numel; }
  template <DType D>
  ZK_DEVICE typename Storage<D>::Raw load(const void* p) const {
    using T = typename Storage<D>::T;
    Buffer<D> buffer;
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e)
      buffer.element[e] = inside(e) ? static_cast<const T*>(p)[first + e] : T{};
    return buffer.raw;
  }
  template <DType D>
  ZK_DEVICE void store(void* p, const typename Storage<D>::Raw& raw) const {
    Buffer<D> buffer;
    buffer.raw = raw;
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (inside(e)) static_cast<typename Storage<D>::T*>(p)[first + e] = buffer.element[e];
    }
  }

 private:
  template <DType D>
  union Buffer {
    typename Storage<D>::Raw raw;
    typename Storage<D>::T element[kVector];
  };
};

// Eight elements inside the tensor at an aligned address: vector number `step` from element `base` on. Base
// and step are kept apart, so that one address serves all steps and a step is an immediate of the
// instruction. This saves 0.9 instructions for a Rademacher element.
struct VectorAccess {
  int64_t base;
  int step;

  template <DType D>
  ZK_DEVICE typename Storage<D>::Raw load(const void* p) const {
    using S = Storage<D>;
    return reinterpret_cast<const typename S::Raw*>(static_cast<const typename S::T*>(p) + base)[step];
  }
  template <DType D>
  ZK_DEVICE void store(void* p, const typename Storage<D>::Raw& raw) const {
    using S = Storage<D>;
    reinterpret_cast<typename S::Raw*>(static_cast<typename S::T*>(p) + base)[step] = raw;
  }
};

ZK_DEVICE void atomic_add(unsigned long long* p, unsigned long long value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(p, value);
#else
  *p += value;
#endif
}

ZK_DEVICE uint64_t address(const void* p) { return reinterpret_cast<uint64_t>(p); }

// Whether vectors of D, which are whole Philox blocks, may be read at `addresses`: several addresses, or-ed.
template <DType D>
ZK_DEVICE bool is_aligned(uint64_t addresses, uint64_t offset) {
  return (addresses % alignof(typename Storage<D>::Raw) | offset % kVector) == 0;
}

// A warp's part of a chunk: vecs of eight elements from logical index `start` on, of which a lane has the
// vecs 32 * step + lane. The order is the same for both distributions. With Rademacher noise all vecs of a
// lane have their signs in one block.
template <Domain Dist>
struct Tile {
  static constexpr int64_t kChunk = chunk_of(Dist), kAligned = tile_of(Dist);
  static constexpr int kVecs = kChunk / kThreads / kVector;  // how many a lane has
  static constexpr int64_t kElements = int64_t{32} * kVector * kVecs;
  uint64_t start;
  int64_t position;  // where `start` is in the tensor
  Stream stream;
  uint32_t lane, mantissa;

  ZK_DEVICE Tile(uint64_t offset, uint64_t chunk, Stream stream_, uint32_t mantissa_)
      : stream(stream_), lane(threadIdx.x % 32), mantissa(mantissa_) {
    start = offset / kAligned * kAligned + chunk * kChunk + threadIdx.x / 32 * kElements;
    position = static_cast<int64_t>(start - offset);
  }
  // Whether all of it lies inside the tensor, and the low word of the counter does not wrap.
  ZK_DEVICE bool is_whole(int64_t numel) const {
    return position >= 0 && position + kElements <= numel &&
           static_cast<uint32_t>(start / kVector) <= 0xffffffffu - 32 * kVecs;
  }
  template <bool Whole>
  ZK_DEVICE uint64_t block(int step) const {
    const uint64_t first = start / kVector;
    if constexpr (!Whole) return first + 32 * step + lane;
    // The sum cannot carry into the upper word. Written in this way, the compiler knows it.
    return (first & 0xffffffff00000000u) | (static_cast<uint32_t>(first) + lane + 32 * step);
  }
  ZK_DEVICE EdgeAccess edge(int step, int64_t numel) const {
    return {position + (32 * step + static_cast<int64_t>(lane)) * kVector, numel};
  }
  ZK_DEVICE VectorAccess vector(int step) const {
    return {position + static_cast<int64_t>(lane) * kVector, 32 * step};
  }
  ZK_DEVICE bool is_outside(int64_t numel) const { return position >= numel; }
  ZK_DEVICE bool exists(int step, int64_t numel) const {
    const EdgeAccess at = edge(step, numel);
    return at.first + kVector > 0 && at.first < numel;
  }
  ZK_DEVICE uint64_t offset() const { return start - static_cast<uint64_t>(position); }
  ZK_DEVICE uint64_t alignment() const { return offset(); }
  ZK_DEVICE uint64_t mask_byte(uint64_t block, int) const { return block - offset() / kVector; }
};

// Eight elements of one row, some of which may lie outside of the row.
struct RowAccess {
  int64_t base;  // where the row begins
  EdgeAccess edge;

  template <DType D>
  ZK_DEVICE typename Storage<D>::Raw load(const void* p) const {
    return edge.template load<D>(static_cast<const typename Storage<D>::T*>(p) + base);
  }
  template <DType D>
  ZK_DEVICE void store(void* p, const typename Storage<D>::Raw& raw) const {
    edge.template store<D>(static_cast<typename Storage<D>::T*>(p) + base, raw);
  }
};

// The rows of a tensor, cut into vecs that are Philox blocks, `blocks` of them in each row. As in a Tile, the
// vecs of a warp follow each other, and those of a lane are 32 apart. Where offset, width and length are
// multiples of eight, they are also the vecs of the memory, and are accessed as those of a tensor in one
// piece. The row of a vec is found by a product and a shift.
template <Domain Dist>
struct RowTile {
  static constexpr int kVecs = kRowVecs;
  const RowsEntry& t;
  Stream stream;
  uint32_t mantissa;
  uint64_t vec;        // the number of the chunk's first vec
  uint64_t row;        // the row of that vec
  uint32_t column;     // its place in the row
  uint32_t own;        // how many vecs after it the thread's first one comes
  uint64_t row_block;  // the Philox block with which its row begins, where all is aligned

  ZK_DEVICE RowTile(const RowsEntry& t_, uint64_t chunk, Stream stream_, uint32_t mantissa_)
      : t(t_), stream(stream_), mantissa(mantissa_), own(threadIdx.x / 32 * (32 * kVecs) + threadIdx.x % 32) {
    vec = chunk * kRowChunk;
    row = vec >> 31 ? vec / t.blocks.divisor : t.blocks.quotient(static_cast<uint32_t>(vec));
    column = static_cast<uint32_t>(vec - row * t.blocks.divisor);
    row_block = (t.offset + row * static_cast<uint64_t>(t.length)) / kVector;
  }
  ZK_DEVICE uint32_t ahead(int step) const { return column + own + 32 * step; }
  ZK_DEVICE uint64_t row_of(int step) const { return row + t.blocks.quotient(ahead(step)); }
  ZK_DEVICE uint64_t row_start(int step) const {
    return t.offset + row_of(step) * static_cast<uint64_t>(t.length);
  }
  // How many blocks lie between the last one of a row and the first one of the next, where all is aligned.
  ZK_DEVICE uint64_t skipped() const { return static_cast<uint64_t>(t.length) / kVector - t.blocks.divisor; }
  template <bool Whole>
  ZK_DEVICE uint64_t block(int step) const {
    const uint32_t n = ahead(step), rows = t.blocks.quotient(n);
    if constexpr (!Whole) return row_start(step) / kVector + (n - rows * t.blocks.divisor);
    return (row_block & 0xffffffff00000000u) |
           (static_cast<uint32_t>(row_block) + n + rows * static_cast<uint32_t>(skipped()));
  }
  ZK_DEVICE bool is_outside(int64_t) const { return false; }
  ZK_DEVICE bool exists(int step, int64_t numel) const {
    return static_cast<int64_t>(row_of(step)) * t.width < numel &&
           static_cast<int64_t>(block<false>(step) * kVector - row_start(step)) < t.width;
  }
  // For aligned rows: whether all vecs exist, and have the same upper word of the counter.
  ZK_DEVICE bool is_whole(int64_t numel) const {
    const uint32_t last = column + static_cast<uint32_t>(kRowChunk) - 1;
    const uint64_t last_block = row_block + last + t.blocks.quotient(last) * skipped();
    return vec + kRowChunk <= static_cast<uint64_t>(numel) / kVector && (row_block ^ last_block) >> 32 == 0;
  }
  ZK_DEVICE uint64_t alignment() const { return t.offset | static_cast<uint64_t>(t.width | t.length); }
  ZK_DEVICE uint64_t mask_byte(uint64_t, int step) const { return vec + own + 32 * step; }
  ZK_DEVICE RowAccess edge(int step, int64_t) const {
    const int64_t first = static_cast<int64_t>(block<false>(step) * kVector - row_start(step));
    return {static_cast<int64_t>(row_of(step)) * t.width, {first, t.width}};
  }
  ZK_DEVICE VectorAccess vector(int step) const {
    return {static_cast<int64_t>(vec + own) * kVector, 32 * step};
  }
};

// Draws z of one direction for the vecs of a tile.
template <class Tile>
struct Noise;

template <>
struct Noise<Tile<kNormal>> {
  PhiloxKey key;

  ZK_DEVICE Noise(uint64_t seed, const Tile<kNormal>&) : key(philox_key(seed)) {}
  template <bool Whole>
  ZK_DEVICE void vec(const Tile<kNormal>& tile, int step, float z[kVector]) const {
    normals(draw(key, tile.template block<Whole>(step), tile.stream, kNormal), z, tile.mantissa);
  }
};

template <>
struct Noise<Tile<kRademacher>> {
  Words<uint32_t> signs;

  ZK_DEVICE Noise(uint64_t seed, const Tile<kRademacher>& tile)
      : signs(draw(philox_key(seed), tile.start / kRademacherTile * kRademacherBlocks + tile.lane,
                   tile.stream, kRademacher)) {}
  template <bool Whole>
  ZK_DEVICE void vec(const Tile<kRademacher>&, int step, float z[kVector]) const {
    const uint32_t word = word_of(signs, step) >> (8 * (step % 4));
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) z[e] = signed_coefficient(word, e, 1.0f);
  }
};

template <>
struct Noise<RowTile<kNormal>> {
  PhiloxKey key;

  ZK_DEVICE Noise(uint64_t seed, const RowTile<kNormal>&) : key(philox_key(seed)) {}
  template <bool Whole>
  ZK_DEVICE void vec(const RowTile<kNormal>& tile, int step, float z[kVector]) const {
    normals(draw(key, tile.template block<Whole>(step), tile.stream, kNormal), z, tile.mantissa);
  }
};

template <>
struct Noise<RowTile<kRademacher>> {
  PhiloxKey key;
  uint64_t drawn = ~uint64_t{0};  // the block that was drawn last; at first the number of no block
  Words<uint32_t> signs{};

  ZK_DEVICE Noise(uint64_t seed, const RowTile<kRademacher>&) : key(philox_key(seed)) {}
  // Vecs that are 32 apart have their signs in the same block, as long as they stay in one row and one tile.
  // So the block that was drawn last is kept.
  template <bool Whole>
  ZK_DEVICE void vec(const RowTile<kRademacher>& tile, int step, float z[kVector]) {
    constexpr uint64_t kTileVecs = kRademacherTile / kVector;
    const uint64_t vec = tile.template block<Whole>(step);
    const uint64_t block = vec / kTileVecs * kRademacherBlocks + vec % kRademacherBlocks;
    if (block != drawn) signs = draw(key, drawn = block, tile.stream, kRademacher);
    const int byte = static_cast<int>(vec % kTileVecs) / kRademacherBlocks;
    const uint32_t word = word_of(signs, byte) >> (8 * (byte % 4));
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) z[e] = signed_coefficient(word, e, 1.0f);
  }
};

// Goes through a tile. Where it is whole and `aligned`, N vecs are done together, so that N loads are in
// flight and share what each direction costs. At the edges of a tensor vecs are done one by one. The work is
// pass.template operator()<N, Whole>(first step, access of a step).
template <int N, class Tile, class Pass>
ZK_DEVICE void for_groups(const Tile& tile, int64_t numel, bool aligned, const Pass& pass) {
  if (aligned && tile.is_whole(numel)) {
    ZK_NO_UNROLL
    for (int first = 0; first < Tile::kVecs; first += N) {
      pass.template operator()<N, true>(first, [&](int step) { return tile.vector(step); });
    }
  } else {
    ZK_NO_UNROLL
    for (int step = 0; step < Tile::kVecs; ++step) {
      if (tile.exists(step, numel)) {
        const auto at = tile.edge(step, numel);
        pass.template operator()<1, false>(step, [&](int) { return at; });
      }
    }
  }
}

}  // namespace zk::cuda
