"""Passes over the weights that are put off, and then run on one piece of the weights after the other.

A piece stays in the cache for all passes, so many passes read and write memory only once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backends.registry import select
from ..functional import Dist, combine_, requantize_, update_
from ..functional import Rule as KernelRule
from .noise import Members, Noise, raise_to

#: Elements of a piece.  On the CPU 2^20 fp32 weights of a thread are 4 MiB, which stay in the last-level
#: cache.  Seconds for 400 steps of 22.6 M weights on two cores (1 MiB of L2 each, 32 MiB of L3), with pieces
#: of 2^18 (which fit L2, but calls dominate), 2^20 and 2^21: fp32 normal with decay 2.8, 1.9, 1.6; bf16
#: Rademacher 1.8, 1.1, 1.0; fp32 Rademacher with decay 2.5, 0.7, 0.6.  On a GPU a piece is 32 MiB.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 23}
#: Directions of one fused call.  Rademacher in fp32 takes 0.073 ns an element and direction with 16 of them,
#: 0.027 with 64, and 0.087 with 1,000, whose signs leave the first-level cache.
_FUSED = 64

#: (parameter, stream, begin, end) of the pieces that one call takes together.
Pack = list[tuple[Tensor, int, int, int]]


class Pass(NamedTuple):
    """The arguments of one combine_; of one update_, where there is a rule; of one requantize_, where there
    are bounds; or of one :meth:`Noise.raise_to`, where there is a minimum.

    Where there is a noise, which is not dense, it is a call of :meth:`Noise.update`, :meth:`Noise.step` or
    :meth:`Noise.measure`, on whole tensors.
    """

    seeds: Tensor
    coeffs: Tensor
    dist: str
    decay: Tensor | None
    rounding: str
    rounding_seed: Tensor | None
    rule: KernelRule | None = None
    hyper: Tensor | None = None
    first: dict[int, Tensor] | None = None  #: states by id of the parameter
    second: dict[int, Tensor] | None = None
    bounds: tuple[int, int] | None = None  #: of integers
    minimum: Tensor | None = None
    noise: Noise | None = None
    measures: bool = False

    @property
    def is_combine(self) -> bool:
        others = (self.rule, self.bounds, self.minimum, self.noise)
        return all(one is None for one in others)

    def bound(self, views: Mapping[int, Tensor]) -> Pass:
        """The same pass for tensors that stand for the parameters and their states (:meth:`Noise.bound`)."""
        if self.noise is None and self.first is None:
            return self

        def found(states: dict[int, Tensor] | None) -> dict[int, Tensor] | None:
            if states is None:
                return None
            return {id(views[key]): views[id(t)] for key, t in states.items() if key in views}

        noise = None if self.noise is None else self.noise.bound(views)
        return self._replace(first=found(self.first), second=found(self.second), noise=noise)

    def run(
        self, params: list[Tensor], streams: list[int], offsets: list[int], pick: Callable[..., Any]
    ) -> None:
        """Does the pass on ``params``.  ``pick`` finds the pieces of the states that belong to them."""
        keys = ("dist", "decay", "rounding", "rounding_seed")
        options: dict[str, Any] = {key: getattr(self, key) for key in keys}
        options |= {"streams": streams, "offsets": offsets}
        if self.noise is not None:
            self._run_noise(self.noise, params, streams)
        elif self.minimum is not None:
            raise_to(params, self.minimum)
        elif self.bounds is not None:
            low, high = self.bounds
            # A byte of packed integers is two elements.
            options["offsets"] = [
                o * (2 if p.dtype is torch.uint8 else 1) for o, p in zip(offsets, params, strict=True)
            ]
            requantize_(params, self.seeds, self.coeffs, low=low, high=high, **options)
        elif self.rule is None or self.hyper is None:
            combine_(params, self.seeds, self.coeffs, **options)
        else:
            states = {"first": pick(self.first), "second": pick(self.second)}
            update_(params, self.rule, self.hyper, self.seeds, self.coeffs, **states, **options)

    def _run_noise(self, noise: Noise, params: list[Tensor], streams: list[int]) -> None:
        if self.measures:
            return noise.measure(params)
        members = Members(params, streams, cast("Dist", self.dist))
        options: dict[str, Any] = {
            "decay": self.decay, "rounding": self.rounding, "rounding_seed": self.rounding_seed
        }  # fmt: skip
        if self.rule is None or self.hyper is None:
            return noise.update(members, self.seeds, self.coeffs, **options)
        for key, states in (("first", self.first), ("second", self.second)):
            if states:
                options[key] = [states[id(p)] for p in params]
        noise.step(members, self.rule, self.hyper, self.seeds, self.coeffs, **options)


def raising(members: Members, minimum: Tensor) -> Pass:
    """The pass that does what :meth:`Noise.raise_to` does."""
    none = torch.empty(0, dtype=torch.int64), torch.empty(0)
    return Pass(*none, members.dist, None, "nearest", None, minimum=minimum.clone())


class _Work:
    """Passes that all packs of some parameters take, and how many of them each pack has had."""

    def __init__(self, passes: Sequence[Pass], params: Sequence[tuple[Tensor, int]]) -> None:
        self.passes, self.device = passes, params[0][0].device
        self.packs = list(packs(params))
        self.done = [0] * len(self.packs)


class DeferredNoise(Noise):
    """Dense noise whose moves and updates wait for :meth:`apply`.

    The bits are those of the passes one by one: every element takes the same operations in the same order.
    An :meth:`apply` that is interrupted between two calls of a kernel is gone on with by the next one.
    """

    def __init__(self) -> None:
        self._passes: dict[int, list[Pass]] = {}
        self._params: dict[int, tuple[Tensor, int]] = {}
        self._work: list[_Work] = []

    def put(self, params: Sequence[Tensor], streams: Sequence[int], one: Pass) -> None:
        """Adds a pass to those that ``params`` wait for."""
        for p, stream in zip(params, streams, strict=True):
            self._params[id(p)] = p, stream
            self._passes.setdefault(id(p), []).append(one)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        params, streams, dist, _ = members
        self.put(params, streams, Pass(seeds, coeffs.clone(), dist, None, "nearest", None))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        params, streams, dist, _ = members
        # The rule may go on writing to the tensors that it gave (a window's seeds), so they are copied.
        self.put(params, streams, Pass(seeds.clone(), coeffs.clone(), dist, **options))

    def raise_to(self, members: Members, minimum: Tensor) -> None:
        self.put(members.params, members.streams, raising(members, minimum))

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        for state in {"first", "second"} & options.keys():
            options[state] = {id(p): t for p, t in zip(members.params, options[state], strict=True)}
        self.update(members, seeds, coeffs, rule=rule, hyper=hyper.clone(), **options)

    def drain(self) -> Iterator[tuple[list[tuple[Tensor, int]], list[Pass]]]:
        """Parameters with their streams, and the passes that they wait for.  Afterwards nothing waits."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for key, passes in self._passes.items():
            param, _ = self._params[key]
            alike.setdefault((param.dtype, param.device, *map(id, passes)), []).append(key)
        for keys in alike.values():
            yield [self._params[key] for key in keys], self._passes[keys[0]]
        self._passes, self._params = {}, {}

    def apply(self, done: Callable[[int], object], fold: bool = False) -> None:
        """Runs all passes that wait.

        Args:
            done: called with the number of elements that are finished.
            fold: multiply the coefficients by the decays of later passes, so that there is one sum
                (:func:`folded`).  It has fewer roundings, and so not the bits of the passes one by one.
        """
        self._work += [
            _Work(list(fuse(folded(passes) if fold else passes, params[0][0].dtype)), params)
            for params, passes in self.drain()
        ]
        while self._work:
            work = self._work[0]
            left = [i for i, count in enumerate(work.done) if count < len(work.passes)]
            for elements in _each(functools.partial(_run, work), left, work.device):
                done(elements)
            del self._work[0]


