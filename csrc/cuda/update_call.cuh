// Calls of the update kernel, which serves update, combine where it is not plain, and requantize.
#pragma once

#include "op.cuh"
#include "update.h"

namespace zk::cuda {

int launch_rows(const RowsLaunch& p, uint32_t chunks, DType dtype, Domain dist, Action action, void* stream);

inline int64_t chunks_of_entry(UpdateEntry& entry, const Row&, Domain dist) {
  return chunks_of(entry.offset, entry.numel, dist);
}

inline int64_t chunks_of_entry(RowsEntry& entry, const Row& row, Domain) {
  entry.width = row.width;
  entry.length = row.length;
  const int64_t blocks = row_blocks(row.offset, row.width, row.length);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31) - kRowChunk, "rows: expected rows of fewer than 2^34 elements");
  entry.blocks = Divisor(static_cast<uint32_t>(blocks));
  return (entry.numel / entry.width * blocks + kRowChunk - 1) / kRowChunk;
}

// Runs update, or a combine that is not plain, on the tensors that are rows or on those that are not. A
// curvature takes the place of state 0. run(launch, chunks, stream) launches a kernel. `on` is a tensor of
// their device.
template <class Launch, class Run>
void run_entries(const char* op, Launch shared, const Rows& rows, const TermArgs& terms, const Tensor& on,
                 const Run& run) {
  const OnDevice device(on);
  shared.seeds = pointer<int64_t>(terms.seeds);
  shared.decay = pointer<float>(terms.decay);
  shared.rounding_seed = pointer<int64_t>(terms.rounding_seed);
  shared.mask_seed = pointer<int64_t>(terms.mask_seed);
  shared.mask_keep = static_cast<uint32_t>(terms.mask_keep);
  shared.count = static_cast<int32_t>(terms.seeds.numel());
  for (int s = 0; s < 2; ++s)
    shared.state_is_bf16[s] = rows.first().state[s] == static_cast<int64_t>(DType::bf16);

  using Entry = typename decltype(shared.table)::Entry;
  std::vector<Packed<Entry>> tensors;
  tensors.reserve(rows.count);
  const auto* coeffs = pointer<float>(terms.coeffs);
  for (const Row& row : rows) {
    if ((row.width > 0) != std::is_same_v<Entry, RowsEntry>) continue;
    Entry entry{};
    entry.in = row.in;
    entry.out = row.out;
    for (int s = 0; s < 2; ++s) entry.state[s] = row.more[s];
    if (row.curvature != nullptr) entry.state[0] = const_cast<void*>(row.curvature);  // it is only read
    entry.mask = static_cast<const uint8_t*>(row.mask);
    entry.coeffs = coeffs + (&row - rows.begin()) * terms.coeff_stride();
    entry.numel = row.numel;
    entry.offset = static_cast<uint64_t>(row.offset);
    const int64_t chunks = chunks_of_entry(entry, row, terms.domain());
    tensors.push_back(packed(entry, row, chunks));
  }
  pack_launches(shared, tensors, [&](const Launch& launch, uint32_t chunks) {
    check_launch(op, run(launch, chunks, device.stream));
  });
}

// Runs the kernel on the tensors that are rows, and with `all` on the others, too (update.cu).
void run_update(const char* op, const float* hyper, const Rows& rows, Action action, const TermArgs& terms,
                const Tensor& on, bool all = true);

}  // namespace zk::cuda
