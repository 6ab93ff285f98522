"""The tasks: a model, batches of its training data, and what is held out for the search and for the end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.train import BATCH, EPS, Network


@dataclass(frozen=True)
class Run:
    """What one training of a task needs."""

    model: nn.Module
    #: Names and parameters that are trained.
    named: list[tuple[str, Tensor]]
    #: The loss on the next batch, as a function without arguments.
    closures: Iterator[Callable[[], Tensor]]
    #: Loss and accuracy on what is held out: for the search of step sizes, or for the end.
    held_out: Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    #: Forwards of each training.
    budget: int
    eps: float
    #: A run of a seed; with ``search`` what is held out is not that of the end.
    start: Callable[[int, bool], Run]


@functools.cache
def _digits() -> tuple[tuple[Tensor, Tensor], ...]:
    """Training, search and end: 1,197, 240 and 360 images, in one order for all runs."""
    from examples import digits

    (x, y), end = digits.load()
    return (x[:1197], y[:1197]), (x[1197:], y[1197:]), end


def _digits_run(seed: int, search: bool) -> Run:
    training, searched, end = _digits()
    torch.manual_seed(seed)
    model = Network()
    generator = torch.Generator().manual_seed(seed)

    def closures() -> Iterator[Callable[[], Tensor]]:
        while True:
            rows = torch.randint(len(training[0]), (BATCH,), generator=generator)
            x, y = training[0][rows], training[1][rows]
            yield lambda: F.cross_entropy(model(x), y)  # noqa: B023

    @torch.no_grad()
    def held_out() -> tuple[float, float]:
        x, y = searched if search else end
        out = model(x)
        return F.cross_entropy(out, y).item(), (out.argmax(1) == y).float().mean().item()

    return Run(model, list(model.named_parameters()), closures(), held_out)


@functools.cache
def _reviews() -> tuple[Any, ...]:
    from examples import reviews
    from examples.encoder import Classifier

    sentences = reviews.load()
    rest, end = reviews.split(sentences, min(400, len(sentences) // 4))
    training, searched = reviews.split(rest, min(300, len(rest) // 4), seed=1)
    model = Classifier()
    device = torch.device("cpu")
    some = reviews.Batcher(training[:400], model.tokenizer, 50, device).ordered()
    model.set_centre((b.ids, b.mask) for b in some)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    held = [reviews.Batcher(part, model.tokenizer, 50, device).ordered() for part in (searched, end)]
    return model, state, reviews.Batcher(training, model.tokenizer, 16, device), held


def _reviews_run(seed: int, search: bool, *, head: bool) -> Run:
    model, state, training, held = _reviews()
    model.load_state_dict(state)
    batches = training.forever(seed)
    named = [(n, p) for n, p in model.named_parameters() if head or not n.startswith("head.")]

    def closures() -> Iterator[Callable[[], Tensor]]:
        for batch in batches:
            yield lambda: F.cross_entropy(model(batch.ids, batch.mask), batch.labels)  # noqa: B023

    @torch.no_grad()
    def held_out() -> tuple[float, float]:
        outs = [(model(b.ids, b.mask), b.labels) for b in held[0 if search else 1]]
        out, labels = (torch.cat(parts) for parts in zip(*outs, strict=True))
        return F.cross_entropy(out, labels).item(), (out.argmax(1) == labels).float().mean().item()

    return Run(model, named, closures(), held_out)


_WHOLE, _FROZEN = "reviews, MiniLM of 22.6 M weights", "reviews, MiniLM with its head frozen"
TASKS = {
    task.name: task
    for task in (
        Task("digits", "digits, 6,538 weights from scratch", 4000, EPS, _digits_run),
        Task("reviews", _WHOLE, 2000, EPS, functools.partial(_reviews_run, head=True)),
        Task("reviews-encoder", _FROZEN, 2000, EPS, functools.partial(_reviews_run, head=False)),
    )
}
