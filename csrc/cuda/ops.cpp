// torch.ops.zokernels_cuda.*: unpacks tensors (stable ABI only) and launches on the current stream of their device.
// Arguments were checked in zokernels/checks.py; the checks here guard memory against a direct call.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../op_args.h"
#include "combine.h"
#include "low_rank.h"
#include "project.h"
#include "spread.h"
#include "squares.h"
#include "update.h"
#include "wire.h"

// In libtorch_cuda, which a CPU build of torch lacks: weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace zk::cuda {
namespace {

using torch::stable::Tensor;

DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "zokernels_cuda::", op, ": expected float32, bfloat16 or float16 tensors");
  }
}

bool is_bf16(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

template <class T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

// Makes the device of a tensor the current one, and has its current stream: what a launch needs, so that none can have
// the stream without the device.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "zokernels_cuda: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, "zokernels_cuda::", op, ": launch failed: ", error_string(error));
}

// Tensor i of a call with its table entry, for pack_launches.
template <class Entry>
Packed<Entry> packed(const Entry& entry, const TermArgs& terms, size_t i, int64_t chunks) {
  return {entry, Stream(static_cast<uint64_t>(terms.streams[i])), chunks};
}

// Plain combine where plus and minus are empty, else fan_out.
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

int64_t chunks_of_entry(UpdateEntry& entry, const TermArgs& terms, size_t) {
  return chunks_of(entry.offset, entry.numel, terms.domain());
}

int64_t chunks_of_entry(RowsEntry& entry, const TermArgs& terms, size_t i) {
  entry.width = terms.width(i);
  entry.length = terms.length(i);
  const int64_t blocks = terms.row_blocks(i);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31) - kRowChunk, "rows: expected rows of fewer than 2^34 elements");
  entry.blocks = Divisor(static_cast<uint32_t>(blocks));
  return (entry.numel / entry.width * blocks + kRowChunk - 1) / kRowChunk;
}

int launch_entries(const UpdateLaunch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream) {
  return launch_update(p, chunks, dtype, dist, action, stream);
}

int launch_entries(const RowsLaunch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream) {
  return launch_rows(p, chunks, dtype, dist, action, stream);
}

// update, and combine that is not plain, of the tensors that are rows or of those that are not. `states`: the rule's state
// lists, or the curvature.
template <class Launch>
void run_entries(const char* op, Launch shared, const TensorList& out, const TensorList& params,
                 const std::vector<const TensorList*>& states, DType dtype, Action action, const TermArgs& terms) {
  const OnDevice on(params[0]);
  shared.seeds = pointer<int64_t>(terms.seeds);
  shared.decay = pointer<float>(terms.decay);
  shared.rounding_seed = pointer<int64_t>(terms.rounding_seed);
  shared.mask_seed = pointer<int64_t>(terms.mask_seed);
  shared.mask_keep = static_cast<uint32_t>(terms.mask_keep);
  shared.count = static_cast<int32_t>(terms.seeds.numel());
  for (size_t s = 0; s < states.size(); ++s) shared.state_is_bf16[s] = is_bf16((*states[s])[0]);

  using Entry = typename decltype(shared.table)::Entry;
  std::vector<Packed<Entry>> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (terms.in_rows(i) != std::is_same_v<Entry, RowsEntry>) continue;
    Entry entry{};
    entry.in = params[i].const_data_ptr();
    entry.out = out[i].mutable_data_ptr();
    for (size_t s = 0; s < states.size(); ++s) entry.state[s] = (*states[s])[i].mutable_data_ptr();
    if (!terms.masks.empty()) entry.mask = pointer<uint8_t>(terms.masks[i]);
    entry.coeffs = pointer<float>(terms.coeffs) + i * terms.coeff_stride();
    entry.numel = params[i].numel();
    entry.offset = static_cast<uint64_t>(terms.offsets[i]);
    const int64_t chunks = chunks_of_entry(entry, terms, i);
    tensors.push_back(packed(entry, terms, i, chunks));
  }
  pack_launches(shared, tensors, [&](const Launch& launch, uint32_t chunks) {
    check_launch(op, launch_entries(launch, chunks, dtype, terms.domain(), action, on.stream));
  });
}

// Those that are rows, and with `all` the others too.
void run_update(const char* op, const float* hyper, const TensorList& out, const TensorList& params,
                const std::vector<const TensorList*>& states, Action action, const TermArgs& terms, bool all = true) {
  const DType dtype = dtype_of(op, params[0]);
  RowsLaunch rows{};
  UpdateLaunch pieces{};
  rows.hyper = pieces.hyper = hyper;
  if (!terms.widths.empty()) run_entries(op, rows, out, params, states, dtype, action, terms);
  if (all) run_entries(op, pieces, out, params, states, dtype, action, terms);
}

