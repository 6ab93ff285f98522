// Wire formats: encode; and decode with an update, or with a fan-out whose theta is not stored.
#include "../noise/wire.h"
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

struct EncodeEntry {
  const void* in;
  uint8_t* out;
  int64_t numel;
  uint64_t offset;  // logical index of element 0
};

struct EncodeLaunch {
  Table<EncodeEntry> table;
};
static_assert(sizeof(EncodeLaunch) <= kMaxArgument);

struct DecodeEntry {
  const uint8_t* in;
  const uint8_t* scales;
  void* out;    // theta; in a fan-out plus
  void* minus;  // fan-out only
  int64_t numel;
  uint64_t offset;
};

struct DecodeLaunch {
  const int64_t* seeds;
  const float* coeffs;
  const float* decay;            // null: there is none
  const int64_t* rounding_seed;  // null: rounding is to nearest
  const int64_t* probe_seed;     // the direction of a fan-out; null: decode
  const float* probe_coeff;
  int32_t count;                    // K
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know (noise/normal.h)
  Table<DecodeEntry> table;
};
static_assert(sizeof(DecodeLaunch) <= kMaxArgument);

// A thread encodes one block of 32 elements.
constexpr int64_t encode_chunks(uint64_t offset, int64_t numel) {
  return (wire_blocks(numel, offset) + kThreads - 1) / kThreads;
}

// --- the kernel ------------------------------------------------------------------------------------------

// encode and decode on the device.

template <DType W>
constexpr bool kHasScales = W == DType::e4m3 || W == DType::i8;

template <DType D, DType W>
ZK_GLOBAL encode_kernel(ZK_GRID_CONSTANT EncodeLaunch p) {
  using S = Storage<D>;
  using C = Storage<W>;
  constexpr int kVecs = kWireBlock / kVector;
  const int i = tensor_of(p.table, blockIdx.x);
  const EncodeEntry& t = p.table.tensor[i];
  const int64_t block = static_cast<int64_t>(blockIdx.x - p.table.first_chunk[i]) * kThreads + threadIdx.x;
  if (block >= wire_blocks(t.numel, t.offset)) return;
  const int64_t first = block * kWireBlock - static_cast<int64_t>(t.offset % kWireBlock);

  const auto run = [&](const auto& access) {
    float x[kVecs][kVector];
    ZK_UNROLL
    for (int v = 0; v < kVecs; ++v) S::unpack(access(v).template load<D>(t.in), x[v]);
    if constexpr (!kHasScales<W>) {
      ZK_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) {
          const uint32_t b = bits(without_payload(x[v][e]));
          x[v][e] = from_bits(W == DType::f16 ? saturated_half(b) : b);
        }
        access(v).template store<W>(t.out, C::template pack<false>(x[v], {}));
      }
    } else {
      uint32_t top = 0;
      ZK_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) {
          const uint32_t mag = magnitude(bits(x[v][e]));
          top = mag > top ? mag : top;
        }
      }
      const uint32_t scale = wire_scale_byte(top, W == DType::e4m3 ? kFp8Emax : kInt8Emax);
      const float inverse = wire_scale(254 - scale);
      t.out[wire_scale_begin(t.numel) + block] = static_cast<uint8_t>(scale);
      ZK_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        typename C::Raw raw{};
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) {
          const float y = mul(x[v][e], inverse);
          const uint32_t code = W == DType::e4m3 ? e4m3_code(y) : int8_code(y);
          raw.w[e / 4] |= (scale == 255 ? 0u : code) << 8 * (e % 4);
        }
        access(v).template store<W>(t.out, raw);
      }
    }
  };
  const bool whole = first >= 0 && first + kWireBlock <= t.numel;
  const uint64_t from = address(t.in) + first * sizeof(typename S::T),
                 to = address(t.out) + first * sizeof(typename C::T);
  if (whole && is_aligned<D>(from, 0) && is_aligned<W>(to, 0)) {
    run([&](int v) { return VectorAccess{first, v}; });
  } else {
    run([&](int v) { return EdgeAccess{first + v * kVector, t.numel}; });
  }
}

