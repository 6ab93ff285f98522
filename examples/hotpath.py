"""What a step costs besides its forwards, and whether it leaves the weights as they were."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokernels import combine, combine_
from zokernels.bench import timing
from zokernels.bench.baselines import mezo_step
from zokernels.optim import ZOSGD


def bits(weights: Tensor) -> Tensor:
    return weights.detach().view({4: torch.int32, 2: torch.int16}[weights.element_size()])


def leaves(model: nn.Module) -> list[list[Tensor]]:
    """The parameters by the module that owns them.

    One function of the forward takes its weight and bias together.
    """
    return [params for m in model.modules() if (params := list(m.parameters(recurse=False)))]


def combines(groups: list[list[Tensor]]) -> Callable[[], None]:
    """The combine calls of one ZOSGD step with exact restore, and nothing else.

    For each sign they write theta + sign * eps * z of one module after the other into the same scratch.  Then
    one call updates all weights.  A test compares these calls with those that ZOSGD makes."""
    params = [p.detach() for group in groups for p in group]
    seed = torch.ones(1, dtype=torch.int64, device=params[0].device)
    plus, minus, update = (seed.float() * c for c in (1e-3, -1e-3, 1e-6))
    scratch = params[0].new_empty(max(sum(p.numel() + 64 for p in group) for group in groups))
    forward, first = [], 0
    for group in groups:
        out, at = [], 0
        for p in group:
            out.append(scratch.narrow(0, at, p.numel()).view_as(p))
            at += -(-p.numel() // 64) * 64
        forward.append((out, [p.detach() for p in group], list(range(first, first + len(group)))))
        first += len(group)

    def call() -> None:
        for coeff in (plus, minus):
            for out, theta, streams in forward:
                combine(out, theta, seed, coeff, streams=streams)
        combine_(params, seed, update, streams=range(len(params)))

    return call


def touch(groups: list[list[Tensor]]) -> Callable[[], float]:
    """A closure that passes every parameter to a torch function, as a forward does, and computes nothing.

    ``atleast_1d`` returns its arguments, so all that happens is that the exact probe writes the perturbed
    weights."""

    def closure() -> float:
        for params in groups:
            torch.atleast_1d(*params)
        return 0.0

    return closure


@dataclass(frozen=True)
class HotPath:
    """The milliseconds of a step without its forwards, over all weights of the model: medians, with one
    thread.
    """

    combines: float  #: the combine calls of ZOSGD with exact restore
    optimizer: float  #: the same inside the real ZOSGD.step, its Python included
    eager: float  #: MeZO's eager loop: +eps, -2 eps, +eps, update

    @property
    def speedup(self) -> float:
        return self.eager / self.combines


def measure(model: nn.Module, rounds: int = 9) -> HotPath:
    """Times the three forms in turns, on copies of the weights."""
    ours, optimized, theirs = (
        copy.deepcopy(model),
        copy.deepcopy(model),
        [p.detach().clone() for p in model.parameters()],
    )
    optimizer, closure = ZOSGD(optimized.named_parameters(), lr=1e-6), touch(leaves(optimized))
    calls = {
        "combines": combines(leaves(ours)),
        "optimizer": lambda: optimizer.step(closure),
        "eager": lambda: mezo_step(theirs, 1e-3, 1e-6, 1.0, seed=1),
    }
    device, threads = theirs[0].device.type, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            # The closure only touches the weights: its losses are all 0, of which the optimizer warns.
            warnings.filterwarnings("ignore", "ZOSGD: g was exactly 0", UserWarning)
            times = timing.measure(calls, device, seconds=0.0, min_rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    return HotPath(**{name: t.p50 * 1e3 for name, t in times.items()})


class _Interrupted(Exception):
    pass


def restored_exactly(model: nn.Module, loss: Callable[[nn.Module], Tensor], dtype: torch.dtype) -> bool:
    """Whether every bit of every weight survives two steps with lr = 0 and one whose closure raises.

    The weights are converted to ``dtype`` before.
    """
    model = copy.deepcopy(model).to(dtype)
    now = lambda: [bits(p).clone() for p in model.parameters()]
    before, calls = now(), 0

    def raising() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise _Interrupted
        return loss(model)

    optimizer = ZOSGD(model.named_parameters(), lr=0.0)
    for _ in range(2):
        optimizer.step(lambda: loss(model))
    with contextlib.suppress(_Interrupted):
        ZOSGD(model.named_parameters(), lr=1e-3).step(raising)
    return calls == 2 and all(torch.equal(a, b) for a, b in zip(before, now(), strict=True))
