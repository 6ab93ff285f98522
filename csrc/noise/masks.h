// Which elements a mask keeps, and curvature: shared by combine and update.
// A mask is eight words for a block, the top bit of word e saying whether element e is kept.
#pragma once

#include "philox.h"

namespace zk {

// byte: the block's byte of a packed mask, as a word. fields: the block's words of domain 3. mask_keep: at most 65536.
template <class U>
ZK_HD U kept_by_bit(U byte, int e) {
  return byte << (31 - e);
}

template <class U>
ZK_HD U kept_by_field(const Words<U>& fields, int e, uint32_t mask_keep) {
  const U field = e & 1 ? fields.w[e >> 1] >> 16 : fields.w[e >> 1] & Splat<U>::of(0xffffu);
  return field + Splat<U>::of(0u - mask_keep);  // negative where below
}

}  // namespace zk
