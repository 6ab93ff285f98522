// Launches of project.
#include "launch.cuh"
#include "project_kernel.cuh"

namespace zk::cuda {

int launch_project(const ProjectLaunch& p, uint32_t blocks, DType dtype, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return launch(dist == kNormal ? project_kernel<D, kNormal> : project_kernel<D, kRademacher>, blocks, stream, p);
  });
}

}  // namespace zk::cuda
