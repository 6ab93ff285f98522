"""The engine, which brings each block in once for all forwards of a step.

A block takes the updates that it lacks as it comes in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import fail
from ..step.directions.direction import Direction
from ..step.directions.integers import IntegerSteps
from ..step.guards import OwnProcess
from ..step.roles import Home, home_of, move_home
from ..step.rules.sgd import SGD, Floored
from ..step.step import StepOptimizer
from ..step.types import Bucket, Seeds
from .blocks import Block, aliases, placeholder
from .cache import BlockCache
from .encoder import Encoder
from .history import HistoryNoise
from .lockstep import Lockstep
from .movers import Mover, Slot
from .probe import StreamedProbe
from .run import Run
from .stored import StoredModel
from .timeline import Timeline
from .visit import SidePoints, Visit, WireVisit


def _integers_of(block: Block) -> list[tuple[str, nn.Module, str, Tensor]]:
    """(name, module, attribute, buffer) of the streamed buffers.

    They are looked at again in each visit: ``module.to(...)`` gives a module other buffers, where it changes
    the data of its parameters.
    """
    streamed = {id(e.param) for e in block.entries if not isinstance(e.param, nn.Parameter)}
    places = aliases(block.module) if streamed else ()
    return [(f"{block.name}.{name}", m, key, p) for name, m, key, p in places if id(p) in streamed]


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
    ) -> None:
        super().__init__(blocks, slots, scratch, mover, timeline, write_every, wire)
        self.model, self.device, self.run = model, device, run
        self.closed = False
        self.optimizer: StepOptimizer | None = None
        self._empty = {id(e.param): placeholder(e.param, device) for b in blocks for e in b.entries}
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
        dense = type(optimizer.direction) in (Direction, IntegerSteps)
        if not isinstance(optimizer.rule, (SGD, Floored)) or not dense:
            got = f"{type(optimizer.rule).__name__} on {type(optimizer.direction).__name__}"
            fail(op, "params", "SGD on dense noise where parameters are streamed", got)
        if kind.own_probe is not StepOptimizer.own_probe or kind.update is not StepOptimizer.update:
            fail(op, "params", "losses at perturbed weights where parameters are streamed", op)
        if optimizer.restore != "exact" or optimizer.run_state.capturable:
            fail(
                op,
                "restore, capturable",
                "'exact' and False where parameters are streamed",
                optimizer.restore,
            )
        if self.run is not None:
            if trajectory is not None:
                fail(op, "trajectory", f"None (the log of this run is {self.run.log})", repr(trajectory))
            self.run.attach(optimizer, self.blocks, self.history)
        self.optimizer = optimizer

    def probe(self, optimizer: StepOptimizer, buckets: list[Bucket], seeds: Seeds) -> StreamedProbe:
        before, number = optimizer.step_count, self.history.end
        resident = [b for b in buckets if home_of(b.params[0]).in_memory]
        for b in buckets:
            if b not in resident:
                b.noise = HistoryNoise(self.history, b.noise)
        self.history.begin()
        exact = optimizer.exact_probe(resident, seeds, shared=True) if resident else None
        self._lockstep.generators = optimizer.generators
        stepped = lambda: self.committed(number) if optimizer.step_count > before else None
        return StreamedProbe(buckets, seeds, exact, self.forwards, stepped, self._alone())

    def forwards(self, step: SidePoints, run: Any) -> list[Any]:
        """The results of ``run(side)`` for each side, which run in lockstep."""
        try:
            self._step, self.in_step = step, True
            return self._lockstep.run(run, len(step.points))
        finally:
            self._step, self.in_step = None, False
            if self._visit is not None:
                self._visit.done()

    def committed(self, number: int) -> None:
        """Called when update ``number`` has been written down; again, where that did not come to its end."""
        self.history.commit(number)
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
        if self.wire is not None:
            with self._alone():
                master = self.wire.master(block)
                yield [e.of(master) for e in block.entries]
            return
        with self._loaded(block) as slot:
            yield slot.params(block)

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
