// What the entries of all operations share: they unpack tensors (stable ABI only), launch on the current
// stream of their device and register themselves as torch.ops.zokernels_cuda.*. Arguments were checked in
// Python (zokernels/checks.py); the checks here guard memory against a direct call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../op_args.h"
#include "launch.cuh"
#include "table.h"

// Registers the function <op>_cuda under its schema. Python reads the schema to pass arguments
// (zokernels/backends/library.py).
#define ZK_REGISTER(op, schema)                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(zokernels_cuda, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(zokernels_cuda, CUDA, m) { m.impl(#op, TORCH_BOX(&op##_cuda)); }
// Registers the function <op>_planned_cuda, which takes a plan's table in the place of tensors.
#define ZK_REGISTER_PLANNED(op, schema)                               \
  STABLE_TORCH_LIBRARY_FRAGMENT(zokernels_cuda, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(zokernels_cuda, CUDA, m) {                \
    m.impl(#op "_planned", TORCH_BOX(&op##_planned_cuda));            \
  }
// Registers a function whose arguments are no tensors, so that the dispatcher cannot choose by a tensor's
// device.
#define ZK_REGISTER_CONSTANT(op, schema)                                    \
  STABLE_TORCH_LIBRARY_FRAGMENT(zokernels_cuda, m) { m.def(schema); }       \
  STABLE_TORCH_LIBRARY_IMPL(zokernels_cuda, CompositeExplicitAutograd, m) { \
    m.impl(#op, TORCH_BOX(&op##_cuda));                                     \
  }

// This symbol is in libtorch_cuda, which a CPU build of torch lacks. It is weak, so that the library can be
// loaded there, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace zk::cuda {

using torch::stable::Tensor;

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    default:
      STD_TORCH_CHECK(false, "zokernels_cuda::", op, ": expected float32, bfloat16 or float16 tensors");
  }
}

inline bool is_bf16(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

template <class T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

// Makes the device of a tensor the current one, and gives its current stream. A launch needs both, so that no
// kernel can run on the stream of one device and the memory of another.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "zokernels_cuda: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, "zokernels_cuda::", op, ": launch failed: ", launch_error(error));
}

// Tensor i of a call with its table entry, for pack_launches.
template <class Entry>
Packed<Entry> packed(const Entry& entry, const TermArgs& terms, size_t i, int64_t chunks) {
  return {entry, Stream(static_cast<uint64_t>(terms.streams[i])), chunks};
}

template <class Entry>
Packed<Entry> packed(const Entry& entry, const Row& row, int64_t chunks) {
  return {entry, Stream(static_cast<uint64_t>(row.stream)), chunks};
}

inline std::vector<Row> rows_of(const char* op, const TensorList& out, const TensorList& params,
                                std::initializer_list<const TensorList*> more, const TermArgs& terms) {
  return zk::rows_of(out, params, more, terms, static_cast<int64_t>(dtype_of(op, params[0])));
}

// Whether a table has one coefficient for each direction, no masks and no curvature, as TermArgs::is_plain
// says it of tensors.
inline bool is_plain(const Rows& rows, const TermArgs& terms) {
  return terms.coeffs.dim() == 1 && !terms.mask_seed && rows.first().state[0] < 0 && !rows.are_masked();
}

inline void check_one_piece(const char* op, const TermArgs& terms) {
  STD_TORCH_CHECK(terms.widths.empty(), op, ": widths: expected none");
}

}  // namespace zk::cuda
