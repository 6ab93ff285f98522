// What the torch-facing file hands to the kernels: plain data, so that each instruction set is compiled on its own, from
// files that include no torch header and no inline code of the standard library.
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

// What becomes of acc. one: theta = round(acc). fan_out: then, from the rounded theta and the direction behind the K,
// plus = round(theta + c z) and minus = round(theta - c z), to nearest. spread: nothing is summed; out has K tensors,
// round(theta + c_k z_k), to nearest.
enum class Form { one, fan_out, spread };

struct Combine : Terms {
  Form form;
  float low, high;  // of dtype i8
  // Span::in is a wire buffer of dtype `wire`: of i8 and e4m3 with scales behind. Form one, or fan_out, whose theta is then
  // not stored.
  bool from_wire;
  DType wire;
};

// One tensor; blocks of 32 logical indices, of which block 0 has element 0.
struct Encode {
  const void* in;
  uint8_t* out;
  int64_t numel;
  uint64_t offset;
  DType dtype, wire;
};

struct Update : Terms {
  Rule rule;
  const float* hyper;
  DType state[2];
};

// scratch: kScratchPerDirection bytes a direction, aligned to 64, for the Rademacher blocks of a tile.
constexpr int64_t kScratchPerDirection = 512;

// Columns of right whose ranks lie together.
constexpr int64_t kPanel = 64;
constexpr int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Products of a direction that are computed at a time (32 KiB), and their place, with a panel's rest behind. low_rank takes
// a scratch of kProducts floats a direction.
constexpr int64_t kBlock = 8192, kProducts = kBlock + kPanel;

struct Kernels {
  void (*combine)(const Combine&, const Span&, void* scratch);
  void (*update)(const Update&, const Span&, void* scratch);
  void (*low_rank)(const Combine&, const Span&, void* scratch);
  // Adds the sum of each direction's squares in units of 2^-20 to sums [K]; normal noise.
  void (*squares)(const Terms&, const Span&, uint64_t* sums);
  // out[stride k]: the sum of x z_k over a span inside one logical tile of 4096.
  void (*project)(const Terms&, const Span&, void* scratch, double* out, int64_t stride);
  void (*encode)(const Encode&, int64_t begin, int64_t end);
};

// One namespace for each instruction set that is built (CMakeLists.txt).
#define ZK_DECLARE_KERNELS(isa)                                                        \
  namespace isa {                                                                      \
  void combine(const Combine&, const Span&, void* scratch);                            \
  void update(const Update&, const Span&, void* scratch);                              \
  void low_rank(const Combine&, const Span&, void* scratch);                           \
  void squares(const Terms&, const Span&, uint64_t* sums);                             \
  void project(const Terms&, const Span&, void* scratch, double* out, int64_t stride); \
  void encode(const Encode&, int64_t begin, int64_t end);                              \
  constexpr Kernels kernels = {combine, update, low_rank, squares, project, encode};   \
  }
ZK_DECLARE_KERNELS(portable)
ZK_DECLARE_KERNELS(avx2)
ZK_DECLARE_KERNELS(avx512)
#undef ZK_DECLARE_KERNELS

}  // namespace zk::cpu
