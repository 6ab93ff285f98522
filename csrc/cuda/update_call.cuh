// Calls of the update kernel, which serves update, combine where it is not plain, and requantize.
#pragma once

#include "op.cuh"
#include "update.h"

namespace zk::cuda {

int launch_rows(const RowsLaunch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream);

inline int64_t chunks_of_entry(UpdateEntry& entry, const TermArgs& terms, size_t) {
  return chunks_of(entry.offset, entry.numel, terms.domain());
}

inline int64_t chunks_of_entry(RowsEntry& entry, const TermArgs& terms, size_t i) {
  entry.width = terms.width(i);
  entry.length = terms.length(i);
  const int64_t blocks = terms.row_blocks(i);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31) - kRowChunk, "rows: expected rows of fewer than 2^34 elements");
  entry.blocks = Divisor(static_cast<uint32_t>(blocks));
  return (entry.numel / entry.width * blocks + kRowChunk - 1) / kRowChunk;
}

// update, and combine that is not plain, of the tensors that are rows or of those that are not. `states`: the rule's state
// lists, or the curvature. run(launch, chunks, stream) launches a kernel.
template <class Launch, class Run>
void run_entries(const char* op, Launch shared, const TensorList& out, const TensorList& params,
                 const std::vector<const TensorList*>& states, const TermArgs& terms, const Run& run) {
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
  pack_launches(shared, tensors,
                [&](const Launch& launch, uint32_t chunks) { check_launch(op, run(launch, chunks, on.stream)); });
}

// The tensors that are rows, and with `all` the others too (update.cu).
void run_update(const char* op, const float* hyper, const TensorList& out, const TensorList& params,
                const std::vector<const TensorList*>& states, Action action, const TermArgs& terms, bool all = true);

}  // namespace zk::cuda
