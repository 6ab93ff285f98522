"""Methods whose steps are not a change of the same weights: what is timed and trained for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.blackbox import BlackBox
from zokernels.optim import ForwardGradient
from zokernels.quantize import named_integers, named_scales, quantize_

from .. import timing
from ..registry import Row
from . import eager, hotpath
from .catalog import Method
from .hotpath import losses
from .train import Curve, batches, curve_of, digits, train


@dataclass(frozen=True)
class Task:
    """``steps`` gives one call of ours and one of the eager form, to be timed; ``train`` gives the loss by
    forwards.
    """

    steps: Callable[[Method], tuple[Callable[[], object], Callable[[], object]]]
    train: Callable[[Method, int], Curve]

    def measure(self, method: Method, seconds: float) -> Row:
        ours, theirs = self.steps(method)
        times = timing.measure({"zokernels": ours, "eager": theirs}, "cpu", seconds, min_rounds=3)
        found = {name: t.p20 for name, t in times.items()}
        ratio = found["eager"] / found["zokernels"]
        return {"seconds": found["zokernels"], "eager_seconds": found["eager"], "ratio": ratio}


# Forward gradients: the forward is part of the step, so both are timed with it --------------------


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


# Directions from activations: the hooks belong to the forward, so both are timed with it -----------


def _activation_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    model, x, y = _deep()
    other, _, _ = _deep()
    x, y = x.expand(32, -1) + torch.randn(32, 1), y.expand(32, -1)
    optimizer = method.make(list(model.named_parameters()), 1e-9, model)
    loop = eager.Activations(list(other.named_parameters()), lr=1e-9, model=other)
    return (lambda: optimizer.step(lambda: F.mse_loss(model(x), y))), (
        lambda: loop.step(lambda: F.mse_loss(other(x), y).item())
    )


# Directions from an estimated gradient: timed between two of its estimates -------------------------


def _space_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    ours, theirs = (hotpath.parameters(torch.bfloat16, "cpu", 0.25) for _ in range(2))
    optimizer, closure = method.make(ours, 1e-6), losses()
    loop = eager.GradientSpace(theirs, lr=1e-6)
    touched = lambda: sum(p.reshape(-1)[:1].sum() * 0.0 for _, p in ours) + closure()
    optimizer.step(touched)
    loop.step(closure)
    return (lambda: optimizer.step(touched)), (lambda: loop.step(closure))


# Products that are perturbed: what a step costs is beside its forwards, and in them ----------------

#: Rows that each forward has.
_ROWS = 64


def _product_calls(method: Method, scale: float) -> dict[str, Callable[[], object]]:
    """A step of ours, as many forwards of the weights as they are, and the eager form's own passes."""
    ours, theirs = (hotpath.parameters(torch.bfloat16, "cpu", scale) for _ in range(2))
    optimizer, number = method.make(ours, 1e-6), losses()
    (_, embed), *rest = ours
    index = torch.randint(len(embed), (_ROWS,))

    def forward() -> Tensor:
        x = wide = F.embedding(index, embed)
        for name, weight in rest:
            if weight.dim() == 1:
                x = x * weight
            elif "up" in name:
                wide = F.linear(x, weight)
            elif "down" in name:
                x = x + F.linear(wide, weight)
            else:
                x = x + F.linear(x, weight)
        return x[0, 0] * 0.0 + number()

    @torch.no_grad()
    def plain() -> None:
        for _ in range(int(method.forwards)):
            forward()

    assert method.eager is not None  # its catalogue has one
    kind, options = method.eager
    loop = kind(theirs, lr=1e-6, **options)
    step = lambda: optimizer.step(forward)
    return {"zokernels": step, "plain": plain, "eager": lambda: loop.step(number)}


class _Products(Task):
    """The time of our products less that of plain ones, against that of the eager form, which has none."""

    def measure(self, method: Method, seconds: float) -> Row:
        calls = _product_calls(method, 1.0 if seconds else 0.05)  # no seconds: whether it runs
        found = {name: t.p20 for name, t in timing.measure(calls, "cpu", seconds, min_rounds=3).items()}
        own = max(found["zokernels"] - found["plain"], 1e-9)
        return {"seconds": own, "eager_seconds": found["eager"], "ratio": found["eager"] / own}


