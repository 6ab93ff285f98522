// combine: its entry, and the launches of plain combine and fan-out (which instantiation serves a call).
#include "combine_kernel.cuh"
#include "update_call.cuh"

namespace zk::cuda {
namespace {

template <DType D, Domain Dist, int K, bool Decay, bool Stochastic, bool FanOut, int Bytes>
int launch_kernel(const CombineLaunch<Bytes>& p, uint32_t chunks, void* stream) {
  if constexpr (Dist == kNormal) {
    return launch(combine_normal_kernel<D, K, Decay, Stochastic, Bytes, FanOut>, chunks, stream, p);
  } else {
    return launch(combine_rademacher_kernel<D, K, Decay, Stochastic, Bytes, FanOut>, chunks, stream, p);
  }
}

// Kernels are compiled for one direction (to perturb, to update), for one with weight decay, and for two (an
// update and the next perturbation). For any other number a kernel reads keys and coefficients in a loop. The
// kernels of fan-outs are for one pending update, or for any number.
template <DType D, Domain Dist, bool Stochastic, int Bytes>
int launch_count(const CombineLaunch<Bytes>& p, uint32_t chunks, void* stream) {
  const bool decay = p.decay != nullptr, fan_out = p.probe_seed != nullptr;
  if (fan_out && p.count == 1 && !decay)
    return launch_kernel<D, Dist, 1, false, Stochastic, true>(p, chunks, stream);
  if (fan_out) return launch_kernel<D, Dist, 0, true, Stochastic, true>(p, chunks, stream);
  if (p.count == 1 && !decay) return launch_kernel<D, Dist, 1, false, Stochastic, false>(p, chunks, stream);
  if (p.count == 1) return launch_kernel<D, Dist, 1, true, Stochastic, false>(p, chunks, stream);
  if (p.count == 2 && !decay) return launch_kernel<D, Dist, 2, false, Stochastic, false>(p, chunks, stream);
  return launch_kernel<D, Dist, 0, true, Stochastic, false>(p, chunks, stream);
}

template <DType D, Domain Dist, int Bytes>
int launch_rounding(const CombineLaunch<Bytes>& p, uint32_t chunks, void* stream) {
  if constexpr (D != DType::f32) {
    if (p.rounding_seed != nullptr) return launch_count<D, Dist, true>(p, chunks, stream);
  }
  return launch_count<D, Dist, false>(p, chunks, stream);
}

template <int Bytes>
int launch_combine(const CombineLaunch<Bytes>& p, uint32_t chunks, DType dtype, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return dist == kNormal ? launch_rounding<D, kNormal>(p, chunks, stream)
                           : launch_rounding<D, kRademacher>(p, chunks, stream);
  });
}

}  // namespace

void run_plain(const char* op, CombineShared shared, const Rows& rows, const TermArgs& terms,
               const Tensor& on) {
  const OnDevice device(on);
  shared.seeds = pointer<int64_t>(terms.seeds);
  shared.coeffs = pointer<float>(terms.coeffs);
  shared.decay = pointer<float>(terms.decay);
  shared.rounding_seed = pointer<int64_t>(terms.rounding_seed);
  shared.count = static_cast<int32_t>(terms.seeds.numel());

  std::vector<Packed<CombineEntry>> tensors;
  tensors.reserve(rows.count);
  for (const Row& row : rows) {
    if (row.width > 0) continue;
    const CombineEntry entry{row.in,      row.out,   row.more[0],
                             row.more[1], row.numel, static_cast<uint64_t>(row.offset)};
    tensors.push_back(packed(entry, row, chunks_of(entry.offset, entry.numel, terms.domain())));
  }
  const auto dtype = static_cast<DType>(rows.first().dtype);
  with_argument<CombineEntry>(tensors.size(), takes_large_arguments(), [&]<int Bytes>() {
    CombineLaunch<Bytes> launch;
    static_cast<CombineShared&>(launch) = shared;
    pack_launches(launch, tensors, [&](const CombineLaunch<Bytes>& packed, uint32_t chunks) {
      check_launch(op, launch_combine(packed, chunks, dtype, terms.domain(), device.stream));
    });
  });
}

namespace {

void run(const Rows& rows, const TermArgs& terms, const Tensor& on) {
  const bool plain = is_plain(rows, terms), scaled = rows.first().state[0] >= 0;
  if (plain) run_plain("combine", CombineShared{}, rows, terms, on);
  run_update("combine", nullptr, rows, scaled ? Action::scaled_combine : Action::combine, terms, on, !plain);
}

void combine_cuda(TensorList out, TensorList params, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_terms("combine", params, terms);
  check_beside("combine", out, params);
  std::vector<Row> rows = rows_of("combine", out, params, {}, terms);
  for (Row& row : rows) row.state[0] = curvature.empty() ? -1 : is_bf16(curvature[0]);
  run(Rows(rows), terms, params[0]);
}

void combine_planned_cuda(Tensor table, ZK_PLANNED_PARAMS) {
  const Rows rows("combine", table);
  const TermArgs terms = ZK_PLANNED_TERMS;
  check_planned("combine", rows, terms);
  run(rows, terms, seeds);
}

}  // namespace

ZK_REGISTER(combine, "combine(Tensor(a!)[] out, Tensor[] params, " ZK_TERMS_SCHEMA ") -> ()")
ZK_REGISTER_PLANNED(combine, "combine_planned(Tensor table, " ZK_PLANNED_SCHEMA ") -> ()")

}  // namespace zk::cuda
