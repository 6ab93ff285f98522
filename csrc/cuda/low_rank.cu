// Launches of low_rank.
#include "launch.cuh"
#include "low_rank_kernel.cuh"

namespace zk::cuda {

int launch_low_rank(const LowRankLaunch& p, uint32_t chunks, DType dtype, void* stream) {
  return with_dtype(dtype, [&]<DType D>() { return launch(low_rank_kernel<D>, chunks, stream, p); });
}

}  // namespace zk::cuda
