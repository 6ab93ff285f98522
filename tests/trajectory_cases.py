"""Runs of every optimizer for the tests of logs."""

from __future__ import annotations

import random

import torch
from torch import nn

import zokernels
from zokernels import optim
from zokernels.optim import (
    FZOO,
    LOZO,
    PGAP,
    QES,
    ZOBCD,
    ZOSGD,
    LeZO,
    QuZO,
    RandomMask,
    SparseMeZO,
    Sphere,
    SubZero,
    TensorScale,
    ZerothOrder,
    ZORankSGD,
)

SHAPES = {
    "embed.w": (23, 10),
    "layers.0.w": (5, 3, 2),
    "layers.0.b": (7,),
    "layers.1.w": (4, 9),
    "layers.2.w": (3, 3),
    "head": (301,),
}

#: Optimizers by name: class and arguments.  Every class of zokernels.optim that keeps a log is here, at least
#: with its defaults; QuZO and QES, whose weights are integers, have tests of their own.
CASES: dict[str, tuple[type, dict]] = {
    "directions": (ZOSGD, {"directions": 3}),
    "momentum": (ZOSGD, {"momentum": 0.9}),
    "window": (ZOSGD, {"momentum": 0.9, "window": 3}),
    "one-sided": (ZOSGD, {"directions": 2, "estimator": "one-sided"}),
    "rademacher": (ZOSGD, {"dist": "rademacher"}),
    "fzoo": (FZOO, {"directions": 3}),
    "ranking": (ZORankSGD, {"candidates": 4, "top": 2}),
    "sparse": (SparseMeZO, {"density": 0.4, "refresh": 2}),
    "random mask": (ZOSGD, {"direction": RandomMask(0.3, 2)}),
    "sphere": (ZOSGD, {"direction": Sphere(), "directions": 2}),
    "rms": (ZOSGD, {"direction": TensorScale("rms", 2)}),
    "variance": (ZOSGD, {"direction": TensorScale("variance")}),
    "layers": (LeZO, {"skipped": 0.5}),
    "blocks": (ZOBCD, {"order": "random", "period": 2}),
    "kept": (LOZO, {"rank": 2, "interval": 3}),
    "subspace": (SubZero, {"rank": 2, "interval": 3}),
}
for _name, _class in vars(optim).items():
    known = isinstance(_class, type) and issubclass(_class, ZerothOrder) and _class.replayable
    if known and _class not in (ZerothOrder, QuZO, QES):
        CASES[_name] = (_class, {"rank": 2} if _class in (SubZero, PGAP) else {})


class Model(nn.Module):
    """A model of weights by name, and a loss of each that is not convex."""

    def __init__(self, dtype: torch.dtype, rng: random.Random) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        for name, shape in SHAPES.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            setattr(module, last, nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)))

    def loss(self, step: int) -> torch.Tensor:
        parts = [(p.float() * (1 + 0.1 * step)).sin().square().sum() for p in self.parameters()]
        return torch.stack(parts).sum()


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(
    optimizer: ZerothOrder, model: Model, steps: int, losses: dict[int, float] | None = None
) -> list[dict]:
    """Takes steps with a schedule of lr, and returns the weights after each.

    ``losses`` take the place of those of the model.
    """
    history = []
    for _ in range(steps):
        step = optimizer.step_count
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        forced = (losses or {}).get(step)
        optimizer.step(lambda: model.loss(step) * (1.0 if forced is None else forced))  # noqa: B023
        history.append(base_of(model))
    return history


def assert_same(got: dict, want: dict, note: str = "") -> None:
    assert got.keys() == want.keys()
    for name in want:
        kind = torch.int32 if want[name].dtype is torch.float32 else torch.int16
        wrong = (got[name].view(kind) != want[name].view(kind)).sum().item()
        assert not wrong, f"{note}: {wrong} of {want[name].numel()} weights of {name} differ"


def record_with_cpu(path, name: str, dtype: torch.dtype, rng: random.Random, steps: int = 5, **options):
    """Runs with the compiled CPU library and records at ``path``.

    Returns the base weights, the weights after each step, and the optimizer.
    """
    make, own = CASES[name]
    model = Model(dtype, rng)
    base = base_of(model)
    with zokernels.backend("cpu"):
        optimizer = make(
            model.named_parameters(), lr=0.05, seed=rng.getrandbits(63), trajectory=path, **{**own, **options}
        )
        history = run(optimizer, model, steps)
    optimizer.trajectory.close()
    return base, history, optimizer
