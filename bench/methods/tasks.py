"""Methods whose steps are not a change of the same weights: what is timed and trained for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zokernels.blackbox import BlackBox

from zokernels.optim import ForwardGradient

from .. import timing
from ..registry import Row
from . import eager
from .catalog import Method
from .train import Curve, batches, curve_of, digits, train


@dataclass(frozen=True)
class Task:
    """``steps``: one call of ours and one of the eager form, to be timed; ``train``: loss against forwards."""

    steps: Callable[[Method], tuple[Callable[[], object], Callable[[], object]]]
    train: Callable[[Method, int], Curve]

    def measure(self, method: Method, seconds: float) -> Row:
        ours, theirs = self.steps(method)
        times = timing.measure({"zokernels": ours, "eager": theirs}, "cpu", seconds, min_rounds=3)
        found = {name: t.p20 for name, t in times.items()}
        ratio = found["eager"] / found["zokernels"]
        return {"seconds": found["zokernels"], "eager_seconds": found["eager"], "ratio": ratio}


# Forward gradients: the forward is part of the step, so both are timed with it --------------------------------------


def _deep(width: int = 512, depth: int = 12) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers), torch.randn(1, width), torch.randn(1, width)


def _forward_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    model, x, y = _deep()
    optimizer = ForwardGradient(model.named_parameters(), lr=1e-9)
    other, _, _ = _deep()
    parameters = {name: p.detach() for name, p in other.named_parameters()}
    loss = lambda p: F.mse_loss(torch.func.functional_call(other, p, (x,)), y)
    step, count = eager.forward_gradient(loss, parameters, 1e-9), iter(range(1 << 30))
    return (lambda: optimizer.step(lambda: F.mse_loss(model(x), y))), (lambda: step(next(count)))


# A black box behind a trained encoder ---------------------------------------------------------------------------------

_QUERIES, _MU = 16, 1e-2


def _black_box_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32)
    f = lambda rows: rows.flatten(1)[:, 0]  # costs nothing: what is timed is the queries' noise
    cge = "cge" in method.use
    small = x[:, :1, :16, :16].contiguous() if cge else x
    box = BlackBox(f, estimator="cge" if cge else "rge", queries=_QUERIES, mu=_MU, max_batch=1 << 16)
    leaf = small.clone().requires_grad_()

    def ours() -> None:
        leaf.grad = None
        box(leaf).sum().backward()

    if cge:
        return ours, lambda: eager.black_box_coordinates(f, small, _MU)
    return ours, lambda: eager.black_box(f, x, _MU, _QUERIES)


def _black_box_train(method: Method, budget: int) -> Curve:
    """A linear encoder in front of a fixed classifier of digits, which only answers queries."""
    torch.manual_seed(0)
    x, y = digits()
    classifier = nn.Linear(64, 10)
    first = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for _ in range(300):
        first.zero_grad()
        F.cross_entropy(classifier(x), y).backward()
        first.step()
    mixed = torch.randn(64, 64) / 8  # what the encoder has to undo
    encoder, batch = nn.Linear(64, 64), batches(0)

    @torch.no_grad()
    def f(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(classifier(rows), labels, reduction="none")

    cge = "cge" in method.use
    box = BlackBox(f, estimator="cge" if cge else "rge", queries=_QUERIES, mu=_MU, max_batch=1 << 16)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=method.lr)

    def step() -> None:
        rows, labels = batch()
        optimizer.zero_grad()
        box(encoder(rows @ mixed), labels).mean().backward()
        optimizer.step()

    @torch.no_grad()
    def loss() -> float:
        return f(encoder(x @ mixed), y).mean().item()

    return curve_of(step, loss, method.forwards, budget, 50)


TASKS = {
    "forward": Task(_forward_steps, train),
    "black box": Task(_black_box_steps, _black_box_train),
}
