// What this library was built for and what the driver can run, for zokernels/backends/cuda/support.py. Called
// through ctypes, before any tensor: neither function touches a device.
#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define ZK_TEXT(x) #x
#define ZK_TEXT_OF(x) ZK_TEXT(x)

// JSON: the version of the CUDA runtime inside as 1000 major + 10 minor, the compiler's as [major, minor],
// and the architectures as CMake names them ("80-real": machine code, "90-virtual": PTX, "120": both).
extern "C" __attribute__((visibility("default"))) const char* zokernels_cuda_build() {
  return "{\"runtime\": " ZK_TEXT_OF(CUDART_VERSION) ", \"compiler\": [" ZK_TEXT_OF(
      __CUDACC_VER_MAJOR__) ", " ZK_TEXT_OF(__CUDACC_VER_MINOR__) "], \"targets\": \"" ZK_CUDA_TARGETS "\"}";
}

// The newest CUDA version that the driver runs, as 1000 major + 10 minor; 0 where there is no driver.
extern "C" __attribute__((visibility("default"))) int zokernels_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

#endif
