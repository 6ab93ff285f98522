// What the torch-facing file hands to the kernels: plain data, so that each instruction set is a translation unit of its
// own that includes no torch header and no inline code of the standard library.
#pragma once

#include <cstdint>

#include "../noise/philox.h"

namespace zk::cpu {

enum class DType { f32, bf16, f16 };

// One direction: the round keys of its seed and its coefficient.
struct Direction {
  PhiloxKey key;
  float coeff;
};

// theta = round(decay * theta + sum over `count` directions); with fan_out also, from the rounded theta and the direction
// behind those, plus = round(theta + c z) and minus = round(theta - c z), to nearest.
struct Combine {
  const Direction* directions;
  int64_t count;
  bool fan_out;
  Domain dist;
  bool has_decay;
  float decay;
  bool stochastic;
  PhiloxKey rounding;
  DType dtype;
};

// Elements [begin, end) of one tensor. offset: logical index of the tensor's element 0.
struct Span {
  const void* in;
  void* out;    // null where theta is not written: fan_out with nothing pending
  void* plus;   // fan_out only
  void* minus;  // fan_out only
  uint64_t offset;
  uint32_t stream;
  int64_t begin, end;
};

// scratch: kScratchPerDirection bytes a direction, aligned to 64, for the Rademacher blocks of a tile.
constexpr int64_t kScratchPerDirection = 512;
using CombineSpan = void (*)(const Combine&, const Span&, void* scratch);

void combine_span_portable(const Combine&, const Span&, void* scratch);
void combine_span_avx2(const Combine&, const Span&, void* scratch);
void combine_span_avx512(const Combine&, const Span&, void* scratch);

}  // namespace zk::cpu
