// combine: its entry, and the launches of plain combine and fan-out (which instantiation serves a call).
#include "combine_kernel.cuh"
#include "update_call.cuh"

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

int launch_combine(const CombineLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return dist == kNormal ? launch_rounding<D, kNormal>(p, chunks, stream)
                           : launch_rounding<D, kRademacher>(p, chunks, stream);
  });
}

}  // namespace

void run_plain(const char* op, CombineLaunch shared, const TensorList& out, const TensorList& params,
               const TensorList& plus, const TensorList& minus, const TermArgs& terms) {
  const OnDevice on(params[0]);
  const DType dtype = dtype_of(op, params[0]);
  shared.seeds = pointer<int64_t>(terms.seeds);
  shared.coeffs = pointer<float>(terms.coeffs);
  shared.decay = pointer<float>(terms.decay);
  shared.rounding_seed = pointer<int64_t>(terms.rounding_seed);
  shared.count = static_cast<int32_t>(terms.seeds.numel());

  std::vector<Packed<CombineEntry>> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (terms.in_rows(i)) continue;
    const CombineEntry entry{params[i].const_data_ptr(),
                             out[i].mutable_data_ptr(),
                             plus.empty() ? nullptr : plus[i].mutable_data_ptr(),
                             minus.empty() ? nullptr : minus[i].mutable_data_ptr(),
                             params[i].numel(),
                             static_cast<uint64_t>(terms.offsets[i])};
    tensors.push_back(packed(entry, terms, i, chunks_of(entry.offset, entry.numel, terms.domain())));
  }
  pack_launches(shared, tensors, [&](const CombineLaunch& launch, uint32_t chunks) {
    check_launch(op, launch_combine(launch, chunks, dtype, terms.domain(), on.stream));
  });
}

namespace {

void combine_cuda(TensorList out, TensorList params, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_terms("combine", params, terms);
  check_beside("combine", out, params);
  if (terms.is_plain()) run_plain("combine", CombineLaunch{}, out, params, {}, {}, terms);
  if (curvature.empty())
    return run_update("combine", nullptr, out, params, {}, Action::combine, terms, !terms.is_plain());
  run_update("combine", nullptr, out, params, {&curvature}, Action::scaled_combine, terms);
}

}  // namespace

ZK_REGISTER(combine, "combine(Tensor(a!)[] out, Tensor[] params, " ZK_TERMS_SCHEMA ") -> ()")

}  // namespace zk::cuda
