"""low_rank: theta = round(decay * theta + sum_k c_k L_k R_k^T), one rounding, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ..terms import Terms
from .combine import chunks, fma


@implements
def low_rank(
    out: list[Tensor], params: list[Tensor], left: list[Tensor], right: list[Tensor], terms: Terms
) -> None:
    for chunk in chunks(params, terms):
        theta, lefts, rights = params[chunk.index], left[chunk.index], right[chunk.index]
        index = torch.arange(chunk.at, chunk.at + chunk.n, device=theta.device)
        row, column = index // rights.shape[1], index % rights.shape[1]
        acc = chunk.decayed(theta)
        for k in range(lefts.shape[0]):
            product = torch.zeros_like(acc)
            for r in range(lefts.shape[2]):
                product = fma(lefts[k, row, r], rights[k, column, r], product)
            acc = fma(chunk.coeffs[k].expand(chunk.n), product, acc)
        chunk.of(out[chunk.index]).copy_(chunk.rounded(acc, theta.dtype))
