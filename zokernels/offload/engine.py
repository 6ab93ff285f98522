"""The engine: brings each block in once for all forwards of a step, and has it take its update on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import fail
from ..functional import combine, fan_out_
from ..optim.direction import Point, terms
from .blocks import Block, placeholder
from .history import History, Later, take
from .lockstep import Lockstep
from .movers import Mover, Slot
from .timeline import Timeline

if TYPE_CHECKING:
    from ..optim.groups import Bucket
    from ..optim.optimizer import ZerothOrder
    from ..trajectory.deferred import Pass
    from .probe import StreamedProbe
    from .run import Run
    from .wire import Encoding

#: Matrix products may choose another kernel for memory that is less aligned than torch's own.
_ALIGNED = 64


class Step(NamedTuple):
    """The forwards of a step: where each side stands in each bucket."""

    of: dict[int, tuple[Bucket, int, int]]  #: bucket, its place among ``points``, stream, by id of the parameter
    points: list[list[Point]]  #: of each side, for each bucket
    seeds: dict[torch.device, Tensor]

    def terms(self, side: int, place: int, bucket: Bucket) -> tuple[Tensor, Tensor]:
        return terms(self.points[side][place], self.seeds[bucket.device])

    def pair(self, sides: Sequence[int], place: int) -> tuple[int, float] | None:
        """(k, c), where two sides stand at theta + c z_k and theta - c z_k."""
        plus, minus = (self.points[s][place] for s in sides)
        if len(plus) == 1 and plus.keys() == minus.keys():
            ((k, c), d) = next(iter(plus.items())), next(iter(minus.values()))
            if isinstance(c, float) and isinstance(d, float) and c == -d:
                return k, c
        return None


class _Alike(NamedTuple):
    """Parameters of a block that one call takes."""

    entries: list[int]
    streams: list[int]
    passes: tuple[Pass, ...]
    bucket: Bucket | None  #: in which they are perturbed
    place: int


class Engine:
    """Made by :func:`zokernels.offload.stream`, whose documentation is the user's.

    One block at a time is open: ``_visit``.  Its parameters are views of scratch with what the running side computes
    with; between visits they are placeholders.
    """

    op = "stream"

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        slots: list[Slot],
        scratch: list[Tensor],
        mover: Mover,
        device: torch.device,
        timeline: Timeline,
        write_every: int | None,
        run: Run | None,
        wire: Encoding | None = None,
    ) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.mover, self.timeline, self.history = mover, timeline, History()
        self.later = Later(self.history)
        self.write_every, self.run, self.wire = write_every, run, wire
        self._visits: type[_Visit] = _Visit
        if wire is not None:
            from .wire import WireVisit

            wire.history, self._visits = self.history, WireVisit
        self._seen: dict[int, int] = {}  # updates at the last visit, by block
        self.closed = False
        self.optimizer: ZerothOrder | None = None
        self._slots, self._scratch = slots, scratch
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # of scratch, by block and scratch
        self._empty = {id(e.param): placeholder(e.param, device) for b in blocks for e in b.entries}
        self._lockstep = Lockstep(self._grant, [device])
        self._step: Step | None = None
        self._visit: _Visit | None = None
        self._inside: tuple[Block | None, int, bool] = (None, 0, False)  #: block, side, and whether grad was enabled
        self._next = {b.index: blocks[(i + 1) % len(blocks)].index for i, b in enumerate(blocks)}
        self._last: int | None = None
        for b in blocks:
            for e in b.entries:
                e.param.data = self._empty[id(e.param)]
                e.param._zo_engine = self  # type: ignore[attr-defined]
        self._hooks = [h for b in blocks for h in self._hook(b)]

    # Hooks of the model ---------------------------------------------------------------------------------------------

    def _hook(self, block: Block) -> Iterator[Any]:
        yield block.module.register_forward_pre_hook(lambda module, args: self._enter(block))
        yield block.module.register_forward_hook(lambda module, args, out: self._leave(block), always_call=True)
        yield block.module.register_state_dict_post_hook(
            lambda module, state, prefix, metadata: self._fill(block, state, prefix)
        )
        yield block.module.register_load_state_dict_pre_hook(lambda *args: self._refuse_load(block))

    def _enter(self, block: Block) -> None:
        if self.closed:
            fail(self.op, block.name, "an open stream", "one that was closed", RuntimeError)
        if self._lockstep.current is None:
            self._open(block, [0])
        else:
            self._lockstep.arrive(block.index)
        assert self._visit is not None
        side = self._lockstep.current or 0
        torch.clear_autocast_cache()  # casts of these parameters, as another side or block had them
        self._visit.bind(side)
        self._inside = block, side, torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # a graph would keep views of scratch

    def _leave(self, block: Block) -> None:
        if self._inside[:2] != (block, self._lockstep.current or 0):
            return  # the pre-hook raised
        torch.set_grad_enabled(self._inside[2])
        self._inside = None, 0, False
        for e in block.entries:
            e.param.data = self._empty[id(e.param)]
        assert self._visit is not None
        self._visit.leave()

    def _fill(self, block: Block, state: dict[str, Any], prefix: str) -> None:
        """Values in the place of placeholders."""
        skip = len(block.name) + 1
        for e, value in zip(block.entries, self.values(block), strict=True):
            key = prefix + e.name[skip:]
            if key in state:
                state[key] = value

    def _refuse_load(self, block: Block) -> None:
        fail(self.op, block.name, "weights that are given when the stream is made", "load_state_dict", RuntimeError)

    # Visits ---------------------------------------------------------------------------------------------------------

    def _grant(self, index: int, sides: list[int]) -> None:
        self._open(self.blocks[index], sides)

    def _open(self, block: Block, sides: list[int]) -> None:
        """Bring ``block`` in, up to date."""
        slot = self._load(block)
        self._visit = self._begin(block, slot, sides, self._step if self._lockstep.current is not None else None)

    def _begin(self, block: Block, slot: Slot, sides: Sequence[int], step: Step | None) -> _Visit:
        try:
            with torch.no_grad(), torch.inference_mode(False):
                return self._visits(self, block, slot, sides, step)
        except BaseException:
            self._abandon(slot)  # it may have taken a part of an update
            raise

    def _abandon(self, slot: Slot) -> None:
        """What ``slot`` holds is not to be used: the block comes again from the storage."""
        slot.users = max(0, slot.users - 1)  # a visit may have released it
        self.mover.released(slot)
        self.mover.drop(slot)

    def _load(self, block: Block) -> Slot:
        if self._last is not None and self._last != block.index:
            self._next[self._last] = block.index  # the order of the blocks is that of the last pass
        self._last = block.index
        self._seen[block.index] = self.history.end
        upcoming = [block.index, *self._upcoming(block)[: len(self._slots) - 1]]
        slot = self._slot_of(block) or self._fetch(block, self._victim(upcoming))
        slot.users += 1
        try:
            self._prefetch(upcoming)
            self.mover.wait(slot)
        except BaseException:
            self._abandon(slot)
            raise
        if slot.updates < 0:
            slot.updates = block.stored
        return slot

    def _slot_of(self, block: Block) -> Slot | None:
        return next((s for s in self._slots if s.block is block and not self._stale(s)), None)

    def _stale(self, slot: Slot) -> bool:
        """Whether the wire bytes in ``slot`` lack more updates than may be taken on the device."""
        return self.wire is not None and slot.block is not None and self.history.end - slot.updates > self.wire.lag

    def _comes_too_early(self, block: Block) -> bool:
        """Whether ``block`` is wanted for the next step alone, whose update has to be in its wire bytes."""
        in_step = self.wire is not None and self.wire.lag == 0 and self._lockstep.current is not None
        return in_step and self._seen.get(block.index) == self.history.end

    def _fetch(self, block: Block, slot: Slot | None) -> Slot:
        assert slot is not None, "no slot is free: more blocks are open at a time than there are slots"
        slot.block, slot.updates = block, -1  # what is stored when it arrives
        self.mover.fetch(block, slot)
        return slot

    def _upcoming(self, block: Block) -> list[int]:
        """As many of the blocks after ``block`` as there are slots."""
        found: list[int] = []
        index = block.index
        while len(found) < len(self._slots) and (index := self._next[index]) not in (*found, block.index):
            found.append(index)
        return found

    def _victim(self, upcoming: list[int]) -> Slot | None:
        wanted = lambda s: s.block is not None and s.block.index in upcoming and not self._stale(s)
        idle = [s for s in self._slots if not s.users and not wanted(s)]
        return next((s for s in idle if s.block is None), idle[0] if idle else None)

    def _prefetch(self, upcoming: list[int]) -> None:
        for index in upcoming:
            block = self.blocks[index]
            if self._slot_of(block) is None and not self._comes_too_early(block):
                if (slot := self._victim(upcoming)) is None:
                    return
                self._fetch(block, slot)

    def release(self, slot: Slot, onward: bool = True) -> None:
        """What was to be computed from ``slot`` has been issued.  ``onward``: its block is not needed again for now."""
        slot.users -= 1
        self.mover.released(slot)
        if slot.block is not None and onward:
            self._prefetch(self._upcoming(slot.block))

    def scratch(self, block: Block, which: int) -> list[Tensor]:
        key = block.index, which
        if key not in self._views:
            self._views[key] = block.scratch_views(self._scratch[which])
        return self._views[key]

    @property
    def buffers(self) -> list[Slot]:
        """The slots."""
        return self._slots

    @property
    def scratches(self) -> int:
        return len(self._scratch)

    def updated(self, block: Block, slot: Slot) -> None:
        """``slot`` has all updates: keep it where the rule for writing says so."""
        if self.wire is not None:
            return  # it has the bytes that came in, and the host updates its own
        slot.updates = self.history.end
        if self.write_every is not None and slot.updates - block.kept >= self.write_every:
            block.kept = slot.updates
            self.mover.store(block, slot)

    # Steps ----------------------------------------------------------------------------------------------------------

    def attach(self, optimizer: ZerothOrder, trajectory: object) -> None:
        """Whether the steps of ``optimizer`` can be streamed; a run in a folder is recorded there, and continued."""
        from ..optim.direction import Direction
        from ..optim.optimizer import ZerothOrder
        from ..optim.rules import SGD

        op, kind = type(optimizer).__name__, type(optimizer)
        if self.optimizer is not None and self.optimizer is not optimizer and self.history.end > self.history.start:
            self.flush()
        if not isinstance(optimizer.rule, SGD) or type(optimizer.direction) is not Direction:
            got = f"{type(optimizer.rule).__name__} on {type(optimizer.direction).__name__}"
            fail(op, "params", "SGD on dense noise where parameters are streamed", got)
        if kind._probe is not ZerothOrder._probe or kind._update is not ZerothOrder._update:
            fail(op, "params", "losses at perturbed weights where parameters are streamed", op)
        if optimizer._restore != "exact" or optimizer._state.capturable:
            fail(op, "restore, capturable", "'exact' and False where parameters are streamed", optimizer._restore)
        if self.run is not None:
            if trajectory is not None:
                fail(op, "trajectory", f"None (the log of this run is {self.run.log})", repr(trajectory))
            self.run.attach(optimizer, self)
        self.optimizer = optimizer

    def probe(self, optimizer: ZerothOrder, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> StreamedProbe:
        from .probe import StreamedProbe

        return StreamedProbe(optimizer, self, buckets, seeds)

    def forwards(self, step: Step, run: Any) -> list[Any]:
        """run(side) of each side, in lockstep."""
        self._step = step
        try:
            return self._lockstep.run(run, len(step.points))
        finally:
            if self._visit is not None:
                self._visit.done()
            self._step = None

    def committed(self) -> None:
        """The update of a step has been written down."""
        self.history.commit()
        self.history.drop(min(b.stored for b in self.blocks))
        if self.wire is not None and self._last is not None:  # before the next forward asks
            self._prefetch(self._upcoming(self.blocks[self._last])[: len(self._slots)])

    @property
    def is_lossless(self) -> bool:
        """Whether the device computes with the very weights of the storage: always without ``wire``."""
        return self.wire is None or self.wire.form.lossless

    # Everything at once ---------------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        return self.write_every is not None

    def flush(self) -> None:
        """All updates into the storage, and wait until they are there.

        Storage that is only read stays as it is: its updates are taken as blocks come in.
        """
        if self.closed:
            return
        if self.writable:
            for block in self.blocks:
                if block.kept < self.history.end and self.wire is not None:
                    self.wire.keep(block)
                elif block.kept < self.history.end:
                    with self._loaded(block) as slot:
                        if block.kept < self.history.end:
                            block.kept = slot.updates
                            self.mover.store(block, slot)
            self.mover.drain()
            if self.run is not None and self.optimizer is not None:
                self.run.folder.sync()  # blocks before the resident parameters: see Run
                self.run.keep_resident(self.optimizer, self.history.end)
                self.run.folder.sync()
            self.history.drop(min(b.stored for b in self.blocks))

    @contextmanager
    def _loaded(self, block: Block) -> Iterator[Slot]:
        """A slot with ``block``, up to date."""
        slot = self._load(block)
        visit = self._begin(block, slot, [], None)
        try:
            with torch.no_grad(), torch.inference_mode(False):
                yield slot
        finally:
            visit.done()

    @contextmanager
    def opened(self, block: Block) -> Iterator[list[Tensor]]:
        """The parameters of ``block``, all updates taken, on the device (with ``wire``: the host); not to be kept."""
        if self.wire is not None:
            master = self.wire.master(block)
            yield [e.of(master) for e in block.entries]
            return
        with self._loaded(block) as slot:
            yield slot.params(block)

    def values(self, block: Block) -> list[Tensor]:
        """Copies of the parameters of ``block``, on the device, all updates taken."""
        with self.opened(block) as params:
            return [v.to(self.device, copy=True) for v in params]

    def value(self, param: Tensor) -> Tensor:
        """A copy of one parameter, on the device, all updates taken."""
        for block in self.blocks:
            for i, e in enumerate(block.entries):
                if e.param is param:
                    with self.opened(block) as params:
                        return params[i].to(self.device, copy=True)
        fail(self.op, "param", "a streamed parameter", "another")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all parameters and persistent buffers, with all updates, as the safetensors file ``path``.

        Blocks are streamed; the file appears, whole and synced, when all is done.  Tied weights are in it once.
        """
        from .save import save

        save(self, path)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush, and end the threads.  The parameters stay placeholders."""
        if not self.closed:
            try:
                self.flush()
            finally:
                self.closed = True
                self._lockstep.close()
                self.mover.close()
                if self.run is not None:
                    self.run.close()


class _Visit:
    """A block in its slot, up to date, and scratch with what the sides compute with."""

    everything = False  #: whether parameters without update and perturbation have work, too

    def __init__(self, engine: Engine, block: Block, slot: Slot, sides: Sequence[int], step: Step | None) -> None:
        self.engine, self.block, self.slot, self.step = engine, block, slot, step
        self.sides, self._left = list(sides), len(sides)
        self._params = self._values()
        self._held = True
        since = slot.updates
        if since < engine.history.end:
            engine.mover.settle(slot)
        self._alike = self._groups(since)
        with engine.timeline.span("update", block):
            pair = self._pair()
            for a in self._alike:
                if pair and a.bucket is not None:
                    self._fan_out(a)
                else:
                    self._take(a, a.passes)
            #: scratch by side
            self._made: dict[int, int] = dict(zip(pair or (), (0, 1)))  # noqa: B905
        if since < engine.history.end:
            engine.updated(block, slot)
        if len(self._made) == self._left and sides and not self._fixed:
            self._release()

    def _values(self) -> list[Tensor]:
        return self.slot.params(self.block)

    def _groups(self, since: int) -> list[_Alike]:
        """Entries by dtype, updates and bucket; those without either are not in any."""
        found: dict[tuple[Any, ...], _Alike] = {}
        self._fixed: list[int] = []  #: entries that no side perturbs
        history, of = self.engine.history, self.step.of if self.step else {}
        for i, e in enumerate(self.block.entries):
            stream, passes = history.pending(e.param, since)
            bucket, place, of_bucket = of.get(id(e.param), (None, 0, stream))
            if bucket is None:
                self._fixed.append(i)
            if bucket is None and not passes and not self.everything:
                continue
            key = (e.param.dtype, id(bucket), *map(id, passes))
            if key not in found:
                found[key] = _Alike([], [], passes, bucket, place)
            found[key].entries.append(i)
            found[key].streams.append(of_bucket)
        return list(found.values())

    def _pair(self) -> list[int] | None:
        """The first two sides, where one pass can update and perturb for both."""
        pair, perturbed = self.sides[:2], [a for a in self._alike if a.bucket is not None]
        if len(pair) < 2 or self.engine.scratches < 2 or self.step is None or not perturbed:
            return None
        together = all(self.step.pair(pair, a.place) for a in perturbed)
        return pair if together else None

    def _take(self, a: _Alike, passes: Sequence[Pass]) -> None:
        if passes:
            take([self._params[i] for i in a.entries], a.streams, passes)

    def _fan_out(self, a: _Alike) -> None:
        """The last update and the perturbations in one pass."""
        update = self._last_update(a)
        self._take(a, a.passes[:-1] if update else a.passes)
        params, plus, minus = (
            [views[i] for i in a.entries]
            for views in (self._params, *(self.engine.scratch(self.block, s) for s in (0, 1)))
        )
        seed, coeff = self._direction(a)
        fan_out_(params, plus, minus, seed, coeff, **self._noise(a), **update)

    def _last_update(self, a: _Alike) -> dict[str, Any]:
        """As arguments of a fan-out, where it can be one's."""
        assert a.bucket is not None
        if not a.passes or a.passes[-1].dist != a.bucket.dist:
            return {}
        return {key: getattr(a.passes[-1], key) for key in ("seeds", "coeffs", "decay", "rounding", "rounding_seed")}

    def _direction(self, a: _Alike) -> tuple[Tensor, float]:
        """Seed and coefficient of the pair of sides."""
        assert self.step is not None
        assert a.bucket is not None
        k, c = self.step.pair(self.sides[:2], a.place)  # type: ignore[misc]
        return self.step.seeds[a.bucket.device][k : k + 1], c

    def _noise(self, a: _Alike) -> dict[str, Any]:
        assert a.bucket is not None
        return {"streams": a.streams, "dist": a.bucket.dist}

    def _perturb(self, side: int) -> list[Tensor]:
        """Scratch with the point of ``side``."""
        which = self.sides.index(side) % self.engine.scratches
        views = self.engine.scratch(self.block, which)
        for a in self._alike:
            if a.bucket is not None:
                assert self.step is not None
                out, params = ([v[i] for i in a.entries] for v in (views, self._params))
                seeds, coeffs = self.step.terms(side, a.place, a.bucket)
                combine(out, params, seeds, coeffs, streams=a.streams, dist=a.bucket.dist)
        self._made[side] = which
        return views

    def bind(self, side: int) -> None:
        """The block's parameters are what ``side`` computes with."""
        with torch.no_grad(), torch.inference_mode(False):
            if side in self._made:
                views = list(self.engine.scratch(self.block, self._made[side]))
            elif self.step is not None and any(a.bucket is not None for a in self._alike):
                with self.engine.timeline.span("update", self.block):
                    views = list(self._perturb(side))
            else:
                views = list(self.engine.scratch(self.block, 0))
            for i in self._fixed:
                if self._params[i].data_ptr() % _ALIGNED == 0:
                    views[i] = self._params[i]
                else:
                    views[i].copy_(self._params[i])
            for e, view in zip(self.block.entries, views, strict=True):
                e.param.data = view
        self._begin = self.engine.timeline.now()

    def leave(self) -> None:
        self.engine.timeline.add("compute", self.block, self._begin)
        self._left -= 1
        if self._left == 0:
            self.done()

    def _release(self) -> None:
        self._held = False
        self.engine.release(self.slot, onward=bool(self.sides))  # a look at one parameter is often followed by another

    def done(self) -> None:
        if self._held:
            self._release()
        if self.engine._visit is self:
            self.engine._visit = None
