// The CUDA kernels' own source, run on the CPU one thread after the other. They neither communicate nor synchronise, so
// this executes exactly the indexing, the chunk table and the arithmetic that a GPU would, but for the conversion and
// square-root instructions, whose host equivalents the storage and lanes headers choose.
#include <cstdint>
#include <utility>
#include <vector>

namespace {
struct Index {
  uint32_t x;
};
thread_local Index blockIdx, threadIdx;
}  // namespace

#include "csrc/cuda/combine_kernel.cuh"

namespace zk::cuda {
namespace {

template <class Kernel>
void run(const CombineLaunch& p, uint32_t chunks, const Kernel& kernel) {
  for (uint32_t b = 0; b < chunks; ++b) {
    for (uint32_t t = 0; t < kThreads; ++t) {
      blockIdx.x = b;
      threadIdx.x = t;
      kernel(p);
    }
  }
}

template <DType D, int K, bool Decay, bool Stochastic, bool FanOut>
void run_dist(const CombineLaunch& p, uint32_t chunks, Domain dist) {
  run(p, chunks, dist == kNormal ? combine_normal_kernel<D, K, Decay, Stochastic, FanOut>
                                 : combine_rademacher_kernel<D, K, Decay, Stochastic, FanOut>);
}

// The same choice of instantiation as csrc/cuda/combine.cu.
template <DType D, bool Stochastic>
void run_count(const CombineLaunch& p, uint32_t chunks, Domain dist) {
  const bool decay = p.decay != nullptr, fan_out = p.probe_seed != nullptr;
  if (fan_out && p.count == 1 && !decay) return run_dist<D, 1, false, Stochastic, true>(p, chunks, dist);
  if (fan_out) return run_dist<D, 0, true, Stochastic, true>(p, chunks, dist);
  if (p.count == 1 && !decay) return run_dist<D, 1, false, Stochastic, false>(p, chunks, dist);
  if (p.count == 1) return run_dist<D, 1, true, Stochastic, false>(p, chunks, dist);
  if (p.count == 2 && !decay) return run_dist<D, 2, false, Stochastic, false>(p, chunks, dist);
  run_dist<D, 0, true, Stochastic, false>(p, chunks, dist);
}

template <DType D>
void run_dtype(const CombineLaunch& p, uint32_t chunks, Domain dist) {
  p.rounding_seed != nullptr ? run_count<D, true>(p, chunks, dist) : run_count<D, false>(p, chunks, dist);
}

}  // namespace
}  // namespace zk::cuda

// Returns the number of launches.
extern "C" __attribute__((visibility("default"))) int combine_on_host(
    int64_t tensors, const void* const* in, void* const* out, void* const* plus, void* const* minus,
    const int64_t* probe_seed, const float* probe_coeff, const int64_t* numel, const uint64_t* offset,
    const uint32_t* stream, int64_t count, const int64_t* seeds, const float* coeffs, const float* decay,
    const int64_t* rounding_seed, int dtype, int dist) {
  using namespace zk::cuda;
  CombineLaunch shared{};
  shared.seeds = seeds;
  shared.coeffs = coeffs;
  shared.decay = decay;
  shared.rounding_seed = rounding_seed;
  shared.probe_seed = probe_seed;
  shared.probe_coeff = probe_coeff;
  shared.count = static_cast<int32_t>(count);
  std::vector<std::pair<TensorEntry, uint32_t>> entries;
  for (int64_t i = 0; i < tensors; ++i) {
    void *up = plus != nullptr ? plus[i] : nullptr, *down = minus != nullptr ? minus[i] : nullptr;
    entries.push_back({{in[i], out[i], up, down, numel[i], offset[i]}, stream[i]});
  }
  int launches = 0;
  const auto domain = static_cast<zk::Domain>(dist);
  pack_launches(shared, entries, domain, [&](const CombineLaunch& p, uint32_t chunks) {
    ++launches;
    switch (static_cast<DType>(dtype)) {
      case DType::f32: return run_dtype<DType::f32>(p, chunks, domain);
      case DType::bf16: return run_dtype<DType::bf16>(p, chunks, domain);
      case DType::f16: return run_dtype<DType::f16>(p, chunks, domain);
    }
  });
  return launches;
}
