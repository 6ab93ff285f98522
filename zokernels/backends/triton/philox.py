"""Philox4x32-10 (Salmon et al., SC'11) in Triton: counter (block, stream and domain), key = seed."""

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
    """(low, high) uint32 words of an int64."""
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def stream_words(stream, DOMAIN: tl.constexpr):
    """Counter words 2 and 3 of an int64 stream: its low word; and its upper 24 bits above the domain."""
    low, high = words(stream)
    return low, (high << 8) | DOMAIN


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Four uint32 words a block.  The counter is uint32, the seed int64; each may be a scalar or a tensor.

    What is scalar stays scalar until it meets a tensor.  With scalar seed, block_hi, stream and domain the
    key schedule and three products of the first two rounds are computed once per thread, not once per block.
    """
    k0, k1 = words(seed)
    for _ in tl.static_range(_ROUNDS):
        lo0, hi0 = mul_wide(c0, _M0)
        lo1, hi1 = mul_wide(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ (c1 ^ k0), lo1, hi0 ^ (c3 ^ k1), lo0
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3
