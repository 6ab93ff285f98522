// The CUDA library for CPU tensors: csrc/cuda whole, launches included, its kernels run one thread after the
// other. They neither communicate nor synchronise, so this executes exactly the packing, the indexing and the
// arithmetic that a GPU would, but for the conversion and square-root instructions, whose host equivalents
// the storage and lanes headers choose.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace {

struct Index {
  uint32_t x;
};
thread_local Index blockIdx, threadIdx;
int64_t launches = 0, guards = 0;

// What tests/ptx puts in the place of the loops below: called with the kernel's address, its blocks, and the
// addresses and bytes of its arguments.
using Launcher = int32_t (*)(const void* kernel, uint32_t blocks, const void* const* arguments,
                             const int64_t* sizes, int32_t count);
Launcher launcher = nullptr;

}  // namespace

namespace zk::cuda {

template <class... Parameters>
int launch(void (*kernel)(Parameters...), uint32_t blocks, void*,
           const std::type_identity_t<Parameters>&... arguments) {
  ++launches;
  if (guards != 1) return 1;  // outside of a DeviceGuard: on whichever device is current
  if (launcher != nullptr) {
    const void* const addresses[] = {&arguments...};
    const int64_t sizes[] = {sizeof(Parameters)...};
    return launcher(reinterpret_cast<const void*>(kernel), blocks, addresses, sizes, sizeof...(Parameters));
  }
  for (uint32_t b = 0; b < blocks; ++b) {
    for (uint32_t t = 0; t < 256; ++t) {
      blockIdx.x = b;
      threadIdx.x = t;
      kernel(arguments...);
    }
  }
  return 0;
}

bool large_arguments = true;
inline bool takes_large_arguments() { return large_arguments; }

inline const char* launch_error(int) { return "expected a device guard around the launch"; }

}  // namespace zk::cuda

// For another dispatch key, in a namespace of its own, and without a device.
namespace torch::stable::host {
struct DeviceGuard {
  explicit DeviceGuard(int32_t) { ++guards; }
  ~DeviceGuard() { --guards; }
  DeviceGuard(const DeviceGuard&) = delete;
};
}  // namespace torch::stable::host

#define accelerator host
#define CUDA CPU
#define zokernels_cuda zokernels_cuda_on_host
#include "all.h"  // every file of csrc/cuda that is compiled, written by the test

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

extern "C" __attribute__((visibility("default"))) int64_t launches_on_host() { return launches; }
extern "C" __attribute__((visibility("default"))) void take_large_arguments(bool take) {
  zk::cuda::large_arguments = take;
}
extern "C" __attribute__((visibility("default"))) void set_launcher(Launcher wanted) { launcher = wanted; }
