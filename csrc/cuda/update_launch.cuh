// Chooses the instantiation of the update kernel that serves a call.
#pragma once

#include "launch.cuh"
#include "update_kernel.cuh"

namespace zk::cuda {

template <DType D, class Rule, class Launch>
int launch_rule(const Launch& p, uint32_t chunks, Domain dist, void* stream) {
  return launch(dist == kNormal ? update_kernel<D, kNormal, Rule, Launch>
                                : update_kernel<D, kRademacher, Rule, Launch>,
                chunks, stream, p);
}

template <class Launch>
int launch_action(const Launch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    switch (action) {
      case Action::combine: break;
      case Action::scaled_combine:
        return launch_rule<D, ScaledCombine>(p, chunks, dist, stream);
#define ZK_CASE(rule) \
  case Action::rule: return launch_rule<D, rules::rule>(p, chunks, dist, stream);
        ZK_RULES(ZK_CASE)
#undef ZK_CASE
    }
    return launch_rule<D, Combine>(p, chunks, dist, stream);
  });
}

}  // namespace zk::cuda
