// Launches of update, and of combine where it is not plain.
#include "update_launch.cuh"

namespace zk::cuda {

int launch_update(const UpdateLaunch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream) {
  if (dtype == DType::i8) return launch_rule<DType::i8, Combine>(p, chunks, dist, stream);
  return launch_action(p, chunks, dtype, dist, action, stream);
}

}  // namespace zk::cuda
