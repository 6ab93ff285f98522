// Wire formats: encode, and decode with an update, or with a fan-out whose theta is not stored.
#pragma once

#include "../noise/wire.h"
#include "table.h"

namespace zk::cuda {

struct EncodeEntry {
  const void* in;
  uint8_t* out;
  int64_t numel;
  uint64_t offset;  // logical index of element 0
};

struct EncodeLaunch {
  Table<EncodeEntry> table;
};
static_assert(sizeof(EncodeLaunch) <= kMaxArgument);

struct DecodeEntry {
  const uint8_t* in;
  const uint8_t* scales;
  void* out;    // theta, or plus
  void* minus;  // fan-out only
  int64_t numel;
  uint64_t offset;
};

struct DecodeLaunch {
  const int64_t* seeds;
  const float* coeffs;
  const float* decay;            // null: none
  const int64_t* rounding_seed;  // null: nearest
  const int64_t* probe_seed;     // null: decode; else fan-out
  const float* probe_coeff;
  int32_t count;                    // K
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know: see noise/normal.h
  Table<DecodeEntry> table;
};
static_assert(sizeof(DecodeLaunch) <= kMaxArgument);

// A thread encodes a block of 32.
constexpr int64_t encode_chunks(uint64_t offset, int64_t numel) {
  return (wire_blocks(numel, offset) + kThreads - 1) / kThreads;
}

int launch_encode(const EncodeLaunch& p, uint32_t chunks, DType dtype, DType wire, void* stream);
int launch_decode(const DecodeLaunch& p, uint32_t chunks, DType dtype, DType wire, Domain dist, void* stream);

}  // namespace zk::cuda
