"""The engine, which brings each block in once for all forwards of a step.

A block takes the updates that it lacks as it comes in.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..checks import fail
from ..step.directions.direction import Direction
from ..step.directions.integers import IntegerSteps
from ..step.directions.low_rank import FreshFactors, KeptLeft, KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import GivenMask, MagnitudeMask, RandomMask
from ..step.directions.scaling import CurvedDirection, Sphere
from ..step.groups import takes_part
from ..step.guards import OwnProcess
from ..step.roles import Home, home_of, move_home
from ..step.rules.sgd import SGD, Conservative, Floored, Recalling
from ..step.rules.stateful import Adam, Curvature, Momentum, Sign
from ..step.rules.window import AdamWindow, MomentumWindow
from ..step.step import StepOptimizer
from ..step.types import Bucket, Seeds
from .blocks import STATE, Block, aliases, placeholder
from .cache import BlockCache
from .encoder import Encoder
from .history import HistoryNoise
from .lockstep import Lockstep
from .movers import Mover, Slot, Threaded
from .probe import StreamedProbe
from .run import Run
from .storage import DiskStorage, HostStorage
from .stored import StoredModel
from .timeline import Timeline
from .visit import SidePoints, Visit, WireVisit

#: The rules whose updates are passes over weights, and over states that travel with them.
_RULES = frozenset(
    (SGD, Conservative, Recalling, Floored, Momentum, Adam, Sign, Curvature, MomentumWindow, AdamWindow)
)
#: The directions whose noise needs no weights, and is drawn on the host and on the device alike.
_DENSE = frozenset((Direction, IntegerSteps))
#: The directions whose noise needs no weights but those that it is added to, and what is kept of these.
_DIRECTIONS = _DENSE | {RandomMask, MagnitudeMask, GivenMask, Sphere, CurvedDirection}
_DIRECTIONS |= {KeptRight, KeptLeft, FreshFactors, TemporalFactor, Subspace}


def _integers_of(block: Block) -> list[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, attribute, buffer) of the streamed buffers.

    They are looked at again in each visit: ``module.to(...)`` gives a module other buffers, where it changes
    the data of its parameters.
    """
    streamed = {id(e.param) for e in block.entries if not isinstance(e.param, nn.Parameter)}
    places = aliases(block.module) if streamed else ()
    return [(f"{block.name}.{name}", m, key, p) for name, m, key, p in places if id(p) in streamed]


def _own(value: Tensor) -> Tensor:
    """A copy in host memory of a loaded tensor; of one in a mapped file, which nothing changes, itself."""
    mapped = getattr(value.untyped_storage(), "filename", None) is not None
    return value.detach() if mapped else value.detach().to("cpu", copy=True)


class _Saved(NamedTuple):
    """A tensor of a state_dict that is streamed."""

    param: Tensor
    key: str
    value: Tensor
    away: Tensor  #: what stands for it in ``optimizer.state``


