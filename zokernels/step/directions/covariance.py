"""Noise whose covariance follows the curvature along one vector of each matrix (LOREN)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import fail
from ...functional import combine_, low_rank_, project
from ..noise import DENSE, Members
from ..roles import OptimizerView
from ..shard import any_sharded
from ..types import Bucket, Seeds
from .direction import Direction
from .summed import Summed, weighted


def as_matrix(param: Tensor) -> tuple[int, int]:
    """(m, n): the first dimension and the rest; a vector is one row."""
    return (param.shape[0], param.numel() // param.shape[0]) if param.dim() >= 2 else (1, param.numel())


@dataclass(frozen=True)
class Spread:
    """What a step knows of one parameter's covariance, for its q directions.

    a [n] is fp32.  The other numbers are float64: s = m |a|^2, root = sqrt(damping + s), alpha_k, and
    dots_k = <a', u_k>, where a' is a in each of the m rows.
    """

    a: Tensor
    s: Tensor
    root: Tensor
    dots: Tensor  #: [q]
    alphas: Tensor  #: [q]


class CovarianceNoise(Summed):
    """z_k = u_k - alpha_k a': dense noise with less of what lies along a' (:class:`RankOneCovariance`)."""

    def __init__(self, seeds: Tensor, spreads: dict[int, Spread]) -> None:
        self._seeds, self.spreads = seeds, spreads

    def totals(self, members: Members, seeds: Tensor, coeffs: Tensor) -> list[Tensor]:
        if len(seeds) > len(self._seeds):
            expected = "one that uses the step's own directions"
            fail("RankOneCovariance", "rule", expected, f"{len(seeds)} seeds")
        device = seeds.device
        out = [torch.full(p.shape, -0.0, dtype=torch.float32, device=device) for p in members.params]
        combine_(out, **DENSE.kernel_args(members, seeds, coeffs), **members.places)
        mine = seeds[:, None] == self._seeds
        shapes, along, columns = [as_matrix(p) for p in members.params], [], []
        for p in members.params:
            spread = self.spreads[id(p)]
            alphas = torch.where(mine, spread.alphas, torch.zeros_like(spread.alphas)).sum(1)
            along.append(-weighted(torch.ones_like(spread.s), coeffs.double() * alphas).float().reshape(1, 1))
            columns.append(spread.a.reshape(1, -1, 1))
        rows = [torch.ones(1, m, 1, device=device) for m, _ in shapes]
        matrices = [t.view(shape) for t, shape in zip(out, shapes, strict=True)]
        low_rank_(matrices, rows, columns, torch.cat(along), streams=members.streams)
        return out


class RankOneCovariance(Direction):
    """z = u - alpha a', of covariance (I + a' a'^T / damping)^-1: less noise along a', whose loss bends.

    a [n] belongs to an [m, n] matrix, and a' is a in each of its m rows; a vector is one row.  u is dense
    noise, and with s = |a'|^2

        alpha = (sqrt(damping) + sqrt(damping + s)) <a', u> / (s sqrt(damping + s))

    which turns the sign of what is left along a'.  The rule :class:`CovarianceDescent` keeps a.  <a', u> is
    summed in the order of :func:`zokernels.project`; the last bits of s may depend on the device.
    """

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        if any_sharded(p for b in buckets for p in b.params):
            fail("RankOneCovariance", "params", "plain tensors: rows are whole", "a DTensor", TypeError)
        for b in buckets:
            damping = float(b.group["damping"])
            spreads = {}
            for i, (p, a) in enumerate(zip(b.params, optimizer.rule.axes(optimizer, b), strict=True)):
                m, _ = as_matrix(p)
                s = m * a.double().square().sum()
                root = (damping + s).sqrt()
                tiled = a.expand(as_matrix(p)).contiguous()
                dots = project([tiled], seeds[b.device], dist=b.dist, **b.members.picked([i]).places)
                alphas = (math.sqrt(damping) + root) * dots / (s * root)
                alphas = torch.where(s > 0, alphas, torch.zeros_like(alphas))
                spreads[id(p)] = Spread(a, s, root, dots, alphas)
            b.noise = CovarianceNoise(seeds[b.device], spreads)
