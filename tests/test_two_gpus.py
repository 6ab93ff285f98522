"""Every operation on a GPU that is not the current one: it launches there, and the current one stays current.

The same calls run on the CPU where there is no GPU, so that they are right where they are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import test_fan_out
import test_low_rank
import test_rows
import test_spread
import torch
from helpers import assert_same_bits, check_backend, moved, placed, random_call
from ptx_cases import OPERATIONS, random_combine

import zokernels


def _checked(run: Callable, make: Callable) -> Callable:
    return lambda rng, device: check_backend(run, make(rng), device)


def _fan_out(rng, device: str) -> None:
    test_fan_out.check(*random_call(rng, max_size=900, count=1), rng, device)


def _many(rng) -> dict:
    """More tensors than a small kernel argument holds, so that the device is asked how large one may be."""
    return random_combine(rng, sizes=[1 + rng.randrange(50) for _ in range(70)], count=1)


def _derive_seed(rng, device: str) -> None:
    seeds = lambda: torch.tensor([[3, -7, 2**62]], device=device)
    found = zokernels.derive_seed(seeds(), seeds(), seeds())
    with zokernels.backend("reference"):
        expected = zokernels.derive_seed(seeds().cpu(), seeds().cpu(), seeds().cpu())
    assert torch.equal(found.cpu(), expected)


def _plan(rng, device: str) -> None:
    """Three calls, of which the second and the third take a table."""
    buffers, parts, kwargs = random_call(rng, max_size=900, count=2)
    places = {name: kwargs.pop(name) for name in ("streams", "offsets")}
    theirs, ours, kwargs = moved(buffers, "cpu"), moved(buffers, device), moved(kwargs, device)
    kept = zokernels.plan(placed(ours, parts), **places)
    for _ in range(3):
        zokernels.combine_(kept, **kwargs)
        with zokernels.backend("reference"):
            zokernels.combine_(placed(theirs, parts), **places, **moved(kwargs, "cpu"))
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b)


#: What takes a generator and a device.
CALLS: dict[str, Callable] = {
    **{name: _checked(run, make) for name, (run, make) in OPERATIONS.items() if name != "combine"},
    "combine": _checked(OPERATIONS["combine"][0], functools.partial(random_combine, max_size=900)),
    "combine, many tensors": _checked(OPERATIONS["combine"][0], _many),
    "rows": _checked(test_rows.run, test_rows.random_rows),
    "spread": _checked(test_spread.run, test_spread.random_spread),
    "low_rank": _checked(test_low_rank.run, test_low_rank.random_low_rank),
    "fan_out": _fan_out,
    "derive_seed": _derive_seed,
    "plan": _plan,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right_on_the_cpu(rng, name):
    with zokernels.backend("cpu"):
        CALLS[name](rng, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_that_is_not_the_current_one(rng, name, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    with zokernels.backend(backend):
        CALLS[name](rng, f"cuda:{torch.cuda.device_count() - 1}")
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_two_gpus_in_turns(backend):
    """Calls on both, none of which waits: each takes its own device's stream and its own device's answers."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = [torch.zeros(70_001) for _ in range(2)]
    there = [t.to(f"cuda:{i}") for i, t in enumerate(expected)]
    for step in range(5):
        for i in range(2):
            zokernels.combine_(expected[i], 7 + i, 0.5, streams=step)
            with zokernels.backend(backend):
                zokernels.combine_(there[i], 7 + i, 0.5, streams=step)
    for a, b in zip(there, expected, strict=True):
        assert torch.equal(a.cpu(), b)
