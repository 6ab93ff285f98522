// fan_out: the combine kernel with two more outputs.
#if !defined(ZK_ISA)

#include "combine.h"
#include "op.h"

namespace zk::cpu {
namespace {

void fan_out_cpu(TensorList params, TensorList plus, TensorList minus, Tensor seed, Tensor coeff,
                 ZK_TERMS_PARAMS, std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("fan_out", args);
  check_params("fan_out", plus, params, args);
  check_beside("fan_out", minus, params);
  check_one_direction(seed, coeff, params[0]);
  Call call(args, params);
  call.keys.push_back(key_of(seed));
  call.coeffs.push_back(canonical_nan(data<float>(coeff)[0]));
  const bool writes = args.seeds.numel() > 0 || decay.has_value();
  call.add_spans(params, [&](Span& span, size_t i) {
    span.out = writes ? params[i].mutable_data_ptr() : nullptr;
    span.more[0] = plus[i].mutable_data_ptr();
    span.more[1] = minus[i].mutable_data_ptr();
  });
  call.run(Combine{{call.terms}, Form::fan_out, 0.0f, 0.0f, false, {}}, ZK_KERNEL_OF(combine, isa));
}

void fan_out_planned_cpu(Tensor table, Tensor seed, Tensor coeff, ZK_PLANNED_PARAMS, std::string isa) {
  const Rows rows("fan_out", table);
  const TermArgs args = ZK_PLANNED_TERMS;
  check_planned("fan_out", rows, args);
  check_one_direction(seed, coeff, seeds);
  Call call(args, rows);
  call.keys.push_back(key_of(seed));
  call.coeffs.push_back(canonical_nan(data<float>(coeff)[0]));
  const bool writes = args.seeds.numel() > 0 || decay.has_value();
  call.run(rows, Combine{{call.terms}, Form::fan_out, 0.0f, 0.0f, false, {}}, ZK_KERNEL_OF(combine, isa),
           !writes);
}

}  // namespace

ZK_REGISTER(fan_out,
            "fan_out(Tensor(a!)[] params, Tensor(b!)[] plus, Tensor(c!)[] minus, "
            "Tensor seed, Tensor coeff, " ZK_TERMS_SCHEMA ", str isa) -> ()")
ZK_REGISTER_PLANNED(fan_out, "fan_out_planned(Tensor table, Tensor seed, Tensor coeff, " ZK_PLANNED_SCHEMA
                             ", str isa) -> ()")

}  // namespace zk::cpu

#endif