void check_one_piece(const char* op, const TermArgs& terms) {
  STD_TORCH_CHECK(terms.widths.empty(), op, ": widths: expected none");
}

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

void fan_out_cuda(TensorList params, TensorList plus, TensorList minus, Tensor seed, Tensor coeff, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_one_piece("fan_out", terms);
  check_terms("fan_out", params, terms);
  check_beside("fan_out", plus, params);
  check_beside("fan_out", minus, params);
  check_one_direction(seed, coeff, params[0]);
  CombineLaunch shared{};
  shared.probe_seed = pointer<int64_t>(seed);
  shared.probe_coeff = pointer<float>(coeff);
  run_plain("fan_out", shared, params, params, plus, minus, terms);
}

void spread_cuda(Tensor out, Tensor x, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  check_one_piece("spread", terms);
  check_terms("spread", {x}, terms);
  check_spread(out, x, terms);
  const int64_t chunks = chunks_of(static_cast<uint64_t>(offsets[0]), x.numel(), terms.domain());
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(chunks <= kMaxChunks, "spread: x: expected fewer elements, got ", x.numel());
  const OnDevice on(x);
  SpreadLaunch p{};
  p.seeds = pointer<int64_t>(seeds);
  p.coeffs = pointer<float>(coeffs);
  p.in = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.numel = x.numel();
  p.offset = static_cast<uint64_t>(offsets[0]);
  p.stream = Stream(static_cast<uint64_t>(streams[0]));
  p.count = static_cast<int32_t>(seeds.numel());
  check_launch("spread",
               launch_spread(p, static_cast<uint32_t>(chunks), dtype_of("spread", x), terms.domain(), on.stream));
}

void update_cuda(TensorList params, TensorList first, TensorList second, std::string rule, Tensor hyper,
                 ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_terms("update", params, terms);
  check_update(first, second, rule_of(rule), hyper, params, terms);
  std::vector<const TensorList*> states;
  if (!first.empty()) states.push_back(&first);
  if (!second.empty()) states.push_back(&second);
  const Action action = action_of(rule_of(rule));
  run_update("update", pointer<float>(hyper), params, params, states, action, terms);
}

void requantize_cuda(TensorList out, TensorList params, int64_t low, int64_t high, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_one_piece("requantize", terms);
  check_terms("requantize", params, terms);
  check_beside("requantize", out, params);
  STD_TORCH_CHECK(params[0].scalar_type() == torch::headeronly::ScalarType::Char, "requantize: expected int8 tensors");
  UpdateLaunch shared{};
  shared.low = static_cast<float>(low);
  shared.high = static_cast<float>(high);
  run_entries("requantize", shared, out, params, {}, DType::i8, Action::combine, terms);
}

void low_rank_cuda(TensorList out, TensorList params, TensorList left, TensorList right, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (params.empty()) return;
  check_one_piece("low_rank", terms);
  check_terms("low_rank", params, terms);
  check_beside("low_rank", out, params);
  check_factors(left, right, params, terms);
  const OnDevice on(params[0]);
  const DType dtype = dtype_of("low_rank", params[0]);
  LowRankLaunch shared{};
  shared.decay = pointer<float>(decay);
  shared.rounding_seed = pointer<int64_t>(rounding_seed);
  shared.count = static_cast<int32_t>(seeds.numel());

  std::vector<Packed<LowRankEntry>> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    LowRankEntry entry{};
    entry.in = params[i].const_data_ptr();
    entry.out = out[i].mutable_data_ptr();
    entry.left = pointer<float>(left[i]);
    entry.right = pointer<float>(right[i]);
    entry.coeffs = pointer<float>(coeffs) + i * terms.coeff_stride();
    entry.rows = left[i].size(1);
    entry.columns = right[i].size(1);
    entry.offset = static_cast<uint64_t>(offsets[i]);
    entry.rank = static_cast<int32_t>(left[i].size(2));
    entry.has_vectors = rows_are_vectors(entry);
    tensors.push_back(packed(entry, terms, i, low_rank_chunks(entry)));
  }
  pack_launches(shared, tensors, [&](const LowRankLaunch& launch, uint32_t chunks) {
    check_launch("low_rank", launch_low_rank(launch, chunks, dtype, on.stream));
  });
}

