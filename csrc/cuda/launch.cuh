// Launches a kernel of kThreads threads a block on a cudaStream_t. tests/cuda_on_host compiles this folder
// for the host and has its own.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <type_traits>

#include "table.h"

namespace zk::cuda {

template <class... Parameters>
int launch(void (*kernel)(Parameters...), uint32_t blocks, void* stream,
           const std::type_identity_t<Parameters>&... arguments) {
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

// Whether the current device takes arguments of kLargeArgument bytes, and the driver passes them on.
inline bool takes_large_arguments() {
  static const bool passes_on = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  int device = 0, major = 0;
  return passes_on && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 7;
}

inline const char* launch_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace zk::cuda

#endif
