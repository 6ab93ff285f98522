// Domain 2: signs. A tile of 4096 elements is 512 vecs of eight; its 32 blocks of 16 bytes hold a byte for each vec:
// byte (vec >> 5) of block (vec & 31), bit e & 7 for element e. A run of vecs thus reads one byte of a run of blocks,
// which is what SIMD lanes and warps want.
#pragma once

#include "philox.h"

namespace zk {

constexpr int kRademacherTile = 4096;
constexpr int kRademacherBlocks = 32;

// +-c for the eight elements of a vec: the sign bit of c flips where the element's bit is set.
// word: the block's word that holds the byte, shifted so that the byte is its lowest.
template <class F, class U>
ZK_HD F signed_coefficient(U word, int bit, F c) {
  return from_bits(and_xor(word << (31 - bit), Splat<U>::of(0x80000000u), bits(c)));
}

}  // namespace zk
