"""What a step costs besides its forwards, and whether it leaves the weights as they were."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.baselines import mezo_step
from zokernels.optim import ZOSGD

_BITS = {4: torch.int32, 2: torch.int16}


def leaves(model: nn.Module) -> list[list[Tensor]]:
    """Parameters by the module that owns them: the weight and bias that one function of the forward takes together."""
    return [params for m in model.modules() if (params := list(m.parameters(recurse=False)))]


def touch(groups: list[list[Tensor]]) -> Callable[[], float]:
    """A closure that hands every parameter to a torch function, as a forward does, and computes nothing.

    ``atleast_1d`` returns its arguments: the exact probe writes each module's perturbed weights, and no more happens.
    """

    def closure() -> float:
        for params in groups:
            torch.atleast_1d(*params)
        return 0.0

    return closure


def measure(model: nn.Module, rounds: int = 7) -> tuple[float, float]:
    """Milliseconds of a step without its forwards: (ZOSGD with exact restore, MeZO's eager loop), medians, one thread.

    Ours is the real optimizer, its Python included: theta + eps z and theta - eps z into scratch, then the update.
    MeZO's is +eps, -2 eps, +eps and the update.  They run in turns on copies of all weights.
    """
    ours, theirs = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    optimizer, closure = ZOSGD(ours.named_parameters(), lr=1e-6), touch(leaves(ours))
    cuda = theirs[0].is_cuda
    calls = (lambda: optimizer.step(closure), lambda: mezo_step(theirs, 1e-3, 1e-6, 1.0, seed=1))
    times: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            for i in range(rounds + 1):
                for call, samples in zip(calls, times, strict=True):
                    if cuda:
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    call()
                    if cuda:
                        torch.cuda.synchronize()
                    if i:  # the first round warms up
                        samples.append((time.perf_counter() - start) * 1e3)
    finally:
        torch.set_num_threads(threads)
    ours_ms, theirs_ms = (sorted(t)[len(t) // 2] for t in times)
    return ours_ms, theirs_ms


class _Interrupted(Exception):
    pass


def restored_exactly(model: nn.Module, loss: Callable[[nn.Module], Tensor], dtype: torch.dtype) -> bool:
    """Whether every bit of every weight, as ``dtype``, survives two steps at lr = 0 and one whose closure raises."""
    model = copy.deepcopy(model).to(dtype)
    bits = lambda: [p.detach().view(_BITS[p.element_size()]).clone() for p in model.parameters()]
    before, calls = bits(), 0

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
    return calls == 2 and all(torch.equal(a, b) for a, b in zip(before, bits(), strict=True))
