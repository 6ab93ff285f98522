// requantize: the update kernel without a rule, for int8 weights.
#include "update_call.cuh"
#include "update_launch.cuh"

namespace zk::cuda {
namespace {

void requantize_cuda(TensorList out, TensorList params, int64_t low, int64_t high, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_one_piece("requantize", terms);
  check_terms("requantize", params, terms);
  check_beside("requantize", out, params);
  STD_TORCH_CHECK(params[0].scalar_type() == torch::headeronly::ScalarType::Char,
                  "requantize: expected int8 tensors");
  UpdateLaunch shared{};
  shared.low = static_cast<float>(low);
  shared.high = static_cast<float>(high);
  const std::vector<Row> rows = zk::rows_of(out, params, {}, terms, static_cast<int64_t>(DType::i8));
  run_entries("requantize", shared, Rows(rows), terms, params[0],
              [&](const UpdateLaunch& launch, uint32_t chunks, void* stream) {
    return launch_rule<DType::i8, Combine>(launch, chunks, terms.domain(), stream);
  });
}

}  // namespace

ZK_REGISTER(requantize,
            "requantize(Tensor(a!)[] out, Tensor[] params, int low, int high, " ZK_TERMS_SCHEMA ") -> ()")

}  // namespace zk::cuda
