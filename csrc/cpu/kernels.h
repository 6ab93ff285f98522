// What entries hand to kernels: plain data, so that each instruction set is compiled on its own, without any torch header
// and without inline code of the standard library.
//
// A file <op>.cpp is compiled once for each instruction set with ZK_ISA defined, which gives the kernel, and once more
// without flags and without ZK_ISA, which gives the entry that torch calls (CMakeLists.txt).
#pragma once

#include <cstdint>

#include "../noise/philox.h"
#include "../noise/rules.h"

namespace zk::cpu {

enum class DType { f32, bf16, f16, i8, e4m3 };  // e4m3: of wire buffers alone

// What every operation over parameters shares: the terms of acc = decay * theta + sum c_k w_k, and its rounding. Scalars
// are free of NaN payloads (canonical_nan).
struct Terms {
  const PhiloxKey* keys;  // a direction's round keys
  int64_t count;          // K
  Domain dist;
  bool has_decay;
  float decay;
  bool stochastic;
  PhiloxKey rounding;
  bool has_mask_seed;
  PhiloxKey mask;
  uint32_t mask_keep;
  DType curvature;  // of Span::curvature
  DType dtype;      // of the parameters
};

// Elements [begin, end) of one tensor. Unused pointers are null.
struct Span {
  const void* in;
  void* out;            // null where theta is not written: fan_out with nothing pending
  void* more[2];        // fan_out: plus, minus; update: the states
  const float* coeffs;  // K values, and fan_out's own behind them
  const uint8_t* mask;  // a byte for each block from that of element 0
  const void* curvature;
  const float* left;   // low_rank: [K, m, rank]
  const float* right;  // low_rank: [K, panels_of(n), rank, kPanel], with zeros behind the n-th column
  int64_t rows, columns, rank;
  int64_t numel;
  uint64_t offset;  // logical index of element 0
  Stream stream;
  int64_t begin, end;
  // Of a tensor that is rows of `width` elements, `length` logical indices apart: the kernels get one row at a time.
  int64_t width, length, blocks;  // width 0: one piece; blocks: bytes of a row's mask
};

// scratch: kScratchPerDirection bytes a direction, aligned to 64, for the Rademacher blocks of a tile.
constexpr int64_t kScratchPerDirection = 512;

// Declares a kernel, a function, in the namespace of each instruction set. Entries choose among them by ZK_KERNEL_OF
// (isa.h).
#define ZK_KERNEL(name, ...) \
  namespace portable {       \
  void name(__VA_ARGS__);    \
  }                          \
  namespace avx2 {           \
  void name(__VA_ARGS__);    \
  }                          \
  namespace avx512 {         \
  void name(__VA_ARGS__);    \
  }

}  // namespace zk::cpu
