// Domain 2: signs. A tile of 4096 elements consists of 512 vecs of eight elements, and takes 32 blocks of 16
// bytes, one byte for each vec. The byte of a vec is byte (vec >> 5) of block (vec & 31); bit e & 7 of it
// belongs to element e. Consecutive vecs therefore read the same byte of consecutive blocks, so SIMD lanes
// and warps need no shuffles.
#pragma once

#include "philox.h"

namespace zk {

constexpr int kRademacherTile = 4096;
constexpr int kRademacherBlocks = 32;

// +c or -c for element e of a vec: the sign bit of c is flipped where the element's bit is set. `word` is the
// word of the block that holds the vec's byte, shifted so that this byte is its lowest.
template <class F, class U>
ZK_HD F signed_coefficient(U word, int bit, F c) {
  return from_bits(and_xor(word << (31 - bit), Splat<U>::of(0x80000000u), bits(c)));
}

}  // namespace zk
