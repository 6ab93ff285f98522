// Which elements a mask keeps: shared by combine and update. The answer is the top bit of a word.
#pragma once

#include "philox.h"

namespace zk {

// bit: of the word that holds the element's bit of a packed mask (bit i & 7 of its block's byte).
template <class U>
ZK_HD U kept_by_bit(U word, int bit) {
  return word << (31 - bit);
}

// fields: the block's words of domain 3; mask_keep: at most 65536.
template <class U>
ZK_HD U kept_by_field(const Words<U>& fields, int e, uint32_t mask_keep) {
  const U field = e & 1 ? fields.w[e >> 1] >> 16 : fields.w[e >> 1] & Splat<U>::of(0xffffu);
  return field + Splat<U>::of(0u - mask_keep);  // negative where below
}

}  // namespace zk
