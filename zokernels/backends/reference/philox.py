"""Philox4x32-10 (Salmon et al., SC'11) in int64 tensors, each of which holds a word of 32 bits.

PyTorch has no arithmetic of uint32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1, stream_words

MASK32 = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> Words:
    """The four words of each block, int64 in [0, 2^32).

    ``c0`` to ``c3``: the words of the counter, likewise.  ``seed``: the key, int64.  All are broadcast.
    """
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(PHILOX_ROUNDS):
        # An int64 product wraps modulo 2^64, so its lower half is right.  The shift copies the sign, and the
        # mask removes the copies, so the upper half is right, too.
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
    """The words of the blocks whose 64-bit numbers are ``blocks``, int64 [n]: int64 [n, 4]."""
    c2, c3 = (
        torch.full((), word, dtype=torch.int64, device=blocks.device) for word in stream_words(stream, domain)
    )
    return torch.stack(philox(blocks & MASK32, (blocks >> 32) & MASK32, c2, c3, seed), -1)
