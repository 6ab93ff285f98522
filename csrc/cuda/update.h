// The rules of update; and combine with masks, curvature, coefficients for each tensor or int8 weights.
#pragma once

#include "../noise/rules.h"
#include "table.h"

namespace zk::cuda {

// What is done with theta: combine, combine with a curvature, or a rule of update.
#define ZK_ACTION_ENUM(rule) rule,
enum class Action { combine, scaled_combine, ZK_RULES(ZK_ACTION_ENUM) };
#undef ZK_ACTION_ENUM

constexpr Action action_of(Rule rule) {
  return static_cast<Action>(static_cast<int>(Action::scaled_combine) + 1 + static_cast<int>(rule));
}

struct UpdateEntry {
  const void* in;
  void* out;
  void* state[2];       // the rule's states; a curvature is state[0], which is then only read
  const uint8_t* mask;  // its byte 0 belongs to block offset / 8; null: there is none
  const float* coeffs;  // [K]
  int64_t numel;
  uint64_t offset;  // logical index of element 0
};

// A tensor of rows with `width` elements each, which begin `length` logical indices apart. Its chunks consist
// of vecs, of which a row has `blocks`.
struct RowsEntry : UpdateEntry {
  int64_t width, length;
  Divisor blocks;
};

// How many vecs a thread has, and a chunk of rows.
constexpr int kRowVecs = 16;
constexpr int64_t kRowChunk = int64_t{kThreads} * kRowVecs;

template <class Entry, int Bytes = kMaxArgument>
struct UpdateLaunchOf {
  const int64_t* seeds;
  const float* hyper;
  const float* decay;            // null: there is none
  const int64_t* rounding_seed;  // null: rounding is to nearest
  const int64_t* mask_seed;      // null: there is no random mask
  uint32_t mask_keep;
  int32_t count;                    // K
  bool state_is_bf16[2];            // else fp32
  float low, high;                  // int8 only
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know (noise/normal.h)
  Table<Entry, Bytes> table;
};
using UpdateLaunch = UpdateLaunchOf<UpdateEntry>;
using RowsLaunch = UpdateLaunchOf<RowsEntry>;
static_assert(sizeof(UpdateLaunch) <= kMaxArgument && sizeof(RowsLaunch) <= kMaxArgument);
static_assert(sizeof(UpdateLaunchOf<UpdateEntry, kLargeArgument>) <= kLargeArgument);

}  // namespace zk::cuda