class Engine(BlockCache, StoredModel, Home):
    """Streams the blocks of a model.

    :func:`zokernels.offload.stream` makes it, and has the user's documentation.

    One block at a time is open (``_visit``).  Its parameters are views of the values that the running side
    computes with.  While a block is not open, its parameters are placeholders.
    """

    in_memory = False

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
        wire: Encoder | None = None,
        *,
        store: HostStorage | DiskStorage,
    ) -> None:
        super().__init__(blocks, slots, scratch, mover, timeline, write_every, wire)
        self.model, self.device, self.run, self._store = model, device, run, store
        if run is not None:
            run.await_writes = cast("Threaded", mover).await_writes
        #: What stands in ``optimizer.state`` for the states, by id of the parameter and name.
        self._states: dict[tuple[int, str], Tensor] = {}
        self._measured: list[Bucket] = []  #: of which the step that runs measures something
        self._has_begun = False  #: whether states may have other values than their first
        self.closed = False
        self.optimizer: StepOptimizer | None = None
        self._empty = {id(e.param): placeholder(e.param, device, e.dtype) for b in blocks for e in b.entries}
        self._integers = {b.index: _integers_of(b) for b in blocks}
        self._lockstep = Lockstep(self._open, [device])
        self._step: SidePoints | None = None
        self._visit: Visit | None = None
        #: The block and the side that are inside a forward, and whether gradients were enabled before it.
        self._inside: tuple[Block | None, int, bool] = (None, 0, False)
        self._process, self._lock = OwnProcess(), threading.Lock()
        self._process.check(self.op, "model")
        #: The thread that runs the model, outside of steps inside one of its blocks; None between two uses.
        self._thread: int | None = None
        self._frees = False  #: whether the end of the block that is open ends that
        for b in blocks:
            for e in b.entries:
                e.param.data = self._empty[id(e.param)]
                move_home(e.param, self)
            self._hook(b)

    # One thread at a time -----------------------------------------------------------------------------------

    def _claim(self) -> bool:
        """Lets this thread alone run the model, flush and save until it sets ``_thread`` to None.

        False where it may do so already: a thread of the step that runs, or one that has claimed it before.
        """
        self._process.check(self.op, "model")
        if self._lockstep.in_own_thread:
            return False
        with self._lock:
            if self._thread == threading.get_ident() and self._lockstep.current is None:
                return False
            if self._thread is not None:
                expected = "one thread at a time that runs the model, flushes, saves or closes"
                fail(self.op, "model", expected, "a second one", RuntimeError)
            self._thread = threading.get_ident()
            return True

    @property
    def _has_thread(self) -> bool:
        return self._lockstep.in_own_thread or self._thread == threading.get_ident()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other thread runs the model, flushes or saves."""
        claimed = self._claim()
        try:
            yield
        finally:
            if claimed:
                self._thread = None

    # Hooks of the model -------------------------------------------------------------------------------------

    def _hook(self, block: Block) -> None:
        module, expected = block.module, "weights that are given when the stream is made"
        module.register_forward_pre_hook(lambda module, args: self._enter(block))
        module.register_forward_hook(lambda module, args, out: self._leave(block), always_call=True)
        module.register_state_dict_post_hook(
            lambda module, state, prefix, _: self._fill(block, state, prefix)
        )
        module.register_load_state_dict_pre_hook(
            lambda *args: fail(self.op, block.name, expected, "load_state_dict", RuntimeError)
        )

    def _enter(self, block: Block) -> None:
        if self.closed:
            fail(self.op, block.name, "an open stream", "one that was closed", RuntimeError)
        for name, module, key, buffer in self._integers[block.index]:
            if module._buffers.get(key) is not buffer:
                expected = "the buffer of integers that is streamed"
                fail(self.op, name, expected, "another one: something replaced it", RuntimeError)
        claimed = self._claim()
        try:
            self._bring(block)
        except BaseException:
            if claimed:
                self._thread = None
            raise
        self._frees = claimed

    def _bring(self, block: Block) -> None:
        """Lets the parameters of ``block`` be what the running side computes with."""
        if self._lockstep.current is None:
            self._open(block.index, [0])
        else:
            self._lockstep.arrive(block.index)
        assert self._visit is not None
        side = self._lockstep.current or 0
        torch.clear_autocast_cache()  # casts of these parameters, as another side or block had them
        self._visit.bind(side)
        self._inside = block, side, torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # a graph would keep views of scratch

    def _leave(self, block: Block) -> None:
        if self._inside[:2] != (block, self._lockstep.current or 0) or not self._has_thread:
            return  # the pre-hook raised
        torch.set_grad_enabled(self._inside[2])
        self._inside = None, 0, False
        for e in block.entries:
            e.param.data = self._empty[id(e.param)]
        assert self._visit is not None
        try:
            self._visit.leave()
        finally:
            if self._frees:
                self._frees, self._thread = False, None

    def _fill(self, block: Block, state: dict[str, Any], prefix: str) -> None:
        """Puts the values of a block into a state_dict, in the place of placeholders."""
        skip = len(block.name) + 1
        for e, value in zip(block.entries, self.values(block), strict=True):
            key = prefix + e.name[skip:]
            if key in state:
                state[key] = value

    # Visits -------------------------------------------------------------------------------------------------

    def _open(self, index: int, sides: list[int]) -> None:
        """Brings the block of that number in, up to date."""
        block = self.blocks[index]
        slot = self.load(block)
        self._visit = self._begin(block, slot, sides, self._step if self.in_step else None)

    def _begin(self, block: Block, slot: Slot, sides: Sequence[int], step: SidePoints | None) -> Visit:
        kind = Visit if self.wire is None else WireVisit
        try:
            with torch.no_grad(), torch.inference_mode(False):
                return kind(self, block, slot, sides, step)
        except BaseException:
            self.abandon(slot)  # it may have taken a part of an update
            raise

    # Steps --------------------------------------------------------------------------------------------------

    def attach(self, optimizer: StepOptimizer, trajectory: object) -> None:
        """Raises where the steps of ``optimizer`` cannot be streamed.

        A run that has a folder is recorded there, and continued where there is a log.
        """
        op, kind = optimizer.op, type(optimizer)
        if (
            self.optimizer is not None
            and self.optimizer is not optimizer
            and self.history.end > self.history.start
        ):
            self.flush()
        parts = type(optimizer.rule), type(optimizer.direction)
        if parts[0] not in _RULES or parts[1] not in (_DENSE if self.wire else _DIRECTIONS):
            expected = f"a rule and a direction that can be streamed{' with wire=' if self.wire else ''}"
            fail(op, "params", expected, f"{parts[0].__name__} on {parts[1].__name__}")
        widened = any(e.is_widened for b in self.blocks for e in b.entries)
        if optimizer.tangents and (self.wire is not None or widened):
            option = "wire=" if self.wire is not None else "master="
            fail(op, "params", f"losses at perturbed weights where parameters are streamed with {option}", op)
        if kind.own_probe is not StepOptimizer.own_probe or kind.update is not StepOptimizer.update:
            fail(op, "params", "losses at perturbed weights where parameters are streamed", op)
        if optimizer.restore != "exact" or optimizer.run_state.capturable:
            fail(
                op,
                "restore, capturable",
                "'exact' and False where parameters are streamed",
                optimizer.restore,
            )
        if self.run is not None and trajectory is not None:
            fail(op, "trajectory", f"None (the log of this run is {self.run.log})", repr(trajectory))
        self._add_states(optimizer)
        if self.run is not None:
            self.run.attach(optimizer, self.blocks, self.history)
        self.optimizer = optimizer

    def _add_states(self, optimizer: StepOptimizer) -> None:
        """Lets each block have what ``optimizer`` keeps of its trained weights.

        Blocks whose files have states already, because a run is continued, must have the same.
        """
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if takes_part(group, p)}
        kept_of = lambda p: [*optimizer.rule.kept_of(p), *optimizer.direction.kept_of(p)]
        wanted = {
            b.index: [
                (e.name, kept) for e in b.entries if id(e.param) in trained and (kept := kept_of(e.param))
            ]
            for b in self.blocks
        }
        if self._states:
            expected = "a stream that no other optimizer's states travel with (make it anew)"
            fail(optimizer.op, "params", expected, f"that of a {type(self.optimizer).__name__}")
        fresh = False
        for b in self.blocks:
            before = [s.entry for s in b.states]
            size = b.nbytes
            b.keep(wanted[b.index], self.device, self._store.parts)
            now = [s.entry for s in b.states]
            places = lambda entries: [(e.name, e.begin, e.dtype, e.param.shape) for e in entries]
            if before and places(before) != places(now):
                got = [e.name for e in before]
                b.nbytes = size
                fail(optimizer.op, b.name, f"a file with the states {[e.name for e in now]}", got)
            fresh |= bool(now) and not before
        if fresh:
            self.mover.drain()
            self._store.add_states(self.mover)
        if self.wire is not None:
            self.wire.has_states = any(b.states for b in self.blocks)
        for b in self.blocks:
            owners = {e.name: id(e.param) for e in b.entries}
            states = iter(b.states)
            for name, kept in wanted[b.index]:
                for key, *_ in kept:
                    self._states[owners[name], key] = next(states).entry.param
            for slot in self._slots:
                slot.forget(b)

    def state(self, optimizer: StepOptimizer, param: Tensor, name: str) -> Tensor:
        if (id(param), name) not in self._states:
            expected = "parameters that were trained when the optimizer was made, where they are streamed"
            fail(optimizer.op, "params", expected, f"one that lacks {name!r}", RuntimeError)
        return self._states[id(param), name]

    def find_measured(self, optimizer: StepOptimizer, measured: Collection[str]) -> None:
        """``measured`` are names in the blocks' files."""
        for b in self.blocks:
            for e in b.entries:
                keys = [key for key, *_ in optimizer.direction.kept_of(e.param)]
                if any(f"{STATE}{key}.{e.name}" in measured for key in keys):
                    optimizer.state[e.param] |= {key: self._states[id(e.param), key] for key in keys}

    def fill_states(self, state_dict: dict[str, Any]) -> None:
        """They are copied to host memory, a block at a time."""
        away = {id(t) for t in self._states.values()}
        for block in self.blocks if any(state_dict["state"].values()) and away else ():
            with self._views_of(block) as views:
                for index, kept in state_dict["state"].items():
                    values = {
                        key: views[id(t)].detach().to("cpu", copy=True)
                        for key, t in kept.items()
                        if id(t) in away and id(t) in views
                    }
                    state_dict["state"][index] = {**kept, **values}

    @property
    def has_states(self) -> bool:
        """Whether what the optimizer keeps of each weight is streamed with the weights."""
        return bool(self._states)

    def check_load(self, op: str, state_dict: dict[str, Any]) -> None:
        """A run that has a folder has its states there: a state_dict must be of the same step of that run.

        Storage that is only read begins with the states that are loaded, and so takes them before its first
        update.
        """
        if not self._states:
            return
        if self.run is None:
            if not self.writable and self.history.end:
                expected = "a stream without updates, where storage is only read"
                fail(op, "state_dict", expected, f"{self.history.end} updates", RuntimeError)
            return
        assert self.optimizer is not None
        here, step = self.optimizer.log.mark(), self.optimizer.step_count
        mark = state_dict["zo"].get("log")
        if state_dict["zo"]["step"] != step or (here is not None and mark != here):
            expected = f"that of step {step} of the run in {self.run.path} (offload.rewind brings that back)"
            fail(op, "state_dict", expected, mark, RuntimeError)

    def _saved(self, optimizer: StepOptimizer, state_dict: dict[str, Any]) -> dict[tuple[Any, str], _Saved]:
        """What of ``state_dict`` is streamed, by the number of the parameter there and its name."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        return {
            (index, key): _Saved(p, key, value, self._states[id(p), key])
            for p, index in zip(params, indices, strict=True)
            for key, value in state_dict["state"].get(index, {}).items()
            if (id(p), key) in self._states
        }

    def without_states(self, optimizer: StepOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = self._saved(optimizer, state_dict)
        for (index, key), one in saved.items():
            if one.value.shape != one.away.shape:
                argument, expected = f"state_dict: state[{index}][{key!r}]", f"shape {tuple(one.away.shape)}"
                fail(optimizer.op, argument, expected, tuple(one.value.shape))
        kept = {
            index: {key: value for key, value in of.items() if (index, key) not in saved}
            for index, of in state_dict["state"].items()
        }
        return {**state_dict, "state": kept}

    def load_states(self, optimizer: StepOptimizer, state_dict: dict[str, Any]) -> None:
        """A block at a time.  States of parameters that have none there begin anew."""
        saved = {id(one.away): one for one in self._saved(optimizer, state_dict).values()}
        if not saved and not self._has_begun:
            return
        self._has_begun = True
        if not self.writable:
            self.mover.drain()
            for block in self.blocks:
                here = [s.entry.param for s in block.states if id(s.entry.param) in saved]
                block.loaded = {id(away): _own(saved[id(away)].value) for away in here}
            for slot in self._slots:
                self.mover.drop(slot)
        for block in (b for b in self.blocks if b.states) if self.writable and self.run is None else ():
            with self._changed(block) as views:
                for state in block.states:
                    view, one = views[id(state.entry.param)], saved.get(id(state.entry.param))
                    view.fill_(state.value) if one is None else view.copy_(one.value)
        self.mover.drain()
        for one in saved.values():
            optimizer.state[one.param][one.key] = one.away

    @contextmanager
    def _changed(self, block: Block) -> Iterator[Mapping[int, Tensor]]:
        """Weights and states of ``block`` with all updates, which may be written to, and are stored then."""
        if self.wire is not None:
            with self._alone(), torch.no_grad():
                views = self.wire.master(block)
                yield views
                self.wire.put(block, views)
            return
        with self._loaded(block) as slot:
            self.mover.settle(slot)
            yield slot.views(block)
            block.scheduled = slot.updates
            self.mover.store(block, slot)

    def probe(self, optimizer: StepOptimizer, buckets: list[Bucket], seeds: Seeds) -> StreamedProbe:
        before, number = optimizer.step_count, self.history.end
        resident = [b for b in buckets if home_of(b.params[0]).in_memory]
        for p in (p for b in buckets if b not in resident for p in b.params if optimizer.rule.states):
            for name in optimizer.rule.states:
                self.state(optimizer, p, name)  # before anything is written
        self.history.begin()
        self._measured = [b for b in buckets if b not in resident and b.noise.measures]
        for b in buckets:
            if b not in resident:
                b.noise = HistoryNoise(self.history, b.noise)
                b.noise.note(b.members, b.device)
        exact = optimizer.exact_probe(resident, seeds, shared=True) if resident else None
        self._lockstep.generators = optimizer.generators
        stepped = lambda: self.committed(optimizer, number) if optimizer.step_count > before else None
        tangents = optimizer.tangents
        return StreamedProbe(buckets, seeds, exact, self.forwards, stepped, self._alone(), tangents)

    def forwards(self, step: SidePoints, run: Any) -> list[Any]:
        """The results of ``run(side)`` for each side, which run in lockstep."""
        try:
            self._step, self.in_step = step, True
            return self._lockstep.run(run, len(step.points))
        finally:
            self._step, self.in_step = None, False
            if self._visit is not None:
                self._visit.done()

    def committed(self, optimizer: StepOptimizer, number: int) -> None:
        """Called when update ``number`` has been written down; again, where that did not come to its end."""
        self.history.commit(number)
        self._has_begun = True
        for p in (p for b in self._measured for p in b.params):
            for key, *_ in optimizer.direction.kept_of(p):
                optimizer.state[p][key] = self._states[id(p), key]
        self.history.drop(min(b.stored for b in self.blocks))
        self.prefetch_after_update()

    @property
    def is_lossless(self) -> bool:
        return self.wire is None or self.wire.layout.lossless

    # Everything at once -------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        return self.write_every is not None

    def flush(self) -> None:
        """Brings all updates into the storage, and waits until they are there.

        Storage that is only read stays as it is; blocks take their updates as they come in.
        """
        if self.closed:
            return
        with self._alone():
            self._flush()

    def _flush(self) -> None:
        if self.writable:
            for block in self.blocks:
                if block.scheduled < self.history.end and self.wire is not None:
                    self.wire.keep(block)
                elif block.scheduled < self.history.end:
                    with self._loaded(block) as slot:
                        if block.scheduled < self.history.end:
                            block.scheduled = slot.updates
                            self.mover.store(block, slot)
            self.mover.drain()
            if self.run is not None and self.optimizer is not None:
                self.run.folder.sync()  # blocks before the resident parameters: see Run
                self.run.keep_resident(self.optimizer, self.history.end)
                self.run.folder.sync()
            self.history.drop(min(b.stored for b in self.blocks))

    @contextmanager
    def _loaded(self, block: Block) -> Iterator[Slot]:
        """A slot that holds ``block``, up to date."""
        with self._alone():
            slot = self.load(block)
            visit = self._begin(block, slot, [], None)
            try:
                with torch.no_grad(), torch.inference_mode(False):
                    yield slot
            finally:
                visit.done()

    @contextmanager
    def opened(self, block: Block) -> Iterator[list[Tensor]]:
        """They are on the device, or, with ``wire``, on the host."""
        with self._views_of(block) as views:
            yield [views[id(e.param)] for e in block.entries]

    @contextmanager
    def _views_of(self, block: Block) -> Iterator[Mapping[int, Tensor]]:
        """Weights and states of ``block`` with all updates, as :meth:`Block.views` has them."""
        if self.wire is not None:
            with self._alone():
                yield self.wire.master(block)
            return
        with self._loaded(block) as slot:
            yield slot.views(block)

    def close(self) -> None:
        """Flushes, and ends the threads.  The parameters stay placeholders.

        A forked child has none of the threads, and only forgets the engine.
        """
        if self._process.is_forked:
            self.closed = True
        if not self.closed:
            with self._alone():
                if self._lockstep.current is not None:
                    fail(self.op, "close", "a call between two steps", "one inside a closure", RuntimeError)
            try:
                self.flush()
            finally:
                self.closed = True
                self._lockstep.close()
                self.mover.close()
                if self.run is not None:
                    self.run.close()
