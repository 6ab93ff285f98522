"""The time of a step without its forwards, of ours and of the eager form in turns, on the same shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from .. import timing
from ..registry import Row
from .catalog import Method

#: A transformer of 8 layers and width 512.  It has 29 M weights, 59 MB in bf16.
WIDTH, LAYERS, VOCABULARY = 512, 8, 8192


def parameters(dtype: torch.dtype, device: str, scale: float) -> list[tuple[str, nn.Parameter]]:
    """The named weights of a decoder whose width is multiplied by ``scale``."""
    width = max(16, int(WIDTH * scale) // 16 * 16)
    shapes = {"embed.weight": (max(64, int(VOCABULARY * scale)), width)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.attention.{name}.weight": (width, width) for name in "qkvo"}
        shapes |= {f"layers.{i}.up.weight": (4 * width, width), f"layers.{i}.down.weight": (width, 4 * width)}
        shapes |= {f"layers.{i}.norm.weight": (width,)}
    make = lambda shape: nn.Parameter((torch.randn(shape) * 0.02).to(dtype).to(device))
    return [(name, make(shape)) for name, shape in shapes.items()]


def losses() -> Callable[[], float]:
    """A closure that costs nothing.  It returns numbers near 1 that differ, so that no step has a g of 0."""
    numbers = itertools.cycle(
        1 + 1e-4 * torch.randn(1009, generator=torch.Generator().manual_seed(0)).double().numpy()
    )
    return lambda: float(next(numbers))


def run_of(method: Method, dtype: torch.dtype, device: str, scale: float) -> tuple[Callable[[], None], ...]:
    """One step of ours and one of the eager form.  Ours restores in place, so that both write the weights."""
    torch.manual_seed(0)
    ours, theirs = parameters(dtype, device, scale), parameters(dtype, device, scale)
    lr = 1e-6
    optimizer = method.make(ours, lr, **({"restore": "inplace"} if method.inplace else {}))
    closure = losses()
    kind, options = method.eager
    loop = kind(theirs, lr=lr, **options)
    return (lambda: optimizer.step(closure)), (lambda: loop.step(closure))


def measure(method: Method, dtype: torch.dtype, device: str, scale: float, seconds: float) -> Row:
    """The times of both (p20, in seconds) and their ratio."""
    ours, theirs = run_of(method, dtype, device, scale)
    times = timing.measure({"zokernels": ours, "eager": theirs}, device, seconds, min_rounds=3)
    return {
        "seconds": times["zokernels"].p20,
        "eager_seconds": times["eager"].p20,
        "ratio": times["eager"].p20 / times["zokernels"].p20,
        "rounds": times["zokernels"].rounds,
    }


def weights(scale: float) -> int:
    return sum(p.numel() for _, p in parameters(torch.bfloat16, "cpu", scale))
