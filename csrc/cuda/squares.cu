// Launches of squares.
#include <cuda_runtime.h>

#include "squares_kernel.cuh"

namespace zk::cuda {
int launch_squares(const SquaresLaunch& p, uint32_t chunks, void* stream) {
  squares_kernel<<<chunks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace zk::cuda
