// Launches of low_rank.
#include <cuda_runtime.h>

#include "low_rank_kernel.cuh"

namespace zk::cuda {
int launch_low_rank(const LowRankLaunch& p, uint32_t chunks, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::f32: low_rank_kernel<DType::f32><<<chunks, kThreads, 0, s>>>(p); break;
    case DType::bf16: low_rank_kernel<DType::bf16><<<chunks, kThreads, 0, s>>>(p); break;
    case DType::f16: low_rank_kernel<DType::f16><<<chunks, kThreads, 0, s>>>(p); break;
    case DType::i8: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace zk::cuda
