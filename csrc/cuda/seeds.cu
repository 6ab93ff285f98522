// derive_seed: two words of a Philox block as a seed.
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

ZK_GLOBAL derive_seed_kernel(const int64_t* run_seed, const int64_t* step, const int64_t* k, int64_t* out,
                             int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) {
    out[i] = static_cast<int64_t>(derive_seed(static_cast<uint64_t>(run_seed[i]),
                                              static_cast<uint64_t>(step[i]), static_cast<uint32_t>(k[i])));
  }
}

namespace {

Tensor derive_seed_cuda(Tensor run_seed, Tensor step, Tensor k) {
  for (const auto* t : {&step, &k}) check_device("derive_seed", *t, run_seed);
  Tensor seeds = torch::stable::empty_like(run_seed);
  if (run_seed.numel() == 0) return seeds;
  const OnDevice on(run_seed);
  const int64_t n = run_seed.numel();
  check_launch("derive_seed",
               launch(derive_seed_kernel, static_cast<uint32_t>((n + kThreads - 1) / kThreads), on.stream,
                      pointer<int64_t>(run_seed), pointer<int64_t>(step), pointer<int64_t>(k),
                      static_cast<int64_t*>(seeds.mutable_data_ptr()), n));
  return seeds;
}

}  // namespace

ZK_REGISTER(derive_seed, "derive_seed(Tensor run_seed, Tensor step, Tensor k) -> Tensor")

}  // namespace zk::cuda
