// Launches of spread.
#include <cuda_runtime.h>

#include "spread_kernel.cuh"

namespace zk::cuda {
namespace {

template <DType D>
void launch(const SpreadLaunch& p, uint32_t chunks, Domain dist, cudaStream_t stream) {
  if (dist == kNormal) {
    spread_kernel<D, kNormal><<<chunks, kThreads, 0, stream>>>(p);
  } else {
    spread_kernel<D, kRademacher><<<chunks, kThreads, 0, stream>>>(p);
  }
}

}  // namespace

int launch_spread(const SpreadLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::f32: launch<DType::f32>(p, chunks, dist, s); break;
    case DType::bf16: launch<DType::bf16>(p, chunks, dist, s); break;
    case DType::f16: launch<DType::f16>(p, chunks, dist, s); break;
    case DType::i8: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace zk::cuda
