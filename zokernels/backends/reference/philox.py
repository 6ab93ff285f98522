"""Philox4x32-10 on int64 tensors that hold 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1, stream_words

MASK32 = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> Words:
    """Four words a block.  ``seed``: int64, 64 key bits.  All broadcast; every word is int64 in [0, 2^32)."""
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(PHILOX_ROUNDS):
        # The product wraps modulo 2^64 in int64, and the mask undoes the arithmetic shift: both halves are
        # right.
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return c0, c1, c2, c3


def philox_blocks(seed: Tensor, stream: int, domain: int, blocks: Tensor) -> Tensor:
    """Words of the 64-bit block indices ``blocks`` [n]: int64 [n, 4]."""
    c2, c3 = (
        torch.full((), word, dtype=torch.int64, device=blocks.device) for word in stream_words(stream, domain)
    )
    return torch.stack(philox(blocks & MASK32, (blocks >> 32) & MASK32, c2, c3, seed), -1)
