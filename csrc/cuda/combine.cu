// Launches of plain combine and fan-out: which instantiation serves a call.
#include "combine_kernel.cuh"
#include "launch.cuh"

namespace zk::cuda {
namespace {

template <DType D, Domain Dist, int K, bool Decay, bool Stochastic, bool FanOut>
int launch_kernel(const CombineLaunch& p, uint32_t chunks, void* stream) {
  if constexpr (Dist == kNormal) {
    return launch(combine_normal_kernel<D, K, Decay, Stochastic, FanOut>, chunks, stream, p);
  } else {
    return launch(combine_rademacher_kernel<D, K, Decay, Stochastic, FanOut>, chunks, stream, p);
  }
}

// One direction (perturb, update), one with weight decay, and two (update and next perturbation) are compiled for; any
// other number reads keys and coefficients in a loop. A fan-out has one pending update, or any.
template <DType D, Domain Dist, bool Stochastic>
int launch_count(const CombineLaunch& p, uint32_t chunks, void* stream) {
  const bool decay = p.decay != nullptr, fan_out = p.probe_seed != nullptr;
  if (fan_out && p.count == 1 && !decay) return launch_kernel<D, Dist, 1, false, Stochastic, true>(p, chunks, stream);
  if (fan_out) return launch_kernel<D, Dist, 0, true, Stochastic, true>(p, chunks, stream);
  if (p.count == 1 && !decay) return launch_kernel<D, Dist, 1, false, Stochastic, false>(p, chunks, stream);
  if (p.count == 1) return launch_kernel<D, Dist, 1, true, Stochastic, false>(p, chunks, stream);
  if (p.count == 2 && !decay) return launch_kernel<D, Dist, 2, false, Stochastic, false>(p, chunks, stream);
  return launch_kernel<D, Dist, 0, true, Stochastic, false>(p, chunks, stream);
}

template <DType D, Domain Dist>
int launch_rounding(const CombineLaunch& p, uint32_t chunks, void* stream) {
  if constexpr (D != DType::f32) {
    if (p.rounding_seed != nullptr) return launch_count<D, Dist, true>(p, chunks, stream);
  }
  return launch_count<D, Dist, false>(p, chunks, stream);
}

}  // namespace

int launch_combine(const CombineLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return dist == kNormal ? launch_rounding<D, kNormal>(p, chunks, stream)
                           : launch_rounding<D, kRademacher>(p, chunks, stream);
  });
}

int launch_derive_seed(const int64_t* run_seed, const int64_t* step, const int64_t* k, int64_t* out, int64_t n,
                       void* stream) {
  const auto blocks = static_cast<uint32_t>((n + kThreads - 1) / kThreads);
  return launch(derive_seed_kernel, blocks, stream, run_seed, step, k, out, n);
}

const char* error_string(int error) { return launch_error(error); }

}  // namespace zk::cuda
