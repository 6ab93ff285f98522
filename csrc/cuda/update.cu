// Launches of update, and of combine where it is not plain.
#include <cuda_runtime.h>

#include "update_kernel.cuh"

namespace zk::cuda {
namespace {

template <DType D, class Rule>
void launch(const UpdateLaunch& p, uint32_t chunks, Domain dist, cudaStream_t stream) {
  if (dist == kNormal) {
    update_kernel<D, kNormal, Rule><<<chunks, kThreads, 0, stream>>>(p);
  } else {
    update_kernel<D, kRademacher, Rule><<<chunks, kThreads, 0, stream>>>(p);
  }
}

template <DType D>
void launch_action(const UpdateLaunch& p, uint32_t chunks, Domain dist, Action action, cudaStream_t stream) {
  switch (action) {
    case Action::combine: return launch<D, Combine>(p, chunks, dist, stream);
    case Action::scaled_combine: return launch<D, ScaledCombine>(p, chunks, dist, stream);
#define ZK_CASE(rule) \
  case Action::rule: return launch<D, rules::rule>(p, chunks, dist, stream);
      ZK_RULES(ZK_CASE)
#undef ZK_CASE
  }
}

}  // namespace

int launch_update(const UpdateLaunch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::f32: launch_action<DType::f32>(p, chunks, dist, action, s); break;
    case DType::bf16: launch_action<DType::bf16>(p, chunks, dist, action, s); break;
    case DType::f16: launch_action<DType::f16>(p, chunks, dist, action, s); break;
    case DType::i8: launch<DType::i8, Combine>(p, chunks, dist, s); break;
  }
  return cudaGetLastError();
}

}  // namespace zk::cuda
