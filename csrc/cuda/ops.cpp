// torch.ops.zokernels_cuda.*: unpacks tensors (stable ABI only) and launches on the current stream of their device.
// Arguments were checked in zokernels/checks.py; the checks here guard memory against a direct call.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "../op_args.h"
#include "combine.h"

// In libtorch_cuda, which a CPU build of torch lacks: weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace zk::cuda {
namespace {

using torch::stable::Tensor;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "zokernels_cuda::combine: expected float32, bfloat16 or float16 tensors");
  }
}

void* current_stream(const Tensor& t) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "zokernels_cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, "zokernels_cuda::", op, ": launch failed: ", error_string(error));
}

// combine where plus and minus are empty, else fan_out.
void run(const char* op, CombineLaunch shared, const std::vector<Tensor>& out, const std::vector<Tensor>& params,
         const std::vector<Tensor>& plus, const std::vector<Tensor>& minus, const Tensor& seeds, const Tensor& coeffs,
         const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets, int64_t dist,
         const std::optional<Tensor>& decay, const std::optional<Tensor>& rounding_seed) {
  torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  void* stream = current_stream(params[0]);
  const DType dtype = dtype_of(params[0]);
  const auto domain = static_cast<Domain>(dist);

  shared.seeds = static_cast<const int64_t*>(seeds.const_data_ptr());
  shared.coeffs = static_cast<const float*>(coeffs.const_data_ptr());
  if (decay) shared.decay = static_cast<const float*>(decay->const_data_ptr());
  if (rounding_seed) shared.rounding_seed = static_cast<const int64_t*>(rounding_seed->const_data_ptr());
  shared.count = static_cast<int32_t>(seeds.numel());

  std::vector<std::pair<TensorEntry, uint32_t>> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    tensors.push_back({{params[i].const_data_ptr(), out[i].mutable_data_ptr(),
                        plus.empty() ? nullptr : plus[i].mutable_data_ptr(),
                        minus.empty() ? nullptr : minus[i].mutable_data_ptr(), params[i].numel(),
                        static_cast<uint64_t>(offsets[i])},
                       static_cast<uint32_t>(streams[i])});
  }
  pack_launches(shared, tensors, domain, [&](const CombineLaunch& launch, uint32_t chunks) {
    check_launch(op, launch_combine(launch, chunks, dtype, domain, stream));
  });
}

void combine_cuda(TensorList out, TensorList params, ZK_TERMS_PARAMS) {
  if (params.empty()) return;
  check_terms("combine", params, ZK_TERMS);
  check_beside("combine", out, params);
  run("combine", CombineLaunch{}, out, params, {}, {}, seeds, coeffs, streams, offsets, dist, decay, rounding_seed);
}

void fan_out_cuda(TensorList params, TensorList plus, TensorList minus, Tensor seed, Tensor coeff, ZK_TERMS_PARAMS) {
  if (params.empty()) return;
  check_terms("fan_out", params, ZK_TERMS);
  check_beside("fan_out", plus, params);
  check_beside("fan_out", minus, params);
  check_one_direction(seed, coeff);
  CombineLaunch shared{};
  shared.probe_seed = static_cast<const int64_t*>(seed.const_data_ptr());
  shared.probe_coeff = static_cast<const float*>(coeff.const_data_ptr());
  run("fan_out", shared, params, params, plus, minus, seeds, coeffs, streams, offsets, dist, decay, rounding_seed);
}

Tensor derive_seed_cuda(Tensor run_seed, Tensor step, Tensor k) {
  Tensor seeds = torch::stable::empty_like(run_seed);
  if (run_seed.numel() == 0) return seeds;
  torch::stable::accelerator::DeviceGuard guard(run_seed.get_device_index());
  check_launch("derive_seed",
               launch_derive_seed(static_cast<const int64_t*>(run_seed.const_data_ptr()),
                                  static_cast<const int64_t*>(step.const_data_ptr()),
                                  static_cast<const int64_t*>(k.const_data_ptr()),
                                  static_cast<int64_t*>(seeds.mutable_data_ptr()), run_seed.numel(),
                                  current_stream(run_seed)));
  return seeds;
}

}  // namespace

STABLE_TORCH_LIBRARY(zokernels_cuda, m) {
  m.def(ZK_COMBINE_SCHEMA(""));
  m.def(ZK_FAN_OUT_SCHEMA(""));
  m.def(ZK_DERIVE_SEED_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(zokernels_cuda, CUDA, m) {
  m.impl("combine", TORCH_BOX(&combine_cuda));
  m.impl("fan_out", TORCH_BOX(&fan_out_cuda));
  m.impl("derive_seed", TORCH_BOX(&derive_seed_cuda));
}

}  // namespace zk::cuda
