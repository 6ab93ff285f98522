"""Descent that keeps a score of curvature for each tensor (:class:`SampledTensors`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_number, fail
from ...functional import squared_norm
from ...transfer import to_device
from ..directions.sampled import SampledTensors
from ..estimators import TwoSided
from ..probes.probe import Probe
from ..roles import OptimizerView
from ..types import Estimate
from .sgd import SGD

#: The share of tensors stays between these, and follows a new one by a tenth.
_LEAST, _MOST, _PACE, _TRUST = 0.1, 0.8, 0.1, 0.7


class Sensitivity(SGD):
    """Descent along the tensors that take part, whose scores follow |g|.

        e <- (1 - pace) e + pace |g|;    w_t = (|z_t|^2 / pi_t^2) / sum of these, over the chosen tensors
        score_t <- (1 - rate) score_t + rate (|g| / e) w_t      for the tensors t that were chosen

    e and the scores are kept; scores begin at ``first``, e at 1e-8.  |g| is that of the first group.  Every
    ``refresh`` steps of the direction the share of tensors moves a tenth of the way towards 0.1 + 0.7 (0.7 n
    + 0.3 (1 - h)), and stays in [0.1, 0.8].  There n = (sum of roots of scores)^2 / (sum of scores) / T, and
    h is the entropy of the scores over log T.  Logarithms may differ between machines in their last bits, on
    which a later choice can hang.
    """

    def __init__(self, ratio: float = 0.4, rate: float = 0.1, pace: float = 0.1, first: float = 0.01) -> None:
        super().__init__()
        for name, value in (("ratio", ratio), ("rate", rate), ("pace", pace)):
            if not 0 < value <= 1:
                fail("Sensitivity", name, "a number in (0, 1]", repr(value))
        check_number("Sensitivity", "first", first, positive=True)
        self.ratio, self.rate, self.pace, self.first = ratio, rate, pace, first
        #: Which tensors take part in the step (bool [T]), and their probabilities (float64 [T]).
        self.sample: tuple[Tensor, Tensor] | None = None

    folds_restore = False
    through_noise = False

    def check_parts(self, optimizer: OptimizerView) -> None:
        parts = optimizer.estimator, optimizer.direction, optimizer.subset
        if parts[0] != TwoSided(1) or not isinstance(parts[1], SampledTensors) or parts[2] is not None:
            expected = "TwoSided(1), SampledTensors and no subset"
            fail(optimizer.op, "estimator, direction, subset", expected, parts)

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        ratio = torch.full((1,), self.ratio, dtype=torch.float64)
        return {"mean": torch.full((1,), 1e-8, dtype=torch.float64), "ratio": ratio}

    def scores(
        self, optimizer: OptimizerView, params: Sequence[Tensor], home: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The scores of ``params``, float64 [T], and the share of them that is to take part, 0-dim."""
        for p in params:
            if "score" not in optimizer.state[p]:
                value = torch.full((), self.first, dtype=torch.float64, device=p.device)
                optimizer.state[p]["score"] = value
        found = torch.stack([to_device(optimizer.state[p]["score"], home) for p in params])
        return found, self.kept(optimizer, optimizer.param_groups[0], home)["ratio"][0]

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        assert self.sample is not None  # the direction's prepare
        (chosen, chance), home = self.sample, probe.buckets[0].device
        finite = to_device(estimate.finite, home)
        size = to_device(estimate.gradients[0], home).double().abs()
        kept = self.kept(optimizer, optimizer.param_groups[0], home)
        mean = (1 - self.pace) * kept["mean"] + self.pace * size
        energies = []
        for b in probe.buckets:
            for p, stream in zip(b.params, b.streams, strict=True):
                norm = squared_norm(probe.seeds[b.device][:1], [p.numel()], streams=[stream], dist=b.dist)
                energies.append(to_device(norm, home))
        energy = torch.where(chosen, torch.cat(energies) / chance.square(), torch.zeros_like(chance))
        weights = energy / (energy.sum() + 1e-12)
        params = [p for b in probe.buckets for p in b.params]
        scores, _ = self.scores(optimizer, params, home)
        new = (1 - self.rate) * scores + self.rate * (size / (mean + 1e-12)) * weights
        new = torch.where(chosen & finite, new, scores)
        for p, score in zip(params, new.unbind(), strict=True):
            optimizer.state[p]["score"].copy_(score)
        kept["mean"].copy_(torch.where(finite, mean, kept["mean"]))
        if optimizer.direction.begins_window(optimizer):
            ratio = _followed(new, kept["ratio"])
            kept["ratio"].copy_(torch.where(finite, ratio, kept["ratio"]))


def _followed(scores: Tensor, ratio: Tensor) -> Tensor:
    """The new share of tensors, from their scores (float64 [T]) and the share so far."""
    count, tiny = len(scores), 1e-12
    scores = scores.clamp(min=tiny)
    values = scores / (scores.mean() + tiny)
    effective = values.sqrt().sum().square() / (values.sum() + tiny) / count
    q = values / (values.sum() + tiny)
    entropy = -(q * (q + tiny).log()).sum() / math.log(count + tiny) if count > 1 else torch.ones_like(ratio)
    wanted = _LEAST + (_MOST - _LEAST) * (_TRUST * effective + (1 - _TRUST) * (1 - entropy))
    return ((1 - _PACE) * ratio + _PACE * wanted).clamp(_LEAST, _MOST)
