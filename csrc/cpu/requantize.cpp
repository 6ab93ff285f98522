// requantize: the combine kernel over int8, rounded to an integer and clamped.
#if !defined(ZK_ISA)

#include "combine.h"
#include "op.h"

namespace zk::cpu {
namespace {

void requantize_cpu(TensorList out, TensorList params, int64_t low, int64_t high, ZK_TERMS_PARAMS,
                    std::string isa) {
  if (params.empty()) return;
  const TermArgs args = ZK_TERMS;
  check_one_piece("requantize", args);
  check_params("requantize", out, params, args, true);
  Call call(args, params);
  call.add_spans(params, [&](Span& span, size_t i) { span.out = out[i].mutable_data_ptr(); });
  call.run(Combine{{call.terms}, Form::one, static_cast<float>(low), static_cast<float>(high), false, {}},
           ZK_KERNEL_OF(combine, isa));
}

}  // namespace

ZK_REGISTER(requantize, "requantize(Tensor(a!)[] out, Tensor[] params, int low, int high, " ZK_TERMS_SCHEMA
                        ", str isa) -> ()")

}  // namespace zk::cpu

#endif
