// Launches of squares.
#include "launch.cuh"
#include "squares_kernel.cuh"

namespace zk::cuda {

int launch_squares(const SquaresLaunch& p, uint32_t chunks, void* stream) {
  return launch(squares_kernel, chunks, stream, p);
}

}  // namespace zk::cuda
