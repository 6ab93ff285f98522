// update: its entry, and the calls of its kernel for combines that are not plain.
#include "update_call.cuh"
#include "update_launch.cuh"

namespace zk::cuda {

void run_update(const char* op, const float* hyper, const Rows& rows, Action action, const TermArgs& terms,
                const Tensor& on, bool all) {
  const auto dtype = static_cast<DType>(rows.first().dtype);
  if (rows.have_width()) {
    RowsLaunch split{};
    split.hyper = hyper;
    run_entries(op, split, rows, terms, on, [&](const RowsLaunch& launch, uint32_t chunks, void* stream) {
      return launch_rows(launch, chunks, dtype, terms.domain(), action, stream);
    });
  }
  if (!all) return;
  const bool large = [&] {
    const OnDevice device(on);
    return takes_large_arguments();
  }();
  with_argument<UpdateEntry>(rows.count, large, [&]<int Bytes>() {
    using Launch = UpdateLaunchOf<UpdateEntry, Bytes>;
    Launch whole{};
    whole.hyper = hyper;
    run_entries(op, whole, rows, terms, on, [&](const Launch& launch, uint32_t chunks, void* stream) {
      return launch_action(launch, chunks, dtype, terms.domain(), action, stream);
    });
  });
}

namespace {

void update_cuda(TensorList params, TensorList first, TensorList second, std::string rule, Tensor hyper,
                 ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_terms("update", params, terms);
  check_update(first, second, rule_of(rule), hyper, params, terms);
  std::vector<Row> rows = rows_of("update", params, params, {&first, &second}, terms);
  for (Row& row : rows) {
    if (!first.empty()) row.state[0] = is_bf16(first[0]);
    if (!second.empty()) row.state[1] = is_bf16(second[0]);
  }
  run_update("update", pointer<float>(hyper), Rows(rows), action_of(rule_of(rule)), terms, params[0]);
}

void update_planned_cuda(Tensor table, std::string rule, Tensor hyper, ZK_PLANNED_PARAMS) {
  const Rows rows("update", table);
  const TermArgs terms = ZK_PLANNED_TERMS;
  check_planned("update", rows, terms);
  check_hyper(rule_of(rule), hyper, terms);
  run_update("update", pointer<float>(hyper), rows, action_of(rule_of(rule)), terms, hyper);
}

}  // namespace

ZK_REGISTER(update,
            "update(Tensor(a!)[] params, Tensor(b!)[] first, Tensor(c!)[] second, "
            "str rule, Tensor hyper, " ZK_TERMS_SCHEMA ") -> ()")
ZK_REGISTER_PLANNED(update,
                    "update_planned(Tensor table, str rule, Tensor hyper, " ZK_PLANNED_SCHEMA ") -> ()")

}  // namespace zk::cuda