def _run(work: _Work, index: int) -> int:
    """Runs the passes that the pack of that number has not had; returns the number of elements."""
    pieces = work.packs[index]
    flat = [p.detach().view(-1)[begin:end] for p, _, begin, end in pieces]
    pick = lambda states: [states[id(p)].view(-1)[begin:end] for p, _, begin, end in pieces] if states else ()
    for one in work.passes[work.done[index] :]:
        one.run(flat, [stream for _, stream, _, _ in pieces], [begin for _, _, begin, _ in pieces], pick)
        work.done[index] += 1
    return sum(t.numel() for t in flat)


def _each(work: Callable[[int], int], items: Iterable[int], device: torch.device) -> Iterator[int]:
    """The result of ``work`` for each of ``items``, the numbers of packs.

    With the CPU library each thread takes whole packs.  Threads that shared each call would wait for one
    another at its end, and a step of 22 M weights is 22 calls.
    """
    if select(device.type).name != "cpu" or (threads := torch.get_num_threads()) == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        running = [pool.submit(copy_context().run, work, item) for item in items]
        for future in as_completed(running):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # torch gives the last value set to the threads that come later


def packs(params: Sequence[tuple[Tensor, int]]) -> Iterator[Pack]:
    """Packs of one piece's size: a part of a large parameter, or several small parameters."""
    limit, room = _PIECE[params[0][0].device.type], 0
    pack: Pack = []
    for p, stream in params:
        for begin in range(0, p.numel(), limit):
            end = min(begin + limit, p.numel())
            if end - begin > room:
                if pack:
                    yield pack
                pack, room = [], limit
            pack.append((p, stream, begin, end))
            room -= end - begin
    if pack:
        yield pack


def folded(passes: Sequence[Pass]) -> list[Pass]:
    """The passes with one decay, at the beginning; the factors are multiplied in float64.

    d_2 (d_1 theta + c_1 z_1) + c_2 z_2   becomes   d_1 d_2 theta + c_1 d_2 z_1 + c_2 z_2
    """
    result, later = [], 1.0
    for one in reversed(passes):
        result.append(one._replace(coeffs=(later * one.coeffs.double()).float(), decay=None))
        later *= 1.0 if one.decay is None else float(one.decay)
    result.reverse()
    if passes:
        result[0] = result[0]._replace(decay=torch.tensor([later], device=passes[0].coeffs.device))
    return result


def fuse(passes: Sequence[Pass], dtype: torch.dtype) -> Iterator[Pass]:
    """Joins passes, so that there are fewer of them, and all bits stay the same.

    fp32 weights are the accumulator of a combine themselves, so its chain of fmas may go on beyond the end of
    a step.  A decay begins a new pass, and so does a rule with a state.
    """
    run: list[Pass] = []
    for one in passes:
        plain = dtype is torch.float32 and one.is_combine and one.decay is None
        joins = plain and run and run[0].is_combine and one.dist == run[0].dist
        if not joins or sum(len(p.seeds) for p in (*run, one)) > _FUSED:
            yield from _joined(run)
            run = []
        run.append(one)
    yield from _joined(run)


def _joined(run: list[Pass]) -> Iterator[Pass]:
    """One pass with the directions of all of ``run``, which rounds nothing because its weights are fp32."""
    if len(run) < 2:
        yield from run
        return
    seeds, coeffs = torch.cat([p.seeds for p in run]), torch.cat([p.coeffs for p in run])
    yield run[0]._replace(seeds=seeds, coeffs=coeffs, rounding="nearest", rounding_seed=None)
