// Which elements a mask keeps, for combine and update. The answer is the top bit of a word: 1 keeps the
// element.
#pragma once

#include "philox.h"

namespace zk {

// Of a packed mask: `bit` is the place, within the word, of the element's bit (bit i & 7 of the byte of its
// block).
template <class U>
ZK_HD U kept_by_bit(U word, int bit) {
  return word << (31 - bit);
}

// Of a random mask: `fields` are the words of domain 3 of the element's block, and mask_keep is at most
// 65536.
template <class U>
ZK_HD U kept_by_field(const Words<U>& fields, int e, uint32_t mask_keep) {
  const U field = e & 1 ? fields.w[e >> 1] >> 16 : fields.w[e >> 1] & Splat<U>::of(0xffffu);
  // field - mask_keep, which is negative where the field is below
  return field + Splat<U>::of(0u - mask_keep);
}

}  // namespace zk
