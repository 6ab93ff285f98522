"""Processes that never wait for each other.

Each publishes (seed, g) of its own steps, and applies the steps of all in one order.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import fail, is_integer
from ..files.atomic import replacing
from ..step.deferred import DeferredNoise
from ..step.directions.direction import Direction
from ..step.groups import label_of, own_rates
from ..step.guards import uninterrupted
from ..step.loss import LossReader
from ..step.probes.probe import Probe
from ..step.shard import any_sharded
from ..step.state import HostState
from ..step.step import StepOptimizer
from ..step.types import Estimate
from ..trajectory.format import canonical, encode
from ..trajectory.recorder import pending
from ..trajectory.replay import check_records, put_off
from ..trajectory.settings import header_of
from .agreement import RanksDiffer, fingerprint

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in its __all__


class AsyncExchange:
    """A log in a ``torch.distributed`` store, to which each process appends the records of its steps.

    In a step a process first applies the records that it lacks.  It draws a step number d that nobody else
    has, by an atomic ``add``, and evaluates the closure at its weights along z of ``derive_seed(seed, d,
    k)``.  Then it appends (d, g, lr, loss) as record n, the first number that is free.  ``compare_set``
    claims the number and publishes the record at once, so no dead process can leave a gap.  Where another
    process was faster, it returns that one's record, which is the next to be applied.  At last the process
    applies the records up to and including its own.

    Records are applied in the order of n, each with its own rounding (contract zk1).  A process that lags
    applies all that it missed in one pass over the weights, piece by piece.  So after record n all processes
    have the bits of ``replay_`` of :meth:`save`'s file up to n, whatever was late.

    The staleness of record n is the number of records that the weights lacked at which its g was measured.  A
    process that dies leaves nothing behind, and one that begins anew at the base weights takes the run's
    records first.

    Args:
        optimizer: without ``mesh`` and ``trajectory``, fresh, with restore="exact", dense noise and no
            subset; the same on all processes (settings and weights are compared through the store), each with
            lr of its own.
        store: a ``TCPStore``, ``FileStore`` or a ``PrefixStore`` of one, the run's own.
        steps: number of records after which the run is over; a step that ends later is dropped.
        staleness: the largest that a record may have.  A step that would have a larger one is dropped, and
            the process goes on from fresh weights.  None: no bound.

    Raises: RanksDiffer where the settings or base weights are not those of the process that came first, and,
    at the end, where weights are not.
    """

    def __init__(
        self, optimizer: StepOptimizer, store: Store, steps: int, staleness: int | None = None
    ) -> None:
        self._check(optimizer, steps, staleness)
        self.optimizer, self.store, self.steps, self.staleness = optimizer, store, steps, staleness
        assert isinstance(optimizer.run_state, HostState)  # not capturable
        self._state = optimizer.run_state
        header = {**header_of(optimizer), "start": 0, "asynchronous": True}
        self._head, self._layout = encode(header)
        self._gated = header["gated"]
        self._agree("header", {**json.loads(canonical(header)), "steps": steps})
        #: The number of applied records, and of own steps that were dropped.
        self.count = self.dropped = 0
        #: The staleness of the last own record.
        self.last_staleness: int | None = None
        self._next: list[bytes] = []  # records that are published, but not yet applied here
        self._owed: DeferredNoise | None = None  # passes over the weights of records that count as applied
        self.catch_up()

    def _check(self, optimizer: StepOptimizer, steps: int, staleness: int | None) -> None:
        for name, value, low in (
            ("steps", steps, 1),
            ("staleness", 0 if staleness is None else staleness, 0),
        ):
            if not is_integer(value, low, 2**32 - 1):
                fail("AsyncExchange", name, f"an integer in [{low}, 2^32)", repr(value))
        o = optimizer
        plain = type(o.direction) is Direction and o.subset is None and o.restore == "exact" and o.replayable
        plain &= not (o.part or o.rule.reads_losses)
        alone = o.team.alone and o.home.in_memory and not (o.log.recording or o.run_state.capturable)
        params = [p for group in o.param_groups for p in group["params"]]
        if not (plain and alone) or any_sharded(params):
            expected = (
                "restore='exact', dense noise, a rule that reads no losses, and no subset, mesh, trajectory, "
                "shards, streaming, capturable or first_order"
            )
            fail("AsyncExchange", "optimizer", expected, o.op)
        if o.state or o.step_count:
            fail("AsyncExchange", "optimizer", "a fresh one", f"step {o.step_count}")

    def _agree(self, what: str, ours: dict[str, Any]) -> None:
        """Raises where ``ours`` is not what the first process that came here has."""
        theirs = _flat(json.loads(self.store.compare_set(what, "", json.dumps(ours))))
        ours = _flat(ours)
        for key in (*theirs, *(k for k in ours if k not in theirs)):
            if (one := theirs.get(key)) != (other := ours.get(key)):
                got = f"{str(other)[:200]} here and {str(one)[:200]} on the first process"
                raise RanksDiffer(f"AsyncExchange: {key}: expected the same on all processes, got {got}")

    @property
    def done(self) -> bool:
        """Whether the weights are those after the last record."""
        return self.count == self.steps

    def step(self, closure: Callable[[], Tensor | float]) -> Tensor | None:
        """Evaluates, publishes and applies a step; returns the loss, or None if the run was over before."""
        self.catch_up()
        if self.done:
            return None
        base = self.count
        self._state.step = draw = self.store.add("draws", 1) - 1
        try:
            publish = lambda probe, estimate: self._publish(draw, base, probe, estimate)
            loss = self.optimizer.run_step(closure, LossReader(), publish)
        finally:
            self._state.step = self.count
        self._apply()
        return loss

    def _publish(self, draw: int, base: int, probe: Probe, estimate: Estimate) -> None:
        record = pending(self.optimizer, draw, probe.buckets, estimate).record(self._layout)
        mine = f"{base} {self._layout.pack(record).hex()}"
        while (n := base + len(self._next)) < self.steps and (
            self.staleness is None or n - base <= self.staleness
        ):
            self._next.append(found := self.store.compare_set(str(n), "", mine))
            if found.decode() == mine:
                self.last_staleness = n - base
                return
        self.dropped += 1

    def catch_up(self) -> int:
        """Applies all that is published; returns the number of records."""
        before = self.count
        while (n := self.count + len(self._next)) < self.steps and self.store.check([str(n)]):
            self._next.append(self.store.get(str(n)))
        self._apply()
        return self.count - before

    def _settle(self) -> None:
        """Runs the passes that are owed, or what an exception has left of them."""
        if self._owed is not None:
            with torch.no_grad():
                self._owed.apply(lambda elements: None)
            self._owed = None

    def _apply(self) -> None:
        """Applies ``_next``.  Each record is applied once, whatever interrupts this.

        At first only what the rule keeps changes, and an exception takes that back.  From then on the records
        count as applied and their passes are owed; what an exception leaves of them, the next call runs.
        """
        self._settle()
        if not self._next:
            return
        optimizer, state = self.optimizer, self._state
        records = [
            self._layout.unpack(self._data(self.count + i, found), 0) for i, found in enumerate(self._next)
        ]
        check_records(optimizer, records)
        with uninterrupted():
            before = optimizer.rule.state_dict(), state.seed, self.count, int(state.skipped)
            try:
                with own_rates(optimizer.param_groups):
                    owed = put_off(optimizer, self._gated, records)
            except BaseException:
                optimizer.rule.load_state_dict(optimizer, before[0])
                state.load(*before[1:])
                raise
            count = self.count + len(records)
            self._owed, self.count, self._next, state.step = owed, count, [], count
            self._settle()
        if self.done:
            named = [(label_of(g, i), p) for g in optimizer.param_groups for i, p in enumerate(g["params"])]
            prints = {f"{label} ({i})": int(fingerprint(p)) for i, (label, p) in enumerate(named)}
            self._agree("weights", prints)

    def _data(self, n: int, found: bytes) -> bytes:
        try:
            data = bytes.fromhex(found.decode().partition(" ")[2])
        except ValueError:
            fail("AsyncExchange", f"record {n}", "one of this run", repr(found[:100]), RuntimeError)
        if (fault := self._layout.fault(data, 0)) is not None:
            fail("AsyncExchange", f"record {n}", "one of this run", fault, RuntimeError)
        return data

    def stalenesses(self) -> list[int]:
        """The staleness of each record that is applied here."""
        return [n - int(self.store.get(str(n)).decode().partition(" ")[0]) for n in range(self.count)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the records that are applied here as a log, for ``replay_`` and ``zokernels replay``."""
        target = pathlib.Path(path)
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
        with replacing(target) as file:  # whole, or not there
            file.write(self._head)
            for n in range(self.count):
                file.write(self._data(n, self.store.get(str(n))))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The values of nested dicts and lists, by path."""
    if not isinstance(value, (dict, list)):
        return {path[1:]: value}
    named = lambda i, v: v["name"] if isinstance(v, dict) and v.get("name") else i
    items = value.items() if isinstance(value, dict) else [(named(i, v), v) for i, v in enumerate(value)]
    return {k: v for key, inner in items for k, v in _flat(inner, f"{path}.{key}").items()}
