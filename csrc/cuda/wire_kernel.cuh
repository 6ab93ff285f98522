// encode and decode on the device.
#pragma once

#include "device.cuh"
#include "wire.h"

namespace zk::cuda {

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

// Update: there are directions, a decay or stochastic rounding; what is lossy has none. Apart, because a fan-out alone costs
// half.
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
      // A vec of eight lies in one block of 32, and exists only where an element of that block does.
      if constexpr (kHasScales<W>) {
        scale[v] = t.scales[tile.template block<Whole>(first + v) / (kWireBlock / kVector) - t.offset / kWireBlock];
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
  constexpr int kGroup = Update && D == DType::f32 ? 2 : 4;  // of four, normals in fp32 spill
  for_groups<kGroup>(tile, t.numel, aligned, pass);
}

}  // namespace zk::cuda