// decode where minus is empty (out is theta), else fan-out (out is plus).
void run_decode(const char* op, DecodeLaunch shared, const TensorList& out, const TensorList& minus,
                const TensorList& wires, int64_t wire, const TermArgs& terms) {
  check_one_piece(op, terms);
  check_terms(op, out, terms);
  check_wires(op, wires, wire, out, terms.offsets);
  const OnDevice on(out[0]);
  const DType dtype = dtype_of(op, out[0]);
  shared.seeds = pointer<int64_t>(terms.seeds);
  shared.coeffs = pointer<float>(terms.coeffs);
  shared.decay = pointer<float>(terms.decay);
  shared.rounding_seed = pointer<int64_t>(terms.rounding_seed);
  shared.count = static_cast<int32_t>(terms.seeds.numel());

  std::vector<Packed<DecodeEntry>> tensors;
  tensors.reserve(out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    DecodeEntry entry{};
    entry.in = pointer<uint8_t>(wires[i]);
    entry.numel = out[i].numel();
    entry.scales = entry.in + wire_scale_begin(entry.numel);
    entry.out = out[i].mutable_data_ptr();
    if (!minus.empty()) entry.minus = minus[i].mutable_data_ptr();
    entry.offset = static_cast<uint64_t>(terms.offsets[i]);
    tensors.push_back(packed(entry, terms, i, chunks_of(entry.offset, entry.numel, terms.domain())));
  }
  pack_launches(shared, tensors, [&](const DecodeLaunch& launch, uint32_t chunks) {
    check_launch(op, launch_decode(launch, chunks, dtype, wire_of<DType>(wire), terms.domain(), on.stream));
  });
}

void decode_cuda(TensorList out, TensorList wires, int64_t wire, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (!out.empty()) run_decode("decode", DecodeLaunch{}, out, {}, wires, wire, terms);
}

void decode_fan_out_cuda(TensorList plus, TensorList minus, TensorList wires, int64_t wire, Tensor seed, Tensor coeff,
                         ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  if (plus.empty()) return;
  check_beside("decode_fan_out", minus, plus);
  check_one_direction(seed, coeff, plus[0]);
  DecodeLaunch shared{};
  shared.probe_seed = pointer<int64_t>(seed);
  shared.probe_coeff = pointer<float>(coeff);
  run_decode("decode_fan_out", shared, plus, minus, wires, wire, terms);
}

void encode_cuda(TensorList out, TensorList params, int64_t wire, std::vector<int64_t> offsets) {
  if (params.empty()) return;
  check_beside("encode", params, params);
  check_wires("encode", out, wire, params, offsets);
  const OnDevice on(params[0]);
  const DType dtype = dtype_of("encode", params[0]);
  std::vector<Packed<EncodeEntry>> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    const EncodeEntry entry{params[i].const_data_ptr(), static_cast<uint8_t*>(out[i].mutable_data_ptr()),
                            params[i].numel(), static_cast<uint64_t>(offsets[i])};
    tensors.push_back({entry, Stream(0), encode_chunks(entry.offset, entry.numel)});
  }
  pack_launches(EncodeLaunch{}, tensors, [&](const EncodeLaunch& launch, uint32_t chunks) {
    check_launch("encode", launch_encode(launch, chunks, dtype, wire_of<DType>(wire), on.stream));
  });
}

// partial: int64 zeros [K, n]; its sums over n are the result. Normal noise only: of signs every square is 1.
void squares_cuda(Tensor partial, Tensor seeds, std::vector<int64_t> sizes, std::vector<int64_t> streams,
                  std::vector<int64_t> offsets) {
  STD_TORCH_CHECK(sizes.size() == streams.size() && sizes.size() == offsets.size(),
                  "squares: sizes, streams, offsets: expected equal lengths");
  STD_TORCH_CHECK(partial.is_contiguous() && partial.dim() == 2 && partial.size(0) == seeds.numel() &&
                      partial.size(1) > 0,
                  "squares: partial: expected a contiguous tensor with a row for each seed");
  check_device("squares", partial, seeds);
  const OnDevice on(seeds);
  SquaresLaunch shared{};
  shared.seeds = pointer<int64_t>(seeds);
  shared.partial = static_cast<unsigned long long*>(partial.mutable_data_ptr());
  shared.columns = static_cast<uint32_t>(partial.size(1));
  shared.count = static_cast<int32_t>(seeds.numel());
  std::vector<Packed<SquaresEntry>> tensors;
  tensors.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    const SquaresEntry entry{sizes[i], static_cast<uint64_t>(offsets[i])};
    tensors.push_back({entry, Stream(static_cast<uint64_t>(streams[i])),
                       chunks_of(entry.offset, entry.numel, kNormal)});
  }
  pack_launches(shared, tensors, [&](const SquaresLaunch& launch, uint32_t chunks) {
    check_launch("squares", launch_squares(launch, chunks, on.stream));
  });
}

