"""Which shares of the layers' weights a sparse run should move (ZO-GraSP)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..checks import check_integer, check_number, fail
from ..contract import derive_seed_int, stream_of
from ..functional import noise


@torch.no_grad()
def grasp_shares(
    named: Iterable[tuple[str, Tensor]],
    closure: Callable[[], Tensor | float],
    density: float,
    *,
    queries: int = 192,
    step: float = 5e-3,
    seed: int = 0,
) -> dict[str, float]:
    """The share of each matrix in the ``density`` highest scores |theta (g(theta + step g) - g)| of all.

    g(w) = 1 / q sum_k (L(w + step z_k) - L(w)) z_k, where z_k is noise of length 1 in each matrix.  The
    difference of both g is a product of the Hessian with the gradient, so the score tells how much of the
    gradient's flow hangs on a weight (GraSP).  It takes 2 (q + 1) forwards, and 12 bytes a weight meanwhile.

    Args:
        named: ``model.named_parameters()``; only tensors of two dimensions or more are scored.
        closure: runs the forward on one batch, the same each time, and returns the loss.
        density: 1 - the sparsity, in (0, 1].
        queries: q; step: in units of theta.  Both as in the authors' code.

    Returns: shares in (0, 1] by name, for ``ZOCGE(..., per_step=shares)``.  A matrix without a weight among
    the highest gets the share of one.  All weights have their own bits again afterwards.

    Source: DeepZero, Chen et al., 2024, arXiv 2310.02025, and its code.
    """
    check_number("grasp_shares", "density", density, positive=True)
    check_integer("grasp_shares", "queries", queries, 1)
    check_number("grasp_shares", "step", step, positive=True)
    if density > 1:
        fail("grasp_shares", "density", "a number in (0, 1]", density)
    weights = {name: p for name, p in named if p.dim() >= 2 and p.requires_grad and p.numel()}
    if not weights:
        fail("grasp_shares", "named", "at least one trained tensor of two dimensions", "none")
    own = {name: p.detach().clone() for name, p in weights.items()}

    def loss(at: dict[str, Tensor]) -> float:
        for name, p in weights.items():
            p.copy_(at[name])
        torch.clear_autocast_cache()
        return float(closure())

    def gradient(at: dict[str, Tensor], round_: int) -> dict[str, Tensor]:
        base, found = loss(at), {name: torch.zeros_like(t) for name, t in at.items()}
        for k in range(queries):
            s, z = derive_seed_int(seed, round_, k), {}
            for name, t in at.items():
                drawn = noise(t.shape, seed=s, stream=stream_of(name), device=t.device)
                z[name] = drawn / (drawn.norm() + 1e-8)
            difference = loss({name: t + step * z[name] for name, t in at.items()}) - base
            for name, g in found.items():
                g += difference / queries * z[name]
        return found

    try:
        theta = {name: t.float() for name, t in own.items()}
        first = gradient(theta, 0)
        second = gradient({name: t + step * first[name] for name, t in theta.items()}, 1)
        scores = {name: (t * (second[name] - first[name])).abs() for name, t in theta.items()}
    finally:
        for name, p in weights.items():
            p.copy_(own[name])
        torch.clear_autocast_cache()
    every = torch.cat([s.flatten().cpu() for s in scores.values()])
    bound = every.kthvalue(len(every) - max(1, round(density * len(every))) + 1).values.item()
    kept = {name: int((s >= bound).sum()) for name, s in scores.items()}
    return {name: max(1, count) / weights[name].numel() for name, count in kept.items()}
