"""The one collective of a step: all losses are gathered, and averaged in an order that no mesh changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import fail
from ..step.estimators import ForwardMode
from ..step.groups import devices_of
from ..step.roles import OptimizerView, Team
from ..step.step import StepOptimizer
from ..step.types import Bucket
from .agreement import Agreement, RanksDiffer
from .ranks import PERTURBATION, PIPELINE, Gathers, Ranks
from .signs import FAILED, LOST, Signs


def mean_of(losses: Tensor | Sequence[Tensor | float]) -> Tensor:
    """The mean over the first dimension, float64: ((l0 + l1) + (l2 + l3) + ...) / n.

    It is summed as a balanced binary tree.  ``Exchange`` takes the mean over the data ranks with it.  So one
    process whose closure returns ``mean_of`` the losses of the same shards makes the same weights.  The order
    is the same on every device, and takes log2(n) additions.
    """
    if not len(losses):
        fail("mean_of", "losses", "at least one", 0)
    if not isinstance(losses, Tensor):
        losses = torch.stack([torch.as_tensor(x, dtype=torch.float64).detach().reshape(()) for x in losses])
    total, count = losses.double(), len(losses)
    while len(total) > 1:
        pairs = len(total) // 2 * 2
        total = torch.cat((total[:pairs:2] + total[1:pairs:2], total[pairs:]))
    return total[0] / count


class Exchange(Ranks, Team):
    """Shares out the points of a step among ranks, and gathers their losses.

    The dimensions of ``mesh`` say by their names what its ranks do:

    * "perturbation": the n points of a step are shared out among the P ranks, in runs of ceil(n / P) at most.
    * "data": every rank has batches of its own, and the loss of a point is :func:`mean_of` over them.
    * "pipeline": every rank holds parameters of its own, and the loss of the last stage is everyone's.
    * any other: the ranks hold one model between them (tensor parallel), or copies of it, and the loss of the
      first of them is everyone's.

    A step takes one all-gather of float64: 8 ceil(n / P) bytes a rank for the losses, and 48 for
    :class:`Signs`, by which ranks that come apart are noticed; 64 in all for plain data parallel with two
    sides. All ranks then compute the same coefficients from the same numbers, so weights need no exchange.

    Args:
        mesh: a DeviceMesh with named dimensions; its ranks are those that call ``step``.
        check_every: steps between two comparisons of all ranks' weights (:class:`Agreement`); None: at the
            start alone.
    """

    alone = False

    def __init__(self, mesh: DeviceMesh, check_every: int | None = 100) -> None:
        super().__init__(mesh)
        self._leaders = self.leaders()
        self._index: dict[tuple[Any, ...], Tensor] = {}
        self.agreement = Agreement(self, check_every)
        self._signs = Signs(self.members, self.stage_of)
        self._optimizer: OptimizerView | None = None
        #: Whether the others wait for this rank in the step that it has entered.
        self._entered = False
        self._step = 0  #: the number of that step
        #: How often something was changed that ranks compare at the start, and how often when they last did.
        self._changes = self._agreed = 0
        self._late = Gathers()  #: of a comparison behind the signs
        self._on_cpu = mesh.device_type == "cpu"  #: where the host knows the signs at once
        self._number = 0  #: of steps that all ranks have entered together, those that failed included
        self._begun = False  #: whether its signs are made
        self._gathers, self._count = Gathers(), 1  #: of losses: those that are made, and how many there are
        #: The number of points that were shared out last, and of gathers that were made before.
        self._shared = 0, -1

    def __repr__(self) -> str:
        return f"<Exchange of {len(self.ranks)} ranks, {', '.join(self.names)}>"

    def join(self, optimizer: OptimizerView) -> None:
        self.agreement.start(optimizer)
        self._agreed = self._changes

    def enter(self, optimizer: OptimizerView) -> None:
        """Called first in a step: from here on the others wait for this rank, or for word of its failure.

        A step that another exception than an Exception has cut short (Ctrl-C) is entered once more: what was
        gathered then is not gathered again."""
        if not (self._entered and optimizer is self._optimizer and optimizer.step_count == self._step):
            self._entered = False
            self.agreement.choose(self._number)
            self._gathers, self._count = Gathers(), 2 if optimizer.rule.trials else 1
            self._late = Gathers()
            self._optimizer, self._step, self._shared = optimizer, optimizer.step_count, (0, -1)
            self.bytes_sent, self._begun = 0, False
            number = self._number + 1
            self._number, self._entered = number, True  # at once

    def begin(self, optimizer: OptimizerView, buckets: Sequence[Bucket]) -> None:
        """Called before the forwards of a step: checks that all ranks agree."""
        self.agreement.begin(optimizer)
        self._signs.begin(optimizer, self._changes)
        self._begun = True

    @property
    def is_decided(self) -> bool:
        return self._entered and len(self._gathers.done) == self._count

    def rewind(self) -> None:
        self._gathers.rewind()

    def changed(self) -> None:
        self._changes += 1
        if not self._on_cpu:
            self.agreement.expire()

    def _agree(self, optimizer: OptimizerView) -> None:
        """Compares all again where the ranks have changed something: after their signs, by which they know
        that all of them have.
        """
        if self._on_cpu and self._agreed != self._changes:
            self.agreement.start(optimizer, self._late)
            self._agreed = self._changes

    def foreign(self, optimizer: OptimizerView, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.agreement.foreign(optimizer, groups)

    def share(self, count: int) -> range:
        """Which of ``count`` points this rank evaluates."""
        self._shared = count, len(self._gathers.done)
        return _share(count, self.place, self.perturbation)

    def loss_of(self, result: object) -> object:
        """The part of a closure's result that counts: nothing, on the stages before the last."""
        return result if self.stage == self.stages - 1 else 0.0

    def gather(self, own: Tensor | None, count: int, device: torch.device) -> Tensor:
        """The losses of all ``count`` points: float64 [count, ...], on ``device``.

        They are in ``own``'s dtype where that holds them exactly, which is where no mean is taken, and where
        all stages know it, which is where there is one.

        ``own``: the losses at the points of :meth:`share`; None where there are none.
        """
        most = -(-count // self.perturbation)
        shape = () if own is None else own.shape[1:]
        mine = torch.full((most, *shape), float("nan"), dtype=torch.float64, device=device)
        if own is not None:
            mine[: len(own)] = own.to(device, torch.float64)
        dtype = own.dtype if own is not None and self.data == self.stages == 1 else None
        everyone = self._exchange(mine, dtype)
        index = self._index_of(count, most, device)
        losses = mean_of(everyone.flatten(0, 1)[index])
        return losses if dtype is None else losses.to(dtype)

    def _exchange(self, mine: Tensor, dtype: torch.dtype | None, failed: int = 0) -> Tensor:
        """``mine`` of all ranks, [ranks, ...].  Raises, on all of them, where their signs differ."""
        assert self._optimizer is not None  # a step has begun
        signs = self._signs.of(dtype, failed, mine.device)
        everyone = self.all_gather(torch.cat((mine.flatten(), signs.view(torch.float64))), self._gathers)
        values, theirs = (
            everyone[:, : mine.numel()],
            everyone[:, mine.numel() :].contiguous().view(torch.int64),
        )
        try:
            losses = self._signs.check(self._optimizer, values.reshape(len(everyone), *mine.shape), theirs)
            self._agree(self._optimizer)
            return losses
        except RanksDiffer:
            self._entered = False  # on all ranks alike
            self._signs.restart()
            self._changes = self._agreed = 0
            self.agreement.expire()
            raise

    def failed(self, optimizer: OptimizerView, error: BaseException) -> None:
        """Lets the others, who wait for this rank's losses, know that there are none.

        Until the weights have been compared again no step is taken: with restore="inplace" those of this rank
        have made fewer moves back and forth, each with its rounding.
        """
        if not self._entered or optimizer is not self._optimizer:
            return
        done = len(self._gathers.done)
        if done < self._count:
            rule, estimator = optimizer.rule, optimizer.estimator
            trials = rule.trials and done == 1
            count, before = self._shared
            if before != done:  # it has failed before it knew its share
                count = len(rule.trials) if trials else len(estimator.points())
            shape = (2,) if isinstance(estimator, ForwardMode) and not trials else ()
            device = devices_of(optimizer.param_groups)[0]
            mine = torch.full(
                (-(-count // self.perturbation), *shape), float("nan"), dtype=torch.float64, device=device
            )
            with suppress(RanksDiffer):  # of which this rank is the reason
                self._gathers.asked = done
                if done:
                    self._agree(optimizer)
                if not self._begun:
                    self.begin(optimizer, ())
                self._exchange(mine, None, LOST if optimizer.is_half_updated else FAILED)
            self.agreement.expire()
        self._entered = False

    def _index_of(self, count: int, most: int, device: torch.device) -> Tensor:
        """[D, count]: the places of each data rank's losses in the gathered ones, of which every rank sent
        ``most``.
        """
        if (key := (count, device)) not in self._index:
            shares = [len(_share(count, p, self.perturbation)) for p in range(self.perturbation)]
            places = [
                [place * most + i for place, share in zip(of_data, shares, strict=True) for i in range(share)]
                for of_data in self._leaders
            ]
            self._index[key] = torch.tensor(places, dtype=torch.int64).to(device)
        return self._index[key]


def _share(count: int, place: int, places: int) -> range:
    """The run of ``count`` things that belongs to ``place``.

    Sizes differ by one at most; longer runs come first.
    """
    size, longer = divmod(count, places)
    begin = place * size + min(place, longer)
    return range(begin, begin + size + (place < longer))


def exchange_of(optimizer: StepOptimizer, mesh: DeviceMesh | Exchange) -> Exchange:
    """The exchange of an optimizer.  Raises where the optimizer's parts do not go with the mesh."""
    op = optimizer.op
    if optimizer.run_state.capturable:
        fail(op, "capturable", "False with a mesh: its checks are on the host", True)
    if isinstance(mesh, DeviceMesh):
        mesh = Exchange(mesh)
    if not isinstance(mesh, Exchange):
        fail(op, "mesh", "a DeviceMesh or an Exchange", type(mesh).__name__, TypeError)
    if mesh.perturbation > (count := optimizer.most_points):
        fail(
            op, "mesh", f"at most {count} ranks along {PERTURBATION!r}, one for each point", mesh.perturbation
        )
    if mesh.stages > 1 and not optimizer.staged:
        fail(op, "mesh", f"no {PIPELINE!r}: each step chooses among all parameters", f"{mesh.stages} stages")
    if mesh.stages > 1:  # stages know no parameters but their own
        if optimizer.subset is not None or not optimizer.direction.separate:
            got = f"{type(optimizer.direction).__name__}, {type(optimizer.subset).__name__}"
            fail(
                op, "mesh", f"no subset, and a direction of each parameter by itself, with {PIPELINE!r}", got
            )
        if isinstance(optimizer.estimator, ForwardMode):
            fail(op, "mesh", f"no {PIPELINE!r} with forward-mode derivatives", f"{mesh.stages} stages")
    return mesh
