"""Tensors that take part in a step by chance, each with a probability of its own (CurvZO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...functional import derive_seed
from ...transfer import to_device
from ..roles import OptimizerView
from ..types import Bucket, Seeds
from .direction import Direction, check_refresh
from .scaling import PerTensor

#: k of the seeds that draw tensors: far above any direction's.
_SAMPLE_K = 0x80000004


def inclusion(scores: Tensor, ratio: Tensor) -> Tensor:
    """The probability of each tensor, float64 [T]: c score, with c such that they sum to the count.

    The count is floor(T ratio), at least 1 and at most T.  No probability is above 1, so c is at most 1 over
    the largest score, and the sum may be below the count.  c is found by 40 bisections, and rounded down.
    """
    share = scores.clamp(min=1e-12)
    share = share / share.sum()
    count = (len(share) * ratio).floor().clamp(1, len(share))
    low, high = torch.zeros_like(count), 1 / (share.max() + 1e-18)
    for _ in range(40):
        middle = (low + high) / 2
        over = (middle * share).clamp(max=1).sum() > count
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low * share).clamp(max=1)


def uniform(seed: Tensor, streams: Tensor, k: int) -> Tensor:
    """A number in [0, 1) for each stream, float64: the upper 53 bits of a derived seed."""
    drawn = derive_seed(seed, streams, torch.full_like(streams, k))
    return ((drawn >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


@dataclass(frozen=True)
class SampledTensors(Direction):
    """z of a tensor is dense noise or 0: it takes part with a probability pi, by the rule's scores.

    The update divides by pi, so that the estimate stays unbiased.  Scores and choice are kept on the device,
    and nothing waits for them; so tensors that do not take part are read and written with coefficient 0
    (where a weight of -0.0 may become 0.0).  If the draw takes none, the one with the largest pi takes part.

    ``refresh``: after how many steps the rule :class:`Sensitivity` sets the share of tensors anew.
    """

    refresh: int | None = 20

    separate = False

    def __post_init__(self) -> None:
        check_refresh("SampledTensors", self.refresh)

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        home = buckets[0].device
        params = [p for b in buckets for p in b.params]
        streams = [s for b in buckets for s in b.streams]
        key = ("streams", tuple(streams), home)
        if key not in optimizer.cache:
            optimizer.cache.clear()
            optimizer.cache[key] = torch.tensor(streams, dtype=torch.int64).to(home)
        scores, ratio = optimizer.rule.scores(optimizer, params, home)
        chance = inclusion(scores, ratio)
        chosen = uniform(seeds[home][:1], optimizer.cache[key], _SAMPLE_K) < chance
        most = torch.arange(len(params), device=home) == chance.argmax()
        chosen = torch.where(chosen.any(), chosen, most)
        optimizer.rule.sample = chosen, chance.clamp(min=1e-8)
        moves = chosen.float()
        updates = torch.where(chosen, 1 / chance.clamp(min=1e-8), torch.zeros_like(chance)).float()
        at = 0
        for b in buckets:
            here = slice(at, at + len(b.params))
            at += len(b.params)
            rows = lambda t: dict(zip(map(id, b.params), to_device(t[here], b.device).unbind(), strict=True))  # noqa: B023
            b.noise = PerTensor(rows(moves), rows(updates))
