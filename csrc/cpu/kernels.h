// The structures that entries hand to kernels. They are plain data, so that the kernels include neither torch
// nor inline code of the standard library. Such code, compiled with AVX-512, could be linked into the entries
// and would crash a machine without it.
//
// A file <op>.cpp is compiled several times (CMakeLists.txt). With ZK_ISA defined, once for each instruction
// set, it gives the kernel. Without ZK_ISA and without flags it gives the entry that torch calls.
#pragma once

#include <cstdint>

#include "../noise/philox.h"
#include "../noise/rules.h"

namespace zk::cpu {

enum class DType { f32, bf16, f16, i8, e4m3 };  // only wire buffers have e4m3

// What all operations over parameters share: the terms of acc = decay * theta + sum c_k w_k, and its
// rounding. A scalar that is NaN is the canonical one, without a payload (canonical_nan).
struct Terms {
  const PhiloxKey* keys;  // [K]: the round keys of each direction
  int64_t count;          // K, the number of directions
  Domain dist;
  bool has_decay;
  float decay;
  bool stochastic;
  PhiloxKey rounding;
  bool has_mask_seed;
  PhiloxKey mask;
  uint32_t mask_keep;
  DType curvature;  // the dtype of Span::curvature
  DType dtype;      // the dtype of the parameters
};

// A part of one tensor, elements [begin, end), and what belongs to them. Pointers that an operation does not
// use are null. All arrays are those of the whole tensor.
struct Span {
  const void* in;
  void* out;            // null where theta is not written, in a fan_out without a pending update
  void* more[2];        // of fan_out: plus and minus; of update: the states
  const float* coeffs;  // K values; in a fan_out the coefficient of the sides follows
  // one byte for each block of eight elements, the first for the block that holds element 0
  const uint8_t* mask;
  const void* curvature;
  // Of low_rank, for a matrix of m rows, n columns and factors of this rank. left is [K, m, rank], and right
  // is [K, panels_of(n), rank, kPanel], filled with zeros from column n on.
  const float *left, *right;
  int64_t rows, columns, rank;
  int64_t numel;
  uint64_t offset;  // the logical index of element 0
  Stream stream;
  int64_t begin, end;
  // A shard may be rows of `width` elements that begin `length` logical indices apart, and `blocks` is then
  // the number of mask bytes of a row. A kernel gets one row at a time, as if it were a tensor. Width 0: the
  // tensor is one piece.
  int64_t width, length, blocks;
};

// Bytes of scratch memory for each direction, aligned to 64: the Rademacher blocks of a tile of 4096
// elements.
constexpr int64_t kScratchPerDirection = 512;

// Declares a kernel (a function) in the namespace of each instruction set. ZK_KERNEL_OF (isa.h) chooses one
// of them.
#define ZK_KERNEL(name, ...) \
  namespace portable {       \
  void name(__VA_ARGS__);    \
  }                          \
  namespace avx2 {           \
  void name(__VA_ARGS__);    \
  }                          \
  namespace avx512 {         \
  void name(__VA_ARGS__);    \
  }                          \
  namespace neon {           \
  void name(__VA_ARGS__);    \
  }

}  // namespace zk::cpu
