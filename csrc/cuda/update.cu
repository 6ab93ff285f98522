// update: its entry, and the calls of its kernel for combine where it is not plain.
#include "update_call.cuh"
#include "update_launch.cuh"

namespace zk::cuda {

void run_update(const char* op, const float* hyper, const TensorList& out, const TensorList& params,
                const std::vector<const TensorList*>& states, Action action, const TermArgs& terms, bool all) {
  const DType dtype = dtype_of(op, params[0]);
  RowsLaunch rows{};
  UpdateLaunch pieces{};
  rows.hyper = pieces.hyper = hyper;
  if (!terms.widths.empty()) {
    run_entries(op, rows, out, params, states, terms, [&](const RowsLaunch& launch, uint32_t chunks, void* stream) {
      return launch_rows(launch, chunks, dtype, terms.domain(), action, stream);
    });
  }
  if (all) {
    run_entries(op, pieces, out, params, states, terms, [&](const UpdateLaunch& launch, uint32_t chunks, void* stream) {
      return launch_action(launch, chunks, dtype, terms.domain(), action, stream);
    });
  }
}

namespace {

void update_cuda(TensorList params, TensorList first, TensorList second, std::string rule, Tensor hyper,
                 ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_terms("update", params, terms);
  check_update(first, second, rule_of(rule), hyper, params, terms);
  std::vector<const TensorList*> states;
  if (!first.empty()) states.push_back(&first);
  if (!second.empty()) states.push_back(&second);
  const Action action = action_of(rule_of(rule));
  run_update("update", pointer<float>(hyper), params, params, states, action, terms);
}

}  // namespace

ZK_REGISTER(
    update,
    "update(Tensor(a!)[] params, Tensor(b!)[] first, Tensor(c!)[] second, str rule, Tensor hyper, " ZK_TERMS_SCHEMA
    ") -> ()")

}  // namespace zk::cuda