// Update says whether there are directions, a decay or stochastic rounding; with lossy formats there are
// none. These are compiled apart, because a fan-out without an update costs half as much.
template <DType D, DType W, Domain Dist, bool FanOut, bool Update>
ZK_GLOBAL decode_kernel(ZK_GRID_CONSTANT DecodeLaunch p) {
  using S = Storage<D>;
  const int i = tensor_of(p.table, blockIdx.x);
  const DecodeEntry& t = p.table.tensor[i];
  const Tile<Dist> tile(t.offset, blockIdx.x - p.table.first_chunk[i], p.table.stream[i], p.mantissa);
  if (tile.is_outside(t.numel)) return;
  const Noise<Tile<Dist>> probe(FanOut ? seed_at(p.probe_seed, 0) : 0, tile);
  float c = 0.0f;
  if constexpr (FanOut) c = *p.probe_coeff;

  const auto pass = [&]<int N, bool Whole>(int first, const auto& access) {
    typename Storage<W>::Raw raw[N];
    [[maybe_unused]] uint32_t scale[N];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      raw[v] = access(first + v).template load<W>(t.in);
      // A vec of eight lies in one block of 32. Where it has an element, that block has a scale.
      if constexpr (kHasScales<W>) {
        scale[v] =
            t.scales[tile.template block<Whole>(first + v) / (kWireBlock / kVector) - t.offset / kWireBlock];
      }
    }
    float acc[N][kVector];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      Storage<W>::unpack(raw[v], acc[v]);
      if constexpr (kHasScales<W>) {
        const float factor = W == DType::i8 ? mul(wire_scale(scale[v]), 0x1p-6f) : wire_scale(scale[v]);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) acc[v][e] = mul(acc[v][e], factor);
      }
    }
    if (Update && p.decay != nullptr) {
      const float decay = *p.decay;
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) acc[v][e] = mul(decay, acc[v][e]);
      }
    }
    ZK_NO_UNROLL
    for (int k = 0; Update && k < p.count; ++k) {
      const Noise<Tile<Dist>> noise(seed_at(p.seeds, k), tile);
      const float coeff = p.coeffs[k];
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        float z[kVector];
        noise.template vec<Whole>(tile, first + v, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) acc[v][e] = fma(coeff, z[e], acc[v][e]);
      }
    }
    const bool stochastic = Update && D != DType::f32 && p.rounding_seed != nullptr;
    PhiloxKey rounding{};
    if (stochastic) rounding = philox_key(seed_at(p.rounding_seed, 0));
    ZK_UNROLL
    for (int v = 0; v < N; ++v) {
      typename S::Raw theta;
      if (stochastic) {
        const uint64_t block = tile.template block<Whole>(first + v);
        theta = S::template pack<true>(acc[v], draw(rounding, block, tile.stream, kRounding));
      } else {
        theta = S::template pack<false>(acc[v], {});
      }
      if constexpr (!FanOut) {
        access(first + v).template store<D>(t.out, theta);
      } else {
        float from[kVector], z[kVector], side[kVector];
        S::unpack(theta, from);
        probe.template vec<Whole>(tile, first + v, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) side[e] = fma(c, z[e], from[e]);
        access(first + v).template store<D>(t.out, S::template pack<false>(side, {}));
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) side[e] = fma(-c, z[e], from[e]);
        access(first + v).template store<D>(t.minus, S::template pack<false>(side, {}));
      }
    }
  };
  const bool aligned = is_aligned<W>(address(t.in), t.offset) &&
                       is_aligned<D>(address(t.out) | address(t.minus), t.offset);
  constexpr int kGroup = Update && D == DType::f32 ? 2 : 4;  // with four, normals in fp32 spill
  for_groups<kGroup>(tile, t.numel, aligned, pass);
}

// --- the entry -------------------------------------------------------------------------------------------

namespace {

template <class F>
auto with_wire(DType wire, const F& f) {
  switch (wire) {
    case DType::bf16: return f.template operator()<DType::bf16>();
    case DType::f16: return f.template operator()<DType::f16>();
    case DType::e4m3: return f.template operator()<DType::e4m3>();
    default: return f.template operator()<DType::i8>();
  }
}

template <DType D, DType W, Domain Dist, bool FanOut>
int launch_form(const DecodeLaunch& p, uint32_t chunks, void* stream) {
  const bool update = p.count > 0 || p.decay != nullptr || p.rounding_seed != nullptr;
  return launch(update ? decode_kernel<D, W, Dist, FanOut, true> : decode_kernel<D, W, Dist, FanOut, false>,
                chunks, stream, p);
}

template <DType D, DType W, Domain Dist>
int launch_dist(const DecodeLaunch& p, uint32_t chunks, void* stream) {
  return p.probe_seed != nullptr ? launch_form<D, W, Dist, true>(p, chunks, stream)
                                 : launch_form<D, W, Dist, false>(p, chunks, stream);
}

int launch_encode(const EncodeLaunch& p, uint32_t chunks, DType dtype, DType wire, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return with_wire(wire, [&]<DType W>() { return launch(encode_kernel<D, W>, chunks, stream, p); });
  });
}

