// spread: the combine kernel with an output for each direction.
#if !defined(ZK_ISA)

#include "combine.h"
#include "op.h"

namespace zk::cpu {
namespace {

void spread_cpu(Tensor out, Tensor x, ZK_TERMS_PARAMS, std::string isa) {
  const TensorList params = {x};
  const TermArgs args = ZK_TERMS;
  check_one_piece("spread", args);
  check_params("spread", params, params, args);
  check_spread(out, x, args);
  Call call(args, params);
  call.add_spans(params, [&](Span& span, size_t) { span.out = out.mutable_data_ptr(); });
  call.run(Combine{{call.terms}, Form::spread, 0.0f, 0.0f, false, {}}, ZK_KERNEL_OF(combine, isa));
}

}  // namespace

ZK_REGISTER(spread, "spread(Tensor(a!) out, Tensor x, " ZK_TERMS_SCHEMA ", str isa) -> ()")

}  // namespace zk::cpu

#endif
