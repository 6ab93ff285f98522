"""Replaying a log: it makes the weights of a run from its base weights, without a forward."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, fail
from ..step.deferred import DeferredNoise
from ..step.directions.direction import Direction
from ..step.estimators import TwoSided
from ..step.groups import own_rates, takes_part
from ..step.roles import OptimizerView
from ..step.rules.sgd import SGD
from ..step.shard import any_sharded
from ..step.state import HostState
from ..step.step import StepOptimizer
from ..step.subset import Subset
from ..step.two_pass import ThreePass, TwoPass
from ..step.types import Bucket, Estimate, Seeds
from .format import Log, Record, read
from .rebuilding import is_sgd, match, optimizer_of
from .settings import check_base

#: The largest number that fp32 has.
_LARGEST = torch.finfo(torch.float32).max

#: How many steps' passes wait at a time.
_BATCH = 4096

Progress = Callable[[int], object]


class _Deferred(Direction):
    """Dense noise, of which all passes are put off."""

    def __init__(self, noise: DeferredNoise) -> None:
        self._noise = noise

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for bucket in buckets:
            bucket.noise = self._noise


def _repeat(optimizer: StepOptimizer, record: Record, gated: bool) -> None:
    """Does all that :meth:`StepOptimizer.run_step` did to the weights in a step, in the same order."""
    if not (record.two_pass and record.carried):
        optimizer.flush()
    if record.two_pass != optimizer.in_two_pass:
        optimizer.passes = TwoPass(()) if record.two_pass else ThreePass()
    assert isinstance(optimizer.run_state, HostState)  # nothing capturable has a log
    optimizer.run_state.step = record.step  # the steps of an asynchronous run are in no order
    for group, lr in zip(optimizer.param_groups, record.rates, strict=True):
        group["lr"] = torch.full((), lr, dtype=torch.float64) if isinstance(group["lr"], Tensor) else lr
    place = {id(group): i for i, group in enumerate(optimizer.param_groups)}
    with optimizer.probed(optimizer.plan()) as probe:
        g = [torch.tensor(record.gradients[place[id(b.group)]]) for b in probe.buckets]
        estimate = Estimate(
            torch.tensor(record.losses, dtype=torch.float64),
            g,
            torch.full((), record.finite),
            skip=not (record.finite or gated),
            multiple=torch.full((), float(record.multiple)) if optimizer.rule.trials else None,
        )
        for k, sign in optimizer.estimator.points():  # where weights moved to the points, each move rounded
            probe.move([b.point(k, sign) for b in probe.buckets])
        for points in optimizer.trial_points(probe.buckets, g):
            probe.move(points)
        optimizer.update(probe, estimate)


def check_records(optimizer: StepOptimizer, records: Iterable[Record]) -> None:
    """Raises where a record holds what no step of ``optimizer`` could have recorded.

    A record whose checksum is right may still be crafted.  This runs before the first of them is taken, so
    that no weight changes ahead of the error."""
    rule, estimator, carried = optimizer.rule, optimizer.estimator, False
    allows_two_pass = optimizer.restore == "inplace" and type(rule) is SGD and estimator == TwoSided(1)
    allows_two_pass &= type(optimizer.direction) is Direction and optimizer.subset is None
    losses = len(estimator.points()) if rule.reads_losses else 0
    for record in records:
        where = f"step {record.step}"
        if len(record.losses) != losses:
            expected = f"{losses}, as rule and estimator have them"
            fail("replay_", f"{where}: losses", expected, len(record.losses))
        for group, lr, g in zip(optimizer.param_groups, record.rates, record.gradients, strict=True):
            if not isinstance(group["lr"], Tensor) and not (math.isfinite(lr) and lr >= 0):
                fail("replay_", f"{where}: lr", "a finite number >= 0", lr)
            if record.finite and not all(math.isfinite(v) and abs(lr * v) <= _LARGEST for v in g):
                fail("replay_", f"{where}: g", "finite numbers, and lr g in the range of fp32", g[:4])
        if record.finite and not all(map(math.isfinite, record.losses)):
            fail("replay_", f"{where}: losses", "finite numbers", record.losses[:4])
        if rule.trials and record.multiple not in rule.trials:
            fail("replay_", f"{where}: multiple", f"one of {rule.trials}", record.multiple)
        if (record.two_pass and not allows_two_pass) or record.carried > (carried and record.two_pass):
            fail("replay_", f"{where}: flags", "a two-pass step only where the optimizer has them", "one")
        carried = record.two_pass


@contextmanager
def retaking(optimizer: StepOptimizer, first: int) -> Iterator[None]:
    """Around the steps of a log, from step ``first`` on, which an optimizer takes to go on with the run."""
    optimizer.run_state.load(optimizer.seed, first, 0)
    with own_rates(optimizer.param_groups):
        yield
    optimizer.run_state.new_skips()  # their user was warned of these when they were taken


@torch.no_grad()
def repeat_all(
    optimizer: StepOptimizer,
    gated: bool,
    records: Iterable[Record],
    progress: Progress = lambda elements: None,
    fold: bool = False,
) -> None:
    """Lets ``optimizer`` take the steps of ``records``.  Its weights are those before the first of them.

    Args:
        gated: as the log's header says.
        progress: called with numbers of elements times steps.
        fold: see :meth:`DeferredNoise.apply`.
    """
    records, direction, deferred = iter(records), optimizer.direction, DeferredNoise()
    numel = sum(p.numel() for g in optimizer.param_groups for p in g["params"] if takes_part(g, p))
    sharded = any_sharded(p for g in optimizer.param_groups for p in g["params"])
    if puts_off := type(direction) is Direction and optimizer.rule.through_noise and not sharded:
        optimizer.direction = _Deferred(deferred)
    try:
        while batch := list(itertools.islice(records, _BATCH)):
            for record in batch:
                _repeat(optimizer, record, gated)
                if not puts_off:
                    progress(numel)
            steps = len(batch)
            deferred.apply(lambda elements: progress(elements * steps), fold)  # noqa: B023
        optimizer.flush()
        deferred.apply(lambda elements: None)
    finally:
        optimizer.passes, optimizer.direction = ThreePass(), direction


@torch.no_grad()
def put_off(optimizer: StepOptimizer, gated: bool, records: Iterable[Record]) -> DeferredNoise:
    """The passes over the weights of the steps of ``records``, which are taken but for these passes.

    The optimizer's direction must be dense noise.
    """
    direction, deferred = optimizer.direction, DeferredNoise()
    optimizer.direction = _Deferred(deferred)
    try:
        for record in records:
            _repeat(optimizer, record, gated)
    finally:
        optimizer.passes, optimizer.direction = ThreePass(), direction
    return deferred


@torch.no_grad()
def repeat_streamed(optimizer: StepOptimizer, log: Log, first: int) -> None:
    """Lets ``optimizer``, whose parameters are streamed, take the steps of ``log`` from number ``first`` on.

    Resident parameters take them at once, and blocks as they come in.
    """
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
    """Makes, in place, the weights of a run after step ``upto`` - 1 from those that it began with.

    No forward is run.

    Args:
        weights: the run's base weights: a module, a mapping or pairs of names and tensors, or the tensors in
            the optimizer's order; on any device.
        log: the path of the log, or what :func:`read` made of it.
        upto: the number of the first step that is not taken (default: all are).
        mode: "exact": the operations of the run, each with its rounding.  This gives its weights to the bit,
            for every optimizer.  "fp32": theta_0 times the product of the decays, plus the sum of the steps,
            in fp32, with one read and write of the weights.  It leaves out the roundings of a run in half
            precision, and so has not its bits.  The weights are then fp32 tensors, which rounded to the run's
            dtype are its base, and the run must be SGD on dense noise.
        recover: accept a damaged log, up to its last good record.
        check: compare the SHA-256 of the weights with the log's.
        direction, subset: those of the run, where the log cannot hold them (masks, patterns of layer names).
        progress: called with the number of elements times steps that were done since the last call.

    Returns: the number of steps taken.

    Raises: ValueError, before a weight changes, where the log is damaged, or the weights differ from its base
    in names, shapes, dtypes or values.
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
    if steps:
        optimizer.plan()  # whatever a step would refuse
        check_records(optimizer, log.records(upto))
    if check:
        check_base(header, tensors)
    if steps:
        if not exact:
            records = (r._replace(two_pass=False, carried=False) for r in records)
        repeat_all(optimizer, header["gated"], records, progress, fold=not exact)
    return steps
