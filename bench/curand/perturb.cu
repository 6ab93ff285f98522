// theta += c * z with z drawn as cuRAND's curand_normal4 draws it on Philox4x32-10: four uniforms from the
// four words of a block, and the textbook Box-Muller transform on the device's logarithm, square root and
// sine. One pass, in place, with 16-byte accesses: what someone would write who fuses cuRAND's device
// functions by hand. A baseline, not a contract.
//
// cuRAND's state (a struct of 64 bytes and a skip-ahead for each thread) is left out, which is in its favour.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../csrc/noise/philox.h"

namespace {

template <class T>
struct alignas(16) Vector {
  static constexpr int kElements = 16 / sizeof(T);
  T element[kElements];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half_rn(x); }

// (0, 1], as curand_uniform: the logarithm never sees 0.
__device__ __forceinline__ float uniform(uint32_t x) { return x * 2.3283064e-10f + 1.1641532e-10f; }

__device__ __forceinline__ void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float r = sqrtf(-2.0f * logf(uniform(a)));
  __sincosf(6.2831855f * uniform(b), &z1, &z0);
  z0 *= r;
  z1 *= r;
}

template <class T>
__global__ void __launch_bounds__(256) perturb_kernel(T* theta, int64_t vectors, float c, zk::PhiloxKey key) {
  constexpr int kBlocks = Vector<T>::kElements / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  auto* data = reinterpret_cast<Vector<T>*>(theta);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += stride) {
    Vector<T> v = data[i];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint64_t block = static_cast<uint64_t>(i) * kBlocks + b;
      const auto x = zk::philox<zk::Scalar>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                            0, 0, key);
      float z[4];
      box_muller(x.w[0], x.w[1], z[0], z[1]);
      box_muller(x.w[2], x.w[3], z[2], z[3]);
#pragma unroll
      for (int e = 0; e < 4; ++e) from_float(to_float(v.element[4 * b + e]) + c * z[e], v.element[4 * b + e]);
    }
    data[i] = v;
  }
}

template <class T>
void launch(void* theta, int64_t numel, float c, uint64_t seed, cudaStream_t stream) {
  const int64_t vectors = numel / Vector<T>::kElements, wanted = (vectors + 255) / 256;
  // A grid that covers the tensor, as the fastest plain copies have; cuRAND's own examples loop over a
  // smaller one.
  const auto blocks = static_cast<unsigned>(wanted < 0x7fffffff ? wanted : 0x7fffffff);
  perturb_kernel<T><<<blocks, 256, 0, stream>>>(static_cast<T*>(theta), vectors, c, zk::philox_key(seed));
}

}  // namespace

// dtype: 0 fp32, 1 bf16, 2 fp16. theta is aligned to 16 bytes and numel a multiple of 8. Returns a
// cudaError_t.
extern "C" int curand_perturb(void* theta, int64_t numel, int dtype, float c, uint64_t seed, void* stream) {
  if (numel == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == 0) launch<float>(theta, numel, c, seed, s);
  if (dtype == 1) launch<__nv_bfloat16>(theta, numel, c, seed, s);
  if (dtype == 2) launch<__half>(theta, numel, c, seed, s);
  return cudaGetLastError();
}
