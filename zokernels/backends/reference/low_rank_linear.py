"""low_rank_linear: y_p = round(y_p + c_p ((x_p B_p) A_p^T + b_p)), one rounding, in pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from .combine import fma

#: A sum over the columns of x has so many chains of fmas; chain l takes columns l, l + 64, ...
CHAINS = 64


def _inner(x: Tensor, right: Tensor) -> Tensor:
    """The product of x [N, n] and right [n, r], fp32 [N, r], with its sums in the order of the contract."""
    pieces = -(-x.shape[1] // CHAINS)
    tail = pieces * CHAINS - x.shape[1]
    pad = lambda values: torch.nn.functional.pad(values, (0, tail)).view(len(values), pieces, CHAINS)
    xs, rights = pad(x), pad(right.t())
    chains = torch.zeros(len(xs), len(rights), CHAINS, device=x.device)
    for i in range(pieces):
        chains = fma(xs[:, None, i], rights[None, :, i], chains)
    while chains.shape[-1] > 1:
        chains = chains[..., 0::2] + chains[..., 1::2]
    return chains[..., 0]


@implements
def low_rank_linear(
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    coeffs: Tensor,
    rows: list[int],
    bias: Tensor | None,
    add: bool,
) -> None:
    begin = 0
    for p, count in enumerate(rows):
        block, begin = slice(begin, begin + count), begin + count
        a, b = (factor[p * len(factor) // len(rows)] for factor in (left, right))
        inner = _inner(x[block].float(), b)
        product = torch.zeros(y[block].shape, device=y.device)
        for j in range(a.shape[1]):
            product = fma(inner[:, j, None], a[None, :, j], product)
        if bias is not None:
            product = product + bias[p * len(bias) // len(rows)]
        before = y[block].float() if add else torch.zeros_like(product)
        y[block] = fma(coeffs[p], product, before).to(y.dtype)