int launch_decode(const DecodeLaunch& p, uint32_t chunks, DType dtype, DType wire, Domain dist,
                  void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return with_wire(wire, [&]<DType W>() {
      return dist == kNormal ? launch_dist<D, W, kNormal>(p, chunks, stream)
                             : launch_dist<D, W, kRademacher>(p, chunks, stream);
    });
  });
}

void encode_cuda(TensorList out, TensorList params, int64_t wire, std::vector<int64_t> offsets) {
  if (params.empty()) return;
  check_beside("encode", params, params);
  check_wires("encode", out, wire, params, offsets);
  const OnDevice on(params[0]);
  const DType dtype = dtype_of("encode", params[0]);
  std::vector<Packed<EncodeEntry>> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    const EncodeEntry entry{params[i].const_data_ptr(), static_cast<uint8_t*>(out[i].mutable_data_ptr()),
                            params[i].numel(), static_cast<uint64_t>(offsets[i])};
    tensors.push_back({entry, Stream(0), encode_chunks(entry.offset, entry.numel)});
  }
  pack_launches(EncodeLaunch{}, tensors, [&](const EncodeLaunch& launch, uint32_t chunks) {
    check_launch("encode", launch_encode(launch, chunks, dtype, wire_of<DType>(wire), on.stream));
  });
}

// decode where minus is empty, and out is theta; else a fan-out, in which out is plus.
void run_decode(const char* op, DecodeLaunch shared, const TensorList& out, const TensorList& minus,
                const TensorList& wires, int64_t wire, const TermArgs& terms) {
  check_one_piece(op, terms);
  check_terms(op, out, terms);
  check_wires(op, wires, wire, out, terms.offsets);
  const OnDevice on(out[0]);
  const DType dtype = dtype_of(op, out[0]);
  shared.seeds = pointer<int64_t>(terms.seeds);
  shared.coeffs = pointer<float>(terms.coeffs);
  shared.decay = pointer<float>(terms.decay);
  shared.rounding_seed = pointer<int64_t>(terms.rounding_seed);
  shared.count = static_cast<int32_t>(terms.seeds.numel());

  std::vector<Packed<DecodeEntry>> tensors;
  tensors.reserve(out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    DecodeEntry entry{};
    entry.in = pointer<uint8_t>(wires[i]);
    entry.numel = out[i].numel();
    entry.scales = entry.in + wire_scale_begin(entry.numel);
    entry.out = out[i].mutable_data_ptr();
    if (!minus.empty()) entry.minus = minus[i].mutable_data_ptr();
    entry.offset = static_cast<uint64_t>(terms.offsets[i]);
    tensors.push_back(packed(entry, terms, i, chunks_of(entry.offset, entry.numel, terms.domain())));
  }
  pack_launches(shared, tensors, [&](const DecodeLaunch& launch, uint32_t chunks) {
    check_launch(op, launch_decode(launch, chunks, dtype, wire_of<DType>(wire), terms.domain(), on.stream));
  });
}

void decode_cuda(TensorList out, TensorList wires, int64_t wire, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (!out.empty()) run_decode("decode", DecodeLaunch{}, out, {}, wires, wire, terms);
}

void decode_fan_out_cuda(TensorList plus, TensorList minus, TensorList wires, int64_t wire, Tensor seed,
                         Tensor coeff, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (plus.empty()) return;
  check_beside("decode_fan_out", minus, plus);
  check_one_direction(seed, coeff, plus[0]);
  DecodeLaunch shared{};
  shared.probe_seed = pointer<int64_t>(seed);
  shared.probe_coeff = pointer<float>(coeff);
  run_decode("decode_fan_out", shared, plus, minus, wires, wire, terms);
}

}  // namespace

ZK_REGISTER(encode, "encode(Tensor(a!)[] out, Tensor[] params, int wire, int[] offsets) -> ()")
ZK_REGISTER(decode, "decode(Tensor(a!)[] out, Tensor[] wires, int wire, " ZK_TERMS_SCHEMA ") -> ()")
ZK_REGISTER(decode_fan_out,
            "decode_fan_out(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] wires, int wire, "
            "Tensor seed, Tensor coeff, " ZK_TERMS_SCHEMA ") -> ()")

}  // namespace zk::cuda
