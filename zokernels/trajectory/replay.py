"""Replaying a log: the weights of a run from its base weights, without a forward."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..optim.direction import Direction
from ..optim.groups import Bucket, check_choice, takes_part
from ..optim.inplace import InplaceProbe
from ..optim.optimizer import Estimate, ZerothOrder
from ..optim.shard import is_sharded
from ..optim.state import HostState
from ..optim.subset import Subset
from ..optim.two_pass import TwoPass
from .deferred import Deferred
from .format import Log, Record, read
from .settings import check_base, is_sgd, match, optimizer_of

#: Steps whose passes wait at a time.
_WINDOW = 4096

Progress = Callable[[int], object]


class _Put(Direction):
    """Dense noise, put off."""

    def __init__(self, deferred: Deferred) -> None:
        self._deferred = deferred

    def prepare(self, optimizer: ZerothOrder, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> None:
        for bucket in buckets:
            bucket.direction = self._deferred


def _repeat(optimizer: ZerothOrder, record: Record, gated: bool) -> None:
    """The step of ``record``: all that :meth:`ZerothOrder._step` does to the weights, in the same order."""
    if not (record.two_pass and record.carried):
        optimizer.flush()
    if record.two_pass != bool(optimizer._two_pass):
        optimizer._two_pass = TwoPass(()) if record.two_pass else None
    assert isinstance(optimizer._state, HostState)  # nothing capturable has a log
    optimizer._state.step = record.step  # of an asynchronous run in no order
    for group, lr in zip(optimizer.param_groups, record.rates, strict=True):
        group["lr"] = torch.full((), lr, dtype=torch.float64) if isinstance(group["lr"], Tensor) else lr
    buckets = optimizer._buckets()
    place = {id(group): i for i, group in enumerate(optimizer.param_groups)}
    with optimizer._probed(buckets, list(dict.fromkeys(b.device for b in buckets))) as probe:
        g = [torch.tensor(record.gradients[place[id(b.group)]]) for b in probe.buckets]
        estimate = Estimate(
            torch.tensor(record.losses, dtype=torch.float64),
            g,
            torch.full((), record.finite),
            skip=not (record.finite or gated),
            multiple=torch.full((), float(record.multiple)) if optimizer.rule.trials else None,
        )
        if isinstance(probe, InplaceProbe):  # the moves of the forwards round, too
            for k, sign in optimizer.estimator.points():
                probe.move([b.point(k, sign) for b in probe.buckets])
            for points in optimizer._trial_points(probe.buckets, g):
                probe.move(points)
        optimizer._update(probe, estimate)


@torch.no_grad()
def repeat_all(
    optimizer: ZerothOrder,
    gated: bool,
    records: Iterable[Record],
    progress: Progress = lambda elements: None,
    fold: bool = False,
) -> None:
    """Let ``optimizer``, whose weights are those before the first of ``records``, take their steps.

    ``gated``: as the log's header says.
    ``progress``: called with numbers of elements times steps.  ``fold``: see :meth:`Deferred.apply`.
    """
    records, direction, deferred = iter(records), optimizer.direction, Deferred()
    numel = sum(p.numel() for g in optimizer.param_groups for p in g["params"] if takes_part(g, p))
    sharded = any(is_sharded(p) for g in optimizer.param_groups for p in g["params"])
    if puts_off := type(direction) is Direction and not sharded:
        optimizer.direction = _Put(deferred)
    try:
        while window := list(itertools.islice(records, _WINDOW)):
            for record in window:
                _repeat(optimizer, record, gated)
                if not puts_off:
                    progress(numel)
            steps = len(window)
            deferred.apply(lambda elements: progress(elements * steps), fold)  # noqa: B023
        optimizer.flush()
        deferred.apply(lambda elements: None)
    finally:
        optimizer._two_pass, optimizer.direction = None, direction


@torch.no_grad()
def repeat_streamed(optimizer: ZerothOrder, log: Log, first: int) -> None:
    """Let ``optimizer``, whose parameters are streamed, take the steps of ``log`` from number ``first`` on: resident
    parameters at once, blocks as they come in."""
    for record in itertools.islice(log.records(), first, None):
        _repeat(optimizer, record, log.header["gated"])


def replay_(
    weights: Any,
    log: str | os.PathLike[str] | Log,
    upto: int | None = None,
    *,
    mode: str = "exact",
    recover: bool = False,
    check: bool = True,
    direction: Direction | None = None,
    subset: Subset | None = None,
    progress: Progress = lambda elements: None,
) -> int:
    """In place, the weights of a run after step ``upto`` - 1, from those that it began with.  No forward is run.

    Args:
        weights: the run's base weights: a module, a mapping or pairs of names and tensors, or the tensors in the
            optimizer's order; on any device.
        log: path of the log, or what :func:`read` made of it.
        upto: number of the first step that is not taken (default: all are).
        mode: "exact": the operations of the run, one rounding each: its weights to the bit, for every optimizer.
            "fp32": theta_0 times the product of the decays, plus the sum of the steps, in fp32, with one read and
            write of the weights: without the roundings of a run in half precision, hence not its bits.  The weights
            are then fp32 tensors, which rounded to the run's dtype are its base; SGD on dense noise only.
        recover: take a damaged log up to its last good record.
        check: compare the SHA-256 of the weights with the log's.
        direction, subset: those of the run where the log cannot hold them (masks, patterns of layer names).
        progress: called with the number of elements times steps that are done since the last call.

    Returns: the number of steps taken.

    Raises: ValueError, before a weight changes, where the log is damaged, or the weights differ from its base in names,
    shapes, dtypes or values.
    """
    check_choice("replay_", "mode", mode, ("exact", "fp32"))
    log = log if isinstance(log, Log) else read(log, recover)
    exact, header = mode == "exact", log.header
    if not exact and not is_sgd(header):
        got = f"{header['rule']['class']} on {header['direction']['class']}"
        fail("replay_", "mode", "'exact' for all but SGD on dense noise", got)
    tensors = match(header, weights, None if exact else torch.float32)
    optimizer = optimizer_of(
        header, tensors, header["restore"] if exact else "exact", direction=direction, subset=subset
    )
    records, steps = log.records(upto), log.check_upto(upto) - log.start
    if check:
        check_base(header, tensors)
    if steps:
        optimizer._buckets()  # whatever a step would refuse
        if not exact:
            records = (r._replace(two_pass=False, carried=False) for r in records)
        repeat_all(optimizer, header["gated"], records, progress, fold=not exact)
    return steps
