"""Stochastic rounding of what lies beyond the largest finite value of bf16 and fp16 (docs/contract.md)."""

from __future__ import annotations

import math

import torch

import zokernels


def check() -> None:
    """On the backend that is chosen: infinity with the dropped fraction as its probability, and always from
    the next power of two on; the other values stay at the largest finite one; bits as the reference's.
    """
    n = 4096
    for dtype, power in ((torch.bfloat16, 128), (torch.float16, 16)):
        largest = torch.finfo(dtype).max
        gap = 2.0**power - largest
        for fraction in (0.0, 0.25, 0.75, 1.0 if dtype is torch.float16 else 0.999, 1.5):
            decay = torch.tensor(1 + fraction * gap / largest).item()  # fp32
            sum_ = (torch.tensor(largest) * decay).item()  # fp32, infinite from 2^128 on
            share = min(1.0, (sum_ - largest) / gap)
            for sign in (1, -1):
                theta = torch.full((n,), sign * largest, dtype=dtype)
                options = {"decay": decay, "rounding": "stochastic", "rounding_seed": 7, "streams": 1}
                with zokernels.backend("reference"):
                    zokernels.combine_(want := theta.clone(), [], [], **options)
                zokernels.combine_(theta, [], [], **options)
                assert torch.equal(theta, want), (dtype, fraction, sign)
                assert set(theta.tolist()) <= {sign * largest, sign * math.inf}
                overflows = theta.isinf().sum().item()
                if share in (0.0, 1.0):
                    assert overflows == share * n
                else:  # Hoeffding at 1e-12, and the 13 bits that fp16 takes of a field
                    assert abs(overflows - share * n) < math.sqrt(n * math.log(2e12) / 2) + n * 2.0**-13