def _product_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    calls = _product_calls(method, 0.05)
    return calls["zokernels"], calls["eager"]


# A black box behind a trained encoder -------------------------------------------------------------

_QUERIES, _MU = 16, 1e-2


def _black_box_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32)
    f = lambda rows: rows.flatten(1)[:, 0]  # it costs nothing, so that the noise of the queries is timed
    cge = "cge" in method.use
    small = x[:, :1, :16, :16].contiguous() if cge else x
    box = BlackBox(f, estimator="cge" if cge else "rge", queries=_QUERIES, mu=_MU)
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
    mixed = torch.randn(64, 64) / 8  # the encoder has to undo this
    encoder, batch = nn.Linear(64, 64), batches(0)

    @torch.no_grad()
    def f(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(classifier(rows), labels, reduction="none")

    cge = "cge" in method.use
    box = BlackBox(f, estimator="cge" if cge else "rge", queries=_QUERIES, mu=_MU)
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


# Quantised weights --------------------------------------------------------------------------------

_SIZE = 16 << 20  # so many integers have the timed tensors


def _pretrained(bits: int) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]], Callable[[], float]]:
    """A network trained on rotated images of digits and quantised, which is to be adapted to upright ones."""
    torch.manual_seed(0)
    (x, y), batch = digits(), batches(0)
    rotated = x.view(-1, 8, 8).transpose(1, 2).flatten(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    first = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        first.zero_grad()
        F.cross_entropy(model(rotated), y).backward()
        first.step()
    quantize_(model, bits=bits, group_size=16)

    @torch.no_grad()
    def loss() -> float:
        return F.cross_entropy(model(x), y).item()

    return model, batch, loss


def _quantized_train(method: Method, budget: int) -> Curve:
    integers = method.task == "integers"
    model, batch, loss = _pretrained(8 if integers else 4)
    named = named_integers(model) if integers else list(named_scales(model))
    optimizer = method.make(named, method.lr, eps=1.0 if integers else 1e-4)

    def step() -> None:
        rows, labels = batch()
        optimizer.step(lambda: F.cross_entropy(model(rows), labels))

    return curve_of(step, loss, method.forwards, budget, 50)


def _scale_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step on the scales of 64 layers, each of which has one for 128 weights."""
    make = lambda: [(f"layers.{i}.scale", nn.Parameter(torch.rand(4096, 8).bfloat16())) for i in range(64)]
    optimizer = method.make(make(), 1e-9, restore="inplace", eps=1e-4)
    loop, closure = eager.Eager(make(), lr=1e-9, eps=1e-4), losses()
    return (lambda: optimizer.step(closure)), (lambda: loop.step(closure))


def _integer_steps(method: Method) -> tuple[Callable[[], object], Callable[[], object]]:
    """The closure touches the weights, because ours perturbs copies of what it touches."""
    # The passes of a population over as many integers would take minutes.
    size = _SIZE if method.forwards == 2 else _SIZE // 16
    make = lambda: [("w", torch.randint(-127, 128, (size,), dtype=torch.int8))]
    ours, theirs, number = make(), make(), losses()
    optimizer = method.make(ours, 1e-3, eps=1.0)
    assert method.eager is not None  # its catalogue has one
    kind, options = method.eager
    loop = kind(theirs, lr=1e-3, eps=1.0, **options)
    return (lambda: optimizer.step(lambda: ours[0][1][:1].sum() * 0.0 + number())), (
        lambda: loop.step(number)
    )


TASKS = {
    "scales": Task(_scale_steps, _quantized_train),
    "integers": Task(_integer_steps, _quantized_train),
    "forward": Task(_forward_steps, train),
    "activations": Task(_activation_steps, train),
    "space": Task(_space_steps, train),
    "products": _Products(_product_steps, train),
    "black box": Task(_black_box_steps, _black_box_train),
}
