// encode: parameters as the bytes of a wire format. A block of 32 elements is an array, and the compiler
// vectorizes the loops over it. decode and decode_fan_out: the combine kernel, which loads from a wire
// buffer.
#include "combine.h"

namespace zk::cpu {

// One tensor to encode. Blocks are 32 logical indices; block 0 is the one that contains element 0.
struct Encode {
  const void* in;
  uint8_t* out;
  int64_t numel;
  uint64_t offset;
  DType dtype, wire;
};

ZK_KERNEL(encode, const Encode&, int64_t begin, int64_t end)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

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
  if constexpr (W == DType::bf16)
    return static_cast<uint16_t>(bf16_nearest(zk::bits(without_payload(x))) >> 16);
  return static_cast<uint16_t>(Portable::to_half(zk::from_bits(saturated_half(zk::bits(x)))));
}

// Encodes a block, in which elements beyond the tensor are 0, and returns its scale byte.
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

// Encodes elements [from, from + count) of a block. Whole: these are all 32, so that copies have a constant
// size.
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

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

void encode_cpu(TensorList out, TensorList params, int64_t wire, std::vector<int64_t> offsets,
                std::string isa) {
  if (params.empty()) return;
  check_beside("encode", params, params);
  check_wires("encode", out, wire, params, offsets);
  std::vector<Encode> ops;
  std::vector<int64_t> starts;  // how many blocks lie before each tensor
  int64_t total = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    if (numel == 0) continue;
    const auto offset = static_cast<uint64_t>(offsets[i]);
    ops.push_back({params[i].const_data_ptr(), static_cast<uint8_t*>(out[i].mutable_data_ptr()), numel,
                   offset, dtype_of(params[i]), wire_of<DType>(wire)});
    starts.push_back(total);
    total += wire_blocks(numel, offset);
  }
  const auto kernel = ZK_KERNEL_OF(encode, isa);
  torch::stable::parallel_for(0, total, kGrain / kWireBlock, [&](int64_t begin, int64_t end) {
    auto i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = i + 1 < static_cast<int64_t>(starts.size()) ? std::min(end, starts[i + 1]) : end;
      kernel(ops[i], begin - starts[i], stop - starts[i]);
      begin = stop;
    }
  });
}

void decode_cpu(TensorList out, TensorList wires, int64_t wire, ZK_TERMS_PARAMS, std::string isa) {
  if (out.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("decode", args);
  check_params("decode", out, out, args);
  check_wires("decode", wires, wire, out, offsets);
  Call call(args, out);
  call.add_spans(out, [&](Span& span, size_t i) {
    span.in = wires[i].const_data_ptr();
    span.out = out[i].mutable_data_ptr();
  });
  call.run(Combine{{call.terms}, Form::one, 0.0f, 0.0f, true, wire_of<DType>(wire)},
           ZK_KERNEL_OF(combine, isa));
}

void decode_fan_out_cpu(TensorList plus, TensorList minus, TensorList wires, int64_t wire, Tensor seed,
                        Tensor coeff, ZK_TERMS_PARAMS, std::string isa) {
  if (plus.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("decode_fan_out", args);
  check_params("decode_fan_out", minus, plus, args);
  check_wires("decode_fan_out", wires, wire, plus, offsets);
  check_one_direction(seed, coeff, plus[0]);
  Call call(args, plus);
  call.keys.push_back(key_of(seed));
  call.coeffs.push_back(canonical_nan(data<float>(coeff)[0]));
  call.add_spans(plus, [&](Span& span, size_t i) {
    span.in = wires[i].const_data_ptr();
    span.more[0] = plus[i].mutable_data_ptr();
    span.more[1] = minus[i].mutable_data_ptr();
  });
  call.run(Combine{{call.terms}, Form::fan_out, 0.0f, 0.0f, true, wire_of<DType>(wire)},
           ZK_KERNEL_OF(combine, isa));
}

}  // namespace

ZK_REGISTER(encode, "encode(Tensor(a!)[] out, Tensor[] params, int wire, int[] offsets, str isa) -> ()")
ZK_REGISTER(decode, "decode(Tensor(a!)[] out, Tensor[] wires, int wire, " ZK_TERMS_SCHEMA ", str isa) -> ()")
ZK_REGISTER(decode_fan_out,
            "decode_fan_out(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] wires, int wire, "
            "Tensor seed, Tensor coeff, " ZK_TERMS_SCHEMA ", str isa) -> ()")

}  // namespace zk::cpu

#endif
