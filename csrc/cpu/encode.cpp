// encode: parameters as the bytes of a wire format. A block of 32 is an array, whose loops the compiler vectorizes.
#include "../noise/wire.h"
#include "lanes_portable.h"
#include "tile.h"

namespace zk::cpu {
namespace {

template <DType D>
using Element = typename Storage<Portable, D>::T;

template <DType D>
ZK_HD float to_float(Element<D> x) {
  if constexpr (D == DType::bf16) return zk::from_bits(static_cast<uint32_t>(x) << 16);
  if constexpr (D == DType::f16) return Portable::from_half(x);
  if constexpr (D == DType::f32) return x;
}

template <DType W>
ZK_HD Element<W> to_sixteen(float x) {
  if constexpr (W == DType::bf16) return static_cast<uint16_t>(bf16_nearest(zk::bits(without_payload(x))) >> 16);
  return static_cast<uint16_t>(Portable::to_half(zk::from_bits(saturated_half(zk::bits(x)))));
}

// Codes of a block, whose elements that do not exist are 0; gives the scale byte.
template <DType W>
ZK_HD uint32_t encode_block(const float x[kWireBlock], uint8_t code[kWireBlock]) {
  uint32_t top = 0;
  for (int e = 0; e < kWireBlock; ++e) {
    const uint32_t mag = magnitude(zk::bits(x[e]));
    top = mag > top ? mag : top;
  }
  const uint32_t scale = wire_scale_byte(top, W == DType::e4m3 ? kFp8Emax : kInt8Emax);
  if (scale == 255) {
    __builtin_memset(code, 0, kWireBlock);
    return scale;
  }
  const float inverse = wire_scale(254 - scale);
  uint32_t wide[kWireBlock];
  for (int e = 0; e < kWireBlock; ++e) {
    const float y = zk::mul(x[e], inverse);
    wide[e] = W == DType::e4m3 ? e4m3_code(y) : int8_code(y);
  }
  for (int e = 0; e < kWireBlock; ++e) code[e] = static_cast<uint8_t>(wide[e]);
  return scale;
}

// Elements [from, from + count) of a block; Whole: all 32, so that copies have a constant size.
template <DType D, DType W, bool Whole>
ZK_HD void run_block(const Encode& op, int64_t block, int64_t from, int64_t count) {
  using T = Element<D>;
  const int64_t size = Whole ? kWireBlock : count;
  T raw[kWireBlock];
  if constexpr (!Whole) __builtin_memset(raw, 0, sizeof(raw));
  __builtin_memcpy(raw, static_cast<const T*>(op.in) + from, size * sizeof(T));
  if constexpr (W == DType::bf16 || W == DType::f16) {
    Element<W> converted[kWireBlock];
    for (int e = 0; e < kWireBlock; ++e) converted[e] = to_sixteen<W>(to_float<D>(raw[e]));
    __builtin_memcpy(op.out + from * sizeof(converted[0]), converted, size * sizeof(converted[0]));
  } else {
    float x[kWireBlock];
    uint8_t code[kWireBlock];
    for (int e = 0; e < kWireBlock; ++e) x[e] = to_float<D>(raw[e]);
    op.out[wire_scale_begin(op.numel) + block] = static_cast<uint8_t>(encode_block<W>(x, code));
    __builtin_memcpy(op.out + from, code, size);
  }
}

template <DType D, DType W>
void run(const Encode& op, int64_t begin, int64_t end) {
  const int64_t lead = static_cast<int64_t>(op.offset % kWireBlock);
  const auto first = [&](int64_t block) ZK_INLINE { return block == 0 ? 0 : block * kWireBlock - lead; };
  const auto stop = [&](int64_t block) ZK_INLINE {
    const int64_t last = (block + 1) * kWireBlock - lead;
    return last < op.numel ? last : op.numel;
  };
  if constexpr (D == W) {
    const auto* in = static_cast<const Element<D>*>(op.in);
    __builtin_memcpy(op.out + first(begin) * sizeof(*in), in + first(begin),
                     (stop(end - 1) - first(begin)) * sizeof(*in));
  } else {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = first(block), count = stop(block) - from;
      count == kWireBlock ? run_block<D, W, true>(op, block, from, count)
                          : run_block<D, W, false>(op, block, from, count);
    }
  }
}

template <DType D>
void run_wire(const Encode& op, int64_t begin, int64_t end) {
  switch (op.wire) {
    case DType::bf16: return run<D, DType::bf16>(op, begin, end);
    case DType::f16: return run<D, DType::f16>(op, begin, end);
    case DType::e4m3: return run<D, DType::e4m3>(op, begin, end);
    default: return run<D, DType::i8>(op, begin, end);
  }
}

}  // namespace

void ZK_ISA::encode(const Encode& op, int64_t begin, int64_t end) {
  switch (op.dtype) {
    case DType::f32: return run_wire<DType::f32>(op, begin, end);
    case DType::bf16: return run_wire<DType::bf16>(op, begin, end);
    default: return run_wire<DType::f16>(op, begin, end);
  }
}

}  // namespace zk::cpu
