#include "combine.h"

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

#include "combine_kernel.h"

namespace zk::cpu {
namespace {

enum class Kind { single, plain, wire, spread, full };

template <class L, DType D, Domain Dist, Kind K, bool Stochastic>
void run(const Combine& op, const Span& span, void* scratch) {
  const int64_t count = K == Kind::single ? 1 : op.count + (op.form == Form::fan_out ? 1 : 0);
  const auto begin = [&](uint64_t block)
                         ZK_INLINE { return Noise<L, Dist>(op.keys, count, span.stream, block, scratch); };
  if constexpr (K == Kind::wire) {
    return for_tiles<L>(span, begin, [op, span](const auto& tile, auto& noise) ZK_INLINE {
      wire_tile<L, D, Stochastic>(op, span, tile, noise);
    });
  }
  combine_tiles<L, D>(span, begin, [op, span](const auto& tile, auto& noise) ZK_INLINE {
    if constexpr (K == Kind::single) single_tile<L, D, Stochastic>(op, span, tile, noise);
    if constexpr (K == Kind::plain) plain_tile<L, D, Stochastic>(op, span, tile, noise);
    if constexpr (K == Kind::spread) spread_tile<L, D>(op, span, tile, noise);
    if constexpr (K == Kind::full) full_tile<L, D>(op, span, tile, noise);
  });
}

template <class L, DType D, Domain Dist, bool Stochastic>
void run_plain(const Combine& op, const Span& span, void* scratch) {
  if (op.from_wire) return run<L, D, Dist, Kind::wire, Stochastic>(op, span, scratch);
  op.count == 1 && !op.has_decay && op.form == Form::one
      ? run<L, D, Dist, Kind::single, Stochastic>(op, span, scratch)
      : run<L, D, Dist, Kind::plain, Stochastic>(op, span, scratch);
}

template <class L, DType D, Domain Dist>
void run_dist(const Combine& op, const Span& span, void* scratch) {
  constexpr bool rounds = D != DType::f32;
  if (D == DType::i8 || span.mask != nullptr || op.has_mask_seed || span.curvature != nullptr) {
    return run<L, D, Dist, Kind::full, rounds>(op, span, scratch);
  }
  if constexpr (D != DType::i8) {
    if (op.form == Form::spread) return run<L, D, Dist, Kind::spread, false>(op, span, scratch);
    op.stochastic ? run_plain<L, D, Dist, rounds>(op, span, scratch)
                  : run_plain<L, D, Dist, false>(op, span, scratch);
  }
}

template <class L, DType D>
void run_dtype(const Combine& op, const Span& span, void* scratch) {
  op.dist == kNormal ? run_dist<L, D, kNormal>(op, span, scratch)
                     : run_dist<L, D, kRademacher>(op, span, scratch);
}

}  // namespace

void ZK_ISA::combine(const Combine& op, const Span& span, void* scratch) {
  switch (op.dtype) {
    case DType::f32: return run_dtype<ZK_LANES, DType::f32>(op, span, scratch);
    case DType::bf16: return run_dtype<ZK_LANES, DType::bf16>(op, span, scratch);
    case DType::f16: return run_dtype<ZK_LANES, DType::f16>(op, span, scratch);
    default: return run_dtype<ZK_LANES, DType::i8>(op, span, scratch);
  }
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

void combine_cpu(TensorList out, TensorList params, ZK_TERMS_PARAMS, std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_params("combine", out, params, args);
  Call call(args, params);
  call.add_spans(params, [&](Span& span, size_t i) { span.out = out[i].mutable_data_ptr(); });
  call.run(Combine{{call.terms}, Form::one, 0.0f, 0.0f, false, {}}, ZK_KERNEL_OF(combine, isa));
}

void combine_planned_cpu(Tensor table, ZK_PLANNED_PARAMS, std::string isa) {
  const Rows rows("combine", table);
  const TermArgs args = ZK_PLANNED_TERMS;
  check_planned("combine", rows, args);
  const Call call(args, rows);
  call.run(rows, Combine{{call.terms}, Form::one, 0.0f, 0.0f, false, {}}, ZK_KERNEL_OF(combine, isa));
}

}  // namespace

ZK_REGISTER(combine, "combine(Tensor(a!)[] out, Tensor[] params, " ZK_TERMS_SCHEMA ", str isa) -> ()")
ZK_REGISTER_PLANNED(combine, "combine_planned(Tensor table, " ZK_PLANNED_SCHEMA ", str isa) -> ()")

}  // namespace zk::cpu

#endif
