// The launches of combine and update for tensors whose rows are parts of a matrix's rows.
#include "rows_kernel.cuh"
#include "update_call.cuh"
#include "update_launch.cuh"

namespace zk::cuda {
namespace {

constexpr bool is_exact(uint32_t d) {
  const Divisor divisor(d);
  const uint32_t most = 0x7fffffffu / d;
  for (uint32_t q : {0u, 1u, most / 2, most - 1, most}) {
    if (q <= most && (divisor.quotient(q * d) != q || (q > 0 && divisor.quotient(q * d - 1) != q - 1)))
      return false;
  }
  return divisor.quotient(0x7fffffffu) == most;
}
static_assert(is_exact(1) && is_exact(2) && is_exact(3) && is_exact(7) && is_exact(172) && is_exact(641) &&
              is_exact(4096) && is_exact(0x10001) && is_exact(0x3fffffff) && is_exact(0x40000000) &&
              is_exact(0x40000001) && is_exact(0x7fffffff));

template <DType D, Domain Dist, bool Stochastic>
int launch_plain_count(const RowsLaunch& p, uint32_t chunks, void* stream) {
  if (p.count != 1) return launch(combine_rows_kernel<D, Dist, 0, true, Stochastic>, chunks, stream, p);
  return launch(p.decay != nullptr ? combine_rows_kernel<D, Dist, 1, true, Stochastic>
                                   : combine_rows_kernel<D, Dist, 1, false, Stochastic>,
                chunks, stream, p);
}

template <DType D, Domain Dist>
int launch_plain(const RowsLaunch& p, uint32_t chunks, void* stream) {
  if constexpr (D != DType::f32) {
    if (p.rounding_seed != nullptr) return launch_plain_count<D, Dist, true>(p, chunks, stream);
  }
  return launch_plain_count<D, Dist, false>(p, chunks, stream);
}

}  // namespace

int launch_rows(const RowsLaunch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream) {
  const bool masked = p.mask_seed != nullptr || p.table.tensor[0].mask != nullptr;
  if (action == Action::combine && !masked) {
    return with_dtype(dtype, [&]<DType D>() {
      return dist == kNormal ? launch_plain<D, kNormal>(p, chunks, stream)
                             : launch_plain<D, kRademacher>(p, chunks, stream);
    });
  }
  return launch_action(p, chunks, dtype, dist, action, stream);
}

}  // namespace zk::cuda
