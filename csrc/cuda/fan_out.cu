// fan_out: the combine kernel with two more outputs.
#include "combine.h"

namespace zk::cuda {
namespace {

void fan_out_cuda(TensorList params, TensorList plus, TensorList minus, Tensor seed, Tensor coeff, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_one_piece("fan_out", terms);
  check_terms("fan_out", params, terms);
  check_beside("fan_out", plus, params);
  check_beside("fan_out", minus, params);
  check_one_direction(seed, coeff, params[0]);
  CombineLaunch shared{};
  shared.probe_seed = pointer<int64_t>(seed);
  shared.probe_coeff = pointer<float>(coeff);
  run_plain("fan_out", shared, params, params, plus, minus, terms);
}

}  // namespace

ZK_REGISTER(
    fan_out,
    "fan_out(Tensor(a!)[] params, Tensor(b!)[] plus, Tensor(c!)[] minus, Tensor seed, Tensor coeff, " ZK_TERMS_SCHEMA
    ") -> ()")

}  // namespace zk::cuda