void project_cuda(Tensor partial, TensorList tensors, Tensor seeds, std::vector<int64_t> streams,
                  std::vector<int64_t> offsets, int64_t dist) {
  check_project(partial, kSumThreads, tensors, seeds, streams, offsets, dist);
  if (partial.numel() == 0) return;
  const OnDevice on(seeds);
  const DType dtype = dtype_of("project", tensors[0]);
  ProjectLaunch shared{};
  shared.seeds = pointer<int64_t>(seeds);
  shared.partial = static_cast<double*>(partial.mutable_data_ptr());
  shared.columns = partial.size(1);
  shared.count = static_cast<int32_t>(seeds.numel());
  shared.groups = static_cast<uint32_t>((seeds.numel() + kProjectGroup - 1) / kProjectGroup);
  std::vector<Packed<ProjectEntry>> entries;
  int64_t column = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ProjectEntry entry{tensors[i].const_data_ptr(), tensors[i].numel(), static_cast<uint64_t>(offsets[i]),
                             column};
    column += sum_tiles(entry.offset, entry.numel) * kSumThreads;
    entries.push_back({entry, Stream(static_cast<uint64_t>(streams[i])), project_chunks(entry.offset, entry.numel)});
  }
  pack_launches(shared, entries, [&](const ProjectLaunch& launch, uint32_t chunks) {
    STD_TORCH_CHECK(int64_t{chunks} * launch.groups <= kMaxChunks,
                    "project: tensors, seeds: expected fewer elements at a time");
    check_launch("project",
                 launch_project(launch, chunks * launch.groups, dtype, static_cast<Domain>(dist), on.stream));
  });
}

Tensor derive_seed_cuda(Tensor run_seed, Tensor step, Tensor k) {
  for (const auto* t : {&step, &k}) check_device("derive_seed", *t, run_seed);
  Tensor seeds = torch::stable::empty_like(run_seed);
  if (run_seed.numel() == 0) return seeds;
  const OnDevice on(run_seed);
  check_launch("derive_seed",
               launch_derive_seed(pointer<int64_t>(run_seed), pointer<int64_t>(step), pointer<int64_t>(k),
                                  static_cast<int64_t*>(seeds.mutable_data_ptr()), run_seed.numel(), on.stream));
  return seeds;
}

}  // namespace

STABLE_TORCH_LIBRARY(zokernels_cuda, m) {
  m.def(ZK_COMBINE_SCHEMA(""));
  m.def(ZK_FAN_OUT_SCHEMA(""));
  m.def(ZK_SPREAD_SCHEMA(""));
  m.def(ZK_UPDATE_SCHEMA(""));
  m.def(ZK_LOW_RANK_SCHEMA(""));
  m.def(ZK_REQUANTIZE_SCHEMA(""));
  m.def("squares(Tensor(a!) partial, Tensor seeds, int[] sizes, int[] streams, int[] offsets) -> ()");
  m.def(ZK_PROJECT_SCHEMA(""));
  m.def(ZK_ENCODE_SCHEMA(""));
  m.def(ZK_DECODE_SCHEMA(""));
  m.def(ZK_DECODE_FAN_OUT_SCHEMA(""));
  m.def(ZK_DERIVE_SEED_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(zokernels_cuda, CUDA, m) {
  m.impl("combine", TORCH_BOX(&combine_cuda));
  m.impl("fan_out", TORCH_BOX(&fan_out_cuda));
  m.impl("spread", TORCH_BOX(&spread_cuda));
  m.impl("update", TORCH_BOX(&update_cuda));
  m.impl("low_rank", TORCH_BOX(&low_rank_cuda));
  m.impl("requantize", TORCH_BOX(&requantize_cuda));
  m.impl("squares", TORCH_BOX(&squares_cuda));
  m.impl("project", TORCH_BOX(&project_cuda));
  m.impl("encode", TORCH_BOX(&encode_cuda));
  m.impl("decode", TORCH_BOX(&decode_cuda));
  m.impl("decode_fan_out", TORCH_BOX(&decode_fan_out_cuda));
  m.impl("derive_seed", TORCH_BOX(&derive_seed_cuda));
}

}  // namespace zk::cuda
