// update: theta and the states of an update rule, from the sum of the directions, in one pass. noise/rules.h
// has the rules.
#include "kernels.h"

namespace zk::cpu {

struct Update : Terms {
  Rule rule;
  const float* hyper;
  DType state[2];
};

ZK_KERNEL(update, const Update&, const Span&, void* scratch)

}  // namespace zk::cpu

#if defined(ZK_ISA)
// --- the kernel, compiled once for each instruction set -----------------------------------------------

#include "tile.h"

namespace zk::cpu {
namespace {

// One kernel serves all dtypes: beside the noise, a branch for each tile costs nothing.
template <class L, class Tile>
ZK_HD void load_param(DType dtype, const void* array, const Tile& tile, typename L::F x[8]) {
  if (dtype != DType::f16) return load_state<L>(dtype, array, tile, x);
  load<L, DType::f16>(array, tile, x);
  for (int e = 0; e < 8; ++e) x[e] = without_payload(x[e]);  // a state of bf16 has fewer bits than this one's
}

// Stores values, rounded with the random fields of `domain` if the operation rounds stochastically.
template <class L, class Tile>
ZK_HD void store_rounded(const Terms& op, DType dtype, uint32_t domain, Stream stream, void* array,
                         const Tile& tile, const typename L::F x[8]) {
  if (dtype == DType::f32) return store<L, DType::f32, false>(array, tile, x, {});
  if (!op.stochastic) {
    return dtype == DType::bf16 ? store<L, DType::bf16, false>(array, tile, x, {})
                                : store<L, DType::f16, false>(array, tile, x, {});
  }
  const Words<typename L::U> random = draw<L>(op.rounding, tile.block, stream, static_cast<Domain>(domain));
  dtype == DType::bf16 ? store<L, DType::bf16, true>(array, tile, x, random)
                       : store<L, DType::f16, true>(array, tile, x, random);
}

template <class F>
ZK_HD F decayed(const Terms& op, F theta) {
  return op.has_decay ? mul(Splat<F>::of(op.decay), theta) : theta;
}

template <class L, class R, class Noise, class Tile>
ZK_HD void update_tile(const Update& op, const Span& span, const Tile& tile, Noise& noise) {
  using F = typename L::F;
  F sum[8][R::sums];
  for (auto& element : sum) {
    for (F& s : element) s = Splat<F>::of(0.0f);
  }
  for (int64_t k = 0; k < op.count; ++k) {
    F z[8];
    noise.take(k, tile);
    noise.values(z);
    for (int e = 0; e < 8; ++e) R::accumulate(op.hyper, span.coeffs, k, z[e], sum[e]);
  }

  F theta[8], state[R::states + 1][8];
  load_param<L>(op.dtype, span.in, tile, theta);
  for (int i = 0; i < R::states; ++i) load_state<L>(op.state[i], span.more[i], tile, state[i]);
  for (int e = 0; e < 8; ++e) {
    F values[R::states + 1];
    for (int i = 0; i < R::states; ++i) values[i] = state[i][e];
    theta[e] = R::apply(op.hyper, span.coeffs, sum[e], theta[e], decayed(op, theta[e]), values);
    for (int i = 0; i < R::states; ++i) state[i][e] = values[i];
  }
  if (typename L::U kept[8]; draw_mask<L>(op, span, tile, kept)) {
    F before[8];
    load_param<L>(op.dtype, span.in, tile, before);
    for (int e = 0; e < 8; ++e) theta[e] = select_top(kept[e], theta[e], decayed(op, before[e]));
    for (int i = 0; i < R::states; ++i) {
      load_state<L>(op.state[i], span.more[i], tile, before);
      for (int e = 0; e < 8; ++e) state[i][e] = select_top(kept[e], state[i][e], before[e]);
    }
  }
  store_rounded<L>(op, op.dtype, kRounding, span.stream, span.out, tile, theta);
  for (int i = 0; i < R::states; ++i) {
    store_rounded<L>(op, op.state[i], kState + i, span.stream, span.more[i], tile, state[i]);
  }
}

template <class L, class R, Domain Dist>
void run(const Update& op, const Span& span, void* scratch) {
  const auto begin = [&](uint64_t block)
                         ZK_INLINE { return Noise<L, Dist>(op.keys, op.count, span.stream, block, scratch); };
  for_tiles<L>(span, begin, [op, span](const auto& tile, auto& noise) ZK_INLINE {
    update_tile<L, R>(op, span, tile, noise);
  });
}

template <class L, class R>
void run_rule(const Update& op, const Span& span, void* scratch) {
  op.dist == kNormal ? run<L, R, kNormal>(op, span, scratch) : run<L, R, kRademacher>(op, span, scratch);
}

}  // namespace

void ZK_ISA::update(const Update& op, const Span& span, void* scratch) {
  switch (op.rule) {
#define ZK_CASE(rule) \
  case Rule::rule: return run_rule<ZK_LANES, rules::rule>(op, span, scratch);
    ZK_RULES(ZK_CASE)
#undef ZK_CASE
  }
}

}  // namespace zk::cpu

#else
// --- the entry, compiled once -------------------------------------------------------------------------

#include "op.h"

namespace zk::cpu {
namespace {

void update_cpu(TensorList params, TensorList first, TensorList second, std::string rule, Tensor hyper,
                ZK_TERMS_PARAMS, std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_params("update", params, params, args);
  check_update(first, second, rule_of(rule), hyper, params, args);
  Call call(args, params);
  const TensorList* states[2] = {&first, &second};
  call.add_spans(params, [&](Span& span, size_t i) {
    span.out = params[i].mutable_data_ptr();
    for (int s = 0; s < 2; ++s)
      span.more[s] = states[s]->empty() ? nullptr : (*states[s])[i].mutable_data_ptr();
  });
  const std::vector<float> values = without_payloads(hyper);
  Update op{{call.terms}, rule_of(rule), values.data(), {}};
  for (int s = 0; s < 2; ++s) {
    if (!states[s]->empty()) op.state[s] = call.state[s] = dtype_of(states[s]->front());
  }
  call.run(op, ZK_KERNEL_OF(update, isa));
}

void update_planned_cpu(Tensor table, std::string rule, Tensor hyper, ZK_PLANNED_PARAMS, std::string isa) {
  const Rows rows("update", table);
  const TermArgs args = ZK_PLANNED_TERMS;
  check_planned("update", rows, args);
  check_hyper(rule_of(rule), hyper, args);
  Call call(args, rows);
  const std::vector<float> values = without_payloads(hyper);
  Update op{{call.terms}, rule_of(rule), values.data(), {}};
  for (int s = 0; s < 2; ++s) {
    if (rows.first().state[s] >= 0) op.state[s] = call.state[s] = static_cast<DType>(rows.first().state[s]);
  }
  call.run(rows, op, ZK_KERNEL_OF(update, isa));
}

}  // namespace

ZK_REGISTER(update,
            "update(Tensor(a!)[] params, Tensor(b!)[] first, Tensor(c!)[] second, "
            "str rule, Tensor hyper, " ZK_TERMS_SCHEMA ", str isa) -> ()")
ZK_REGISTER_PLANNED(update, "update_planned(Tensor table, str rule, Tensor hyper, " ZK_PLANNED_SCHEMA
                            ", str isa) -> ()")

}  // namespace zk::cpu

#endif
