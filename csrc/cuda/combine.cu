// Launches of plain combine and fan-out: which instantiation serves a call.
#include <cuda_runtime.h>

#include "combine_kernel.cuh"

namespace zk::cuda {
namespace {

template <DType D, Domain Dist, int K, bool Decay, bool Stochastic, bool FanOut>
void launch(const CombineLaunch& p, uint32_t chunks, cudaStream_t stream) {
  if constexpr (Dist == kNormal) {
    combine_normal_kernel<D, K, Decay, Stochastic, FanOut><<<chunks, kThreads, 0, stream>>>(p);
  } else {
    combine_rademacher_kernel<D, K, Decay, Stochastic, FanOut><<<chunks, kThreads, 0, stream>>>(p);
  }
}

// One direction (perturb, update), one with weight decay, and two (update and next perturbation) are compiled for; any
// other number reads keys and coefficients in a loop. A fan-out has one pending update, or any.
template <DType D, Domain Dist, bool Stochastic>
void launch_count(const CombineLaunch& p, uint32_t chunks, cudaStream_t stream) {
  const bool decay = p.decay != nullptr, fan_out = p.probe_seed != nullptr;
  if (fan_out && p.count == 1 && !decay) return launch<D, Dist, 1, false, Stochastic, true>(p, chunks, stream);
  if (fan_out) return launch<D, Dist, 0, true, Stochastic, true>(p, chunks, stream);
  if (p.count == 1 && !decay) return launch<D, Dist, 1, false, Stochastic, false>(p, chunks, stream);
  if (p.count == 1) return launch<D, Dist, 1, true, Stochastic, false>(p, chunks, stream);
  if (p.count == 2 && !decay) return launch<D, Dist, 2, false, Stochastic, false>(p, chunks, stream);
  launch<D, Dist, 0, true, Stochastic, false>(p, chunks, stream);
}

template <DType D, Domain Dist>
void launch_rounding(const CombineLaunch& p, uint32_t chunks, cudaStream_t stream) {
  if constexpr (D != DType::f32) {
    if (p.rounding_seed != nullptr) return launch_count<D, Dist, true>(p, chunks, stream);
  }
  launch_count<D, Dist, false>(p, chunks, stream);
}

template <DType D>
void launch_dist(const CombineLaunch& p, uint32_t chunks, Domain dist, cudaStream_t stream) {
  dist == kNormal ? launch_rounding<D, kNormal>(p, chunks, stream) : launch_rounding<D, kRademacher>(p, chunks, stream);
}

}  // namespace

int launch_combine(const CombineLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::f32: launch_dist<DType::f32>(p, chunks, dist, s); break;
    case DType::bf16: launch_dist<DType::bf16>(p, chunks, dist, s); break;
    case DType::f16: launch_dist<DType::f16>(p, chunks, dist, s); break;
    case DType::i8: return cudaErrorInvalidValue;  // never plain
  }
  return cudaGetLastError();
}

int launch_derive_seed(const int64_t* run_seed, const int64_t* step, const int64_t* k, int64_t* out, int64_t n,
                       void* stream) {
  const auto blocks = static_cast<uint32_t>((n + kThreads - 1) / kThreads);
  derive_seed_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(run_seed, step, k, out, n);
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace zk::cuda
