"""Optimizers that weigh or search candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..checks import check_integer, fail
from ..step.candidates import Consensus, RankingRounds
from ..step.loss import RankReader
from ..step.rules.sgd import SGD
from ..step.scalars import NO, descent, gate, learning_rate, scalars
from ..step.types import Bucket, Estimate, Group, LossesAt, Point
from .arguments import Options
from .optimizer import ZerothOrder


class ConsensusHopping(ZerothOrder):
    """theta <- (1 - lr) theta + lr sum_k w_k (theta + eps z_k),   w = softmax_k(-alpha L(theta + eps z_k)).

    The weights hop to the consensus of q candidates around them (:class:`Consensus`), and the next candidates
    are drawn around that point.  A step takes q forwards and one update.

    Args:
        lr: 1 is the paper's: the whole way to the consensus.
        eps: the width of the search, the paper's sigma, in units of theta.
        candidates: q >= 2.
        alpha: how much lower losses count for more, in units of 1 / loss, >= 0.

    Source: "Gradient is All You Need?" (Riedl, Klock, Geldhauser and Fornasier, 2023, arXiv 2306.09778).
    """

    spelled: ClassVar = {"directions": "candidates"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        eps: float = 1e-2,
        *,
        candidates: int = 8,
        alpha: float = 10.0,
        **options: Unpack[Options],
    ) -> None:
        estimator = Consensus(candidates, alpha)
        super().__init__(params, lr, eps, estimator=estimator, rule=SGD(), **options)


class ZORankSearch(ZerothOrder):
    """ZO-RankSGD with its line search: nothing is known but an order, and no step makes it worse.

    A round ranks ``candidates`` points theta + eps z_k, as :class:`ZORankSGD`, and gets a direction
    -sum_k g_k z_k from their order.  Then ``trials`` points along the mean G of the directions of the step's
    rounds are compared with the best candidate of the round and with theta itself:

        theta - lr 0.5^j G,   j = 0 .. trials - 1;      theta + eps z_best;      theta

    theta goes to the best of these.  If that is theta, the next round draws other candidates, and its
    direction is averaged with those before; after ``rounds`` rounds the step ends where it began.  So lr is
    the longest step that is tried, and may be far too large.

    A step takes candidates + trials + 2 forwards a round.  Of equal losses the first in the order above is
    the better, but theta before all of them.  Weight decay is applied whichever is kept, and a trial sees the
    update rounded to nearest.

    Args:
        candidates, top: as for :class:`ZORankSGD`.
        trials: of the line search, >= 1.
        rounds: the most rounds of one step, >= 1.  With more than one the host reads which point is the best;
            with one a step waits for nothing.  The authors carry the mean from step to step instead, each
            step on a batch of its own; here all rounds see the batch of the closure.

    No mesh: its ranks would have to agree in the middle of a step.

    Source: ZO-RankSGD, Tang, Rybin and Chang, 2023, arXiv 2303.03751 (algorithms 1 and 2, and its code).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        candidates: int = 8,
        top: int | None = None,
        trials: int = 5,
        rounds: int = 4,
        **options: Unpack[Options],
    ) -> None:
        check_integer(self.op, "trials", trials, 1)
        check_integer(self.op, "candidates", candidates, 2)
        check_integer(self.op, "rounds", rounds, 1)
        if options.get("mesh") is not None:
            fail(self.op, "mesh", "None: a line search is decided in the middle of a step", "a mesh")
        if options.get("capturable") and rounds > 1:
            fail(self.op, "rounds", "1 with capturable: a CUDA graph has no branches", rounds)
        self.replayable = options.get("restore", "exact") == "exact"
        if not self.replayable and options.get("trajectory") is not None:
            expected = "'exact' with a trajectory: its points depend on the losses before them"
            fail(self.op, "restore", expected, repr(options["restore"]))
        self._trials = trials
        estimator = RankingRounds(candidates * rounds, top, candidates, rounds)
        super().__init__(params, lr, eps, estimator=estimator, rule=SGD(), **options)

    def step(
        self,
        closure: Callable[..., Any] | None = None,
        rank: Callable[[list[Any]], Iterable[int]] | None = None,
        *,
        batched: bool = False,
    ) -> Any:
        """One step, as :meth:`ZORankSGD.step`: it returns the lowest loss, or the best result of ``rank``.

        ``rank`` is called twice a round: with the results of the candidates, and with those of the line
        search, of which the first index counts.  Their last is that of theta.
        """
        if batched:
            fail(self.op, "batched", "False: a line search is decided in the middle of a step", True)
        if rank is None:
            return super().step(closure)
        if self.run_state.capturable:
            fail(self.op, "rank", "capturable=False: a CUDA graph calls no host function", "capturable=True")
        assert isinstance(self.estimator, RankingRounds)  # the constructor's
        results = _SearchReader(rank, self.estimator.top or self.estimator.candidates)
        self.run_step(closure, results)
        return results.best

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_trials": self._trials, "replayable": self.replayable}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["clip"] is not None:
            fail(self.op, "clip", "None: an order has no slopes to bound", group["clip"])

    def estimate(self, buckets: list[Bucket], losses_at: LossesAt) -> Estimate:
        estimator = self.estimator
        assert isinstance(estimator, RankingRounds)  # the constructor's
        m, forwards = estimator.candidates, []
        for r in range(estimator.rounds):
            ranked = losses_at([[b.point(k, 1) for b in buckets] for k in range(r * m, (r + 1) * m)], m)
            ranked = ranked.double()
            if not r:
                total = ranked.new_zeros(estimator.directions)
                none = torch.zeros_like(total)
            own, best = estimator.coefficients(ranked, 1.0), none.clone()
            # A loss that is not finite skips the step in the end; until then no forward sees NaN for weights.
            total[r * m : (r + 1) * m] = torch.where(own.isfinite(), own, torch.zeros_like(own))
            best[r * m : (r + 1) * m] = torch.arange(m, device=best.device) == ranked.argmin()
            choices = [self._choices(b.group, b.eps, total / (r + 1), best) for b in buckets]
            searched = losses_at(self._points(buckets, choices, (r + 1) * m), self._trials + 2).double()
            forwards += [ranked, searched]
            # Theta is the last of them, but the first among equals.
            better = torch.where(searched < searched[-1], searched, torch.full_like(searched, float("inf")))
            chosen = torch.where(better.isinf().all(), self._trials + 1, better.argmin())
            if r + 1 < estimator.rounds and (int(chosen) <= self._trials or not bool(own.isfinite().all())):
                break
        losses = torch.cat(forwards)
        gradients = [own.index_select(0, chosen.reshape(1))[0] for own in choices]
        nothing = torch.full_like(gradients[0], float("nan"))
        gradients = [torch.where(losses.isfinite().all(), g, nothing) for g in gradients]
        reads = not self.run_state.capturable
        gradients, finite = gate([b.group for b in buckets], gradients, reads=reads)
        raw = {(b.eps, b.group["clip"]): g for b, g in zip(buckets, gradients, strict=True)}
        return Estimate(losses, gradients, finite, finite is NO, losses.unbind(), raw=raw)

    def _choices(self, group: Group, eps: float, gradient: Tensor, best: Tensor) -> Tensor:
        """g (fp32 [trials + 2, q]) of each point of the line search, from the mean gradient and the place of
        the best candidate (1 there, else 0).  lr g leads from each point back to theta.
        """
        lr = scalars((learning_rate(group, gradient),), gradient.device)
        to_best = torch.where(lr != 0, -eps / lr, torch.zeros_like(lr)) * best
        along = [gradient.float() * 0.5**j for j in range(self._trials)]
        return torch.stack([*along, to_best.float(), torch.zeros_like(along[0])])

    def _points(self, buckets: list[Bucket], choices: list[Tensor], count: int) -> list[list[Point]]:
        """The points of the line search in each bucket; their coefficients beyond ``count`` are 0."""
        steps = [descent(b.group, own).unbind() for b, own in zip(buckets, choices, strict=True)]
        point: Callable[[Tensor], Point] = lambda step: dict(enumerate(step[:count].unbind()))
        points = [[point(own[j]) for own in steps] for j in range(self._trials + 1)]
        return [*points, [{} for _ in buckets]]


class _SearchReader(RankReader):
    """Reads an order of candidates, then the best of a line search, and so on in turn."""

    def __init__(self, rank: Callable[[list[Any]], Iterable[int]], top: int) -> None:
        super().__init__(rank, top)
        self._tops = itertools.cycle((top, 1))

    def losses(self, results: list[Any]) -> Tensor:
        self.top = next(self._tops)
        return super().losses(results)
