// Launches of spread.
#include "launch.cuh"
#include "spread_kernel.cuh"

namespace zk::cuda {

int launch_spread(const SpreadLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return launch(dist == kNormal ? spread_kernel<D, kNormal> : spread_kernel<D, kRademacher>, chunks, stream, p);
  });
}

}  // namespace zk::cuda
