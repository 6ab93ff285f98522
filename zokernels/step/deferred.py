"""Passes over the weights that are put off, then run piece by piece: a piece stays in the cache for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.registry import select
from ..functional import Rule as KernelRule
from ..functional import combine_, update_
from .noise import Members, Noise

#: Elements of a piece: 4 MiB of fp32 a thread, which stay in the last-level cache.  400 steps of 22.6 M weights on two
#: cores with 1 MiB of L2 each and 32 MiB of L3, seconds with 2^18 (L2; calls dominate), 2^20 and 2^21: fp32 normal with
#: decay 2.8, 1.9, 1.6; bf16 Rademacher 1.8, 1.1, 1.0; fp32 Rademacher with decay 2.5, 0.7, 0.6.  On a GPU, 32 MiB.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 23}
#: Directions of one fused call.  Rademacher, fp32: 0.073 ns an element and direction with 16, 0.027 with 64, 0.087 with
#: 1,000, whose signs leave the first-level cache.
_FUSED = 64


#: (parameter, stream, begin, end) of each piece that is taken together.
Pack = list[tuple[Tensor, int, int, int]]


class Pass(NamedTuple):
    """One combine_, or one update_ where there is a rule."""

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

    def run(self, params: list[Tensor], streams: list[int], offsets: list[int], pick: Callable[..., Any]) -> None:
        """``pick``: the pieces of states that belong to ``params``."""
        noise: dict[str, Any] = {"streams": streams, "offsets": offsets, "dist": self.dist}
        rounding: dict[str, Any] = {"decay": self.decay, "rounding": self.rounding, "rounding_seed": self.rounding_seed}
        if self.rule is None or self.hyper is None:
            combine_(params, self.seeds, self.coeffs, **noise, **rounding)
        else:
            states = {"first": pick(self.first), "second": pick(self.second)}
            update_(params, self.rule, self.hyper, self.seeds, self.coeffs, **states, **noise, **rounding)


class DeferredNoise(Noise):
    """Dense noise whose moves and updates wait for :meth:`apply`.

    The bits are those of the passes one by one: every element takes the same operations in the same order.
    """

    def __init__(self) -> None:
        self._passes: dict[int, list[Pass]] = {}
        self._params: dict[int, tuple[Tensor, int]] = {}

    def _add(self, members: Members, one: Pass) -> None:
        for p, stream in zip(members.params, members.streams, strict=True):
            self.put(p, stream, one)

    def put(self, param: Tensor, stream: int, one: Pass) -> None:
        self._params[id(param)] = param, stream
        self._passes.setdefault(id(param), []).append(one)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        self._add(members, Pass(seeds, coeffs.clone(), members.dist, None, "nearest", None))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        # A rule may go on writing to the tensors that it gave (a window's seeds).
        self._add(members, Pass(seeds.clone(), coeffs.clone(), members.dist, **rounding))

    def step(
        self,
        members: Members,
        rule: KernelRule,
        hyper: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        **states_and_rounding: Any,
    ) -> None:
        rounding: dict[str, Any] = {key: states_and_rounding.pop(key) for key in ("decay", "rounding", "rounding_seed")}
        of = lambda tensors: {id(p): t for p, t in zip(members.params, tensors, strict=True)}
        states: dict[str, Any] = {key: of(tensors) for key, tensors in states_and_rounding.items()}
        update: dict[str, Any] = {"rule": rule, "hyper": hyper.clone(), **states}
        self._add(members, Pass(seeds.clone(), coeffs.clone(), members.dist, **rounding, **update))

    def drain(self) -> Iterator[tuple[list[tuple[Tensor, int]], list[Pass]]]:
        """Parameters with their streams, and the passes that each of them waits for; then nothing waits."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for key, passes in self._passes.items():
            kind = self._params[key][0]
            alike.setdefault((kind.dtype, kind.device, *map(id, passes)), []).append(key)
        for keys in alike.values():
            yield [self._params[key] for key in keys], self._passes[keys[0]]
        self._passes, self._params = {}, {}

    def apply(self, done: Callable[[int], object], fold: bool = False) -> None:
        """Run the passes.  ``done``: called with the number of elements that are finished.

        ``fold``: with the decays of later passes in the coefficients of the earlier ones, so that there is one sum.
        """
        for params, passes in self.drain():
            fused = list(fuse(folded(passes) if fold else passes, params[0][0].dtype))
            for elements in _each(functools.partial(_run, fused), packs(params), params[0][0].device):
                done(elements)


def _run(passes: Sequence[Pass], pieces: Pack) -> int:
    """The number of elements."""
    flat = [p.detach().view(-1)[begin:end] for p, _, begin, end in pieces]
    pick = lambda states: [states[id(p)].view(-1)[begin:end] for p, _, begin, end in pieces] if states else ()
    for one in passes:
        one.run(flat, [stream for _, stream, _, _ in pieces], [begin for _, _, begin, _ in pieces], pick)
    return sum(t.numel() for t in flat)


def _each(work: Callable[[Pack], int], items: Iterable[Pack], device: torch.device) -> Iterator[int]:
    """``work`` of each pack.  With the CPU library a thread takes whole packs: threads that share each call wait for
    one another at its end, and 22 M weights are 22 calls a step."""
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
    """Parts of large parameters, or several small ones, of a piece together."""
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
    """theta = d_2 (d_1 theta + c_1 z_1) + c_2 z_2 as d_1 d_2 theta + c_1 d_2 z_1 + c_2 z_2; factors in float64."""
    result, later = [], 1.0
    for one in reversed(passes):
        result.append(one._replace(coeffs=(later * one.coeffs.double()).float(), decay=None))
        later *= 1.0 if one.decay is None else float(one.decay)
    result.reverse()
    if passes:
        result[0] = result[0]._replace(decay=torch.tensor([later], device=passes[0].coeffs.device))
    return result


def fuse(passes: Sequence[Pass], dtype: torch.dtype) -> Iterator[Pass]:
    """The same bits in fewer passes: fp32 weights are the accumulator itself, so a chain of fmas may go over the end of
    a step.  A decay begins a new pass, as does a rule with state."""
    run: list[Pass] = []
    for one in passes:
        joins = dtype is torch.float32 and run and one.rule is None and one.decay is None and run[0].rule is None
        if not joins or one.dist != run[0].dist or sum(len(p.seeds) for p in run) + len(one.seeds) > _FUSED:
            yield from _joined(run)
            run = []
        run.append(one)
    yield from _joined(run)


def _joined(run: list[Pass]) -> Iterator[Pass]:
    if len(run) == 1:
        yield run[0]
    elif run:
        yield run[0]._replace(
            seeds=torch.cat([p.seeds for p in run]),
            coeffs=torch.cat([p.coeffs for p in run]),
            rounding="nearest",
            rounding_seed=None,
        )
