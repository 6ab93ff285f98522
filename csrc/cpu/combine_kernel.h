// theta = round(decay * theta + sum c_k w_k): the kernel of combine, fan_out, spread, requantize and
// low_rank. These differ in what a direction w_k is and in what is done with the sum (Form in combine.h).
#pragma once

#include "tile.h"

namespace zk::cpu {

template <class L, DType D, class Tile>
ZK_HD void load_decayed(const Combine& op, const Span& span, const Tile& tile, typename L::F acc[8]) {
  load<L, D>(span.in, tile, acc);
  if (op.has_decay) {
    for (int e = 0; e < 8; ++e) acc[e] = mul(Splat<typename L::F>::of(op.decay), acc[e]);
  }
}

template <class L, DType D, bool Stochastic, class Tile>
ZK_HD void store_rounded(const Combine& op, const Span& span, const Tile& tile, typename L::F acc[8]) {
  Words<typename L::U> random{};
  if constexpr (Stochastic && D != DType::f32)
    random = draw<L>(op.rounding, tile.block, span.stream, kRounding);
  if constexpr (D == DType::i8) {
    using F = typename L::F;
    for (int e = 0; e < 8; ++e) acc[e] = clamp(acc[e], Splat<F>::of(op.low), Splat<F>::of(op.high));
  }
  store<L, D, Stochastic>(span.out, tile, acc, random, span.out != span.in);
}

// to = round(from + c z), where z is the direction that noise.take() was called with last.
template <class L, DType D, class Noise, class Tile>
ZK_HD void store_side(const Noise& noise, float c, void* to, const Tile& tile, const typename L::F from[8]) {
  using F = typename L::F;
  F side[8];
  noise.add_to(from, Splat<F>::of(c), side);
  store<L, D, false>(to, tile, side, {}, true);
}

// Loads elements of a wire buffer that has scales: x = code * scale. On every instruction set all elements of
// a register lie in one block of 32, so a register has one scale.
template <class L, DType W, class Tile>
ZK_HD void load_scaled(const Span& span, const Tile& tile, typename L::F x[8]) {
  load<L, W>(span.in, tile, x);
  const auto* scales = static_cast<const uint8_t*>(span.in) + wire_scale_begin(span.numel);
  const auto last = static_cast<int64_t>((span.offset + span.numel - 1) / kWireBlock);
  for (int i = 0; i < 4; ++i) {
    auto block = static_cast<int64_t>((tile.block * 8 + 2 * L::width * i) / kWireBlock);
    const auto first = static_cast<int64_t>(span.offset / kWireBlock);
    if constexpr (!Tile::whole) block = block < first ? first : block > last ? last : block;
    const float scale = wire_scale(scales[block - first]);
    const auto factor = Splat<typename L::F>::of(W == DType::i8 ? zk::mul(scale, 0x1p-6f) : scale);
    x[2 * i] = mul(x[2 * i], factor);
    x[2 * i + 1] = mul(x[2 * i + 1], factor);
  }
}

template <class L, class Tile>
ZK_HD void load_wire(DType wire, const Span& span, const Tile& tile, typename L::F x[8]) {
  if (wire == DType::bf16) return load<L, DType::bf16>(span.in, tile, x);
  if (wire == DType::e4m3) return load_scaled<L, DType::e4m3>(span, tile, x);
  if (wire == DType::i8) return load_scaled<L, DType::i8>(span, tile, x);
  load<L, DType::f16>(span.in, tile, x);
  for (int e = 0; e < 8; ++e) x[e] = without_payload(x[e]);  // its bits could carry when rounded to bf16
}

// The functions below each compute one tile; an operation is compiled with the simplest one that can do it.
// single_tile: one direction, no decay, no mask, no curvature. It tests no condition at run time.
template <class L, DType D, bool Stochastic, class Noise, class Tile>
ZK_HD void single_tile(const Combine& op, const Span& span, const Tile& tile, Noise& noise) {
  typename L::F acc[8];
  load<L, D>(span.in, tile, acc);
  noise.take(0, tile);
  noise.add_to(acc, Splat<typename L::F>::of(span.coeffs[0]), acc);
  store_rounded<L, D, Stochastic>(op, span, tile, acc);
}

// plain_tile: any number of directions and a decay, but neither masks nor curvature.
template <class L, DType D, bool Stochastic, class Noise, class Tile>
ZK_HD void plain_tile(const Combine& op, const Span& span, const Tile& tile, Noise& noise) {
  using F = typename L::F;
  F acc[8];
  load_decayed<L, D>(op, span, tile, acc);
  for (int64_t k = 0; k < op.count; ++k) {
    noise.take(k, tile);
    noise.add_to(acc, Splat<F>::of(span.coeffs[k]), acc);
  }
  if (span.out != nullptr) store_rounded<L, D, Stochastic>(op, span, tile, acc);
  if (op.form == Form::fan_out) {
    if (span.out != nullptr) load<L, D>(span.out, tile, acc);  // as rounded
    const float c = span.coeffs[op.count];
    noise.take(op.count, tile);
    store_side<L, D>(noise, c, span.more[0], tile, acc);
    store_side<L, D>(noise, -c, span.more[1], tile, acc);
  }
}

// wire_tile: plain_tile with the elements of a wire buffer as theta. The theta of a fan-out is rounded, so
// that the sides start from the same bits as elsewhere, but it is not stored.
template <class L, DType D, bool Stochastic, class Noise, class Tile>
ZK_HD void wire_tile(const Combine& op, const Span& span, const Tile& tile, Noise& noise) {
  using S = Storage<L, D>;
  using F = typename L::F;
  F acc[8];
  load_wire<L>(op.wire, span, tile, acc);
  if (op.has_decay) {
    for (int e = 0; e < 8; ++e) acc[e] = mul(Splat<F>::of(op.decay), acc[e]);
  }
  for (int64_t k = 0; k < op.count; ++k) {
    noise.take(k, tile);
    noise.add_to(acc, Splat<F>::of(span.coeffs[k]), acc);
  }
  if (op.form == Form::one) return store_rounded<L, D, Stochastic>(op, span, tile, acc);
  if constexpr (D != DType::f32) {
    Words<typename L::U> random{};
    if constexpr (Stochastic) random = draw<L>(op.rounding, tile.block, span.stream, kRounding);
    alignas(64) typename S::T buffer[Tile::size];
    S::template store<Stochastic>(buffer, acc, random);
    S::load(buffer, acc);
  }
  const float c = span.coeffs[op.count];
  noise.take(op.count, tile);
  store_side<L, D>(noise, c, span.more[0], tile, acc);
  store_side<L, D>(noise, -c, span.more[1], tile, acc);
}

template <class L, DType D, class Noise, class Tile>
ZK_HD void spread_tile(const Combine& op, const Span& span, const Tile& tile, Noise& noise) {
  using T = typename Storage<L, D>::T;
  typename L::F x[8];
  load<L, D>(span.in, tile, x);
  for (int64_t k = 0; k < op.count; ++k) {
    noise.take(k, tile);
    store_side<L, D>(noise, span.coeffs[k], static_cast<T*>(span.out) + k * span.numel, tile, x);
  }
}

// full_tile: everything, that is masks, curvature and weights of eight bits.
template <class L, DType D, class Noise, class Tile>
ZK_HD void full_tile(const Combine& op, const Span& span, const Tile& tile, Noise& noise) {
  using F = typename L::F;
  F acc[8], total[8], root[8];
  load_decayed<L, D>(op, span, tile, acc);
  for (int e = 0; e < 8; ++e) total[e] = acc[e];
  if (span.curvature != nullptr) {
    load_state<L>(op.curvature, span.curvature, tile, root);
    for (int e = 0; e < 8; ++e) root[e] = sqrt_full(root[e]);
  }
  for (int64_t k = 0; k < op.count; ++k) {
    const F c = Splat<F>::of(span.coeffs[k]);
    noise.take(k, tile);
    if (span.curvature == nullptr) {
      noise.add_to(total, c, total);
    } else {
      F z[8];
      noise.values(z);
      for (int e = 0; e < 8; ++e) total[e] = fma(c, div(z[e], root[e]), total[e]);
    }
  }
  if (typename L::U kept[8]; draw_mask<L>(op, span, tile, kept)) {
    for (int e = 0; e < 8; ++e) total[e] = select_top(kept[e], total[e], acc[e]);
  }
  op.stochastic ? store_rounded<L, D, true>(op, span, tile, total)
                : store_rounded<L, D, false>(op, span, tile, total);
}

// for_tiles with a prefetch of the arrays, whose dtype is D.
template <class L, DType D, class Begin, class Body>
void combine_tiles(const Span& span, const Begin& begin, const Body& body) {
  using T = typename Storage<L, D>::T;
  for_tiles<L>(span, begin,
               [body, in = static_cast<const T*>(span.in),
                out = static_cast<const T*>(span.out)](const auto& tile, auto& noise) ZK_INLINE {
    if constexpr (tile.whole) {
      constexpr int64_t bytes = tile.size * sizeof(T);
      prefetch(in + tile.first, bytes);
      const bool streams = tile.run * static_cast<int64_t>(sizeof(T)) >= kStream;
      if (out != nullptr && out != in && !streams) prefetch(out + tile.first, bytes);
    }
    body(tile, noise);
  });
}

}  // namespace zk::cpu
