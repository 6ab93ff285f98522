// fan_out: the combine kernel with two more outputs.
#include "combine.h"

namespace zk::cuda {
namespace {

void run(const Rows& rows, const Tensor& seed, const Tensor& coeff, const TermArgs& terms) {
  CombineShared shared{};
  shared.probe_seed = pointer<int64_t>(seed);
  shared.probe_coeff = pointer<float>(coeff);
  run_plain("fan_out", shared, rows, terms, seed);
}

void fan_out_cuda(TensorList params, TensorList plus, TensorList minus, Tensor seed, Tensor coeff,
                  ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_one_piece("fan_out", terms);
  check_terms("fan_out", params, terms);
  check_beside("fan_out", plus, params);
  check_beside("fan_out", minus, params);
  check_one_direction(seed, coeff, params[0]);
  const std::vector<Row> rows = rows_of("fan_out", params, params, {&plus, &minus}, terms);
  run(Rows(rows), seed, coeff, terms);
}

void fan_out_planned_cuda(Tensor table, Tensor seed, Tensor coeff, ZK_PLANNED_PARAMS) {
  const Rows rows("fan_out", table);
  const TermArgs terms = ZK_PLANNED_TERMS;
  check_planned("fan_out", rows, terms);
  check_one_direction(seed, coeff, seeds);
  run(rows, seed, coeff, terms);
}

}  // namespace

ZK_REGISTER(fan_out,
            "fan_out(Tensor(a!)[] params, Tensor(b!)[] plus, Tensor(c!)[] minus, "
            "Tensor seed, Tensor coeff, " ZK_TERMS_SCHEMA ") -> ()")
ZK_REGISTER_PLANNED(fan_out,
                    "fan_out_planned(Tensor table, Tensor seed, Tensor coeff, " ZK_PLANNED_SCHEMA ") -> ()")

}  // namespace zk::cuda
