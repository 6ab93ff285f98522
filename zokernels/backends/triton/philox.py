"""Philox4x32-10 (Salmon et al., SC'11) in Triton: the seed is the key, and block, stream and domain count."""

from __future__ import annotations

import triton
import triton.language as tl

from ...contract import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1
from .arithmetic import mul_wide

_M0, _M1 = tl.constexpr(PHILOX_M0), tl.constexpr(PHILOX_M1)
_W0, _W1 = tl.constexpr(PHILOX_W0), tl.constexpr(PHILOX_W1)
_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def words(x):
    """The (low, high) words, uint32, of an int64."""
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def stream_words(stream, DOMAIN: tl.constexpr):
    """Counter words 2 and 3: the low word of an int64 stream, and its upper 24 bits above the domain."""
    low, high = words(stream)
    return low, (high << 8) | DOMAIN


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """The four uint32 words of each block.

    The counter is uint32 and the seed int64; each may be a scalar or a tensor.  Scalars stay scalars until
    they meet a tensor.  Where only the low word of the block's number is a tensor, the keys of all rounds and
    three products of the first two rounds are so computed once in a thread, and not for each block.
    """
    k0, k1 = words(seed)
    for _ in tl.static_range(_ROUNDS):
        lo0, hi0 = mul_wide(c0, _M0)
        lo1, hi1 = mul_wide(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ (c1 ^ k0), lo1, hi0 ^ (c3 ^ k1), lo0
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3
