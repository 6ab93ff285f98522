// derive_seed: two words of a Philox block as a seed.
#if !defined(ZK_ISA)

#include "op.h"

namespace zk::cpu {
namespace {

Tensor derive_seed_cpu(Tensor run_seed, Tensor step, Tensor k) {
  Tensor seeds = torch::stable::empty_like(run_seed);
  const auto *r = data<uint64_t>(run_seed), *s = data<uint64_t>(step), *j = data<uint64_t>(k);
  auto* out = static_cast<uint64_t*>(seeds.mutable_data_ptr());
  for (int64_t i = 0; i < run_seed.numel(); ++i)
    out[i] = derive_seed(r[i], s[i], static_cast<uint32_t>(j[i]));
  return seeds;
}

}  // namespace

ZK_REGISTER(derive_seed, "derive_seed(Tensor run_seed, Tensor step, Tensor k) -> Tensor")

}  // namespace zk::cpu

#endif
