"""The tasks: a model, batches of its training data, and what is held out for the search and for the end."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import zollm
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
    #: Where the search of step sizes begins, by method; else at the catalogue's, which is for few weights.
    first: Mapping[str, float] = field(default_factory=dict)
    #: Seeds of the end, and how often a training is measured on the way.
    seeds: int = 5
    points: int = 20


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


#: Short batches and few held-out sentences, because on a CPU the forwards take nearly all of the time.
REVIEWS_BATCH, REVIEWS_TOKENS, REVIEWS_HELD = 8, 32, (100, 200)


@functools.cache
def _reviews() -> tuple[Any, ...]:
    from examples import reviews
    from examples.encoder import Classifier

    sentences = reviews.load()
    searched_count, end_count = REVIEWS_HELD
    rest, end = reviews.split(sentences, min(end_count, len(sentences) // 4))
    training, searched = reviews.split(rest, min(searched_count, len(rest) // 4), seed=1)
    model = Classifier()
    device = torch.device("cpu")
    batcher = lambda part, size: reviews.Batcher(part, model.tokenizer, size, device, REVIEWS_TOKENS)
    model.set_centre((b.ids, b.mask) for b in batcher(training[:400], 50).ordered())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    held = [batcher(part, 50).ordered() for part in (searched, end)]
    return model, state, batcher(training, REVIEWS_BATCH), held


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


PROMPTS_BATCH, PROMPTS_HELD = 4, 40


@functools.cache
def _prompts() -> tuple[Any, ...]:
    """The model of a package in bf16, its first weights, and 120, 40 and 40 prompts of ``bench zollm``."""
    model, tokenizer = zollm.smollm2()
    model.to(torch.bfloat16)  # half of the time of fp32
    items = zollm.classification()
    random.Random(0).shuffle(items)
    held = items[:PROMPTS_HELD], items[PROMPTS_HELD : 2 * PROMPTS_HELD]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return model, tokenizer, state, items[2 * PROMPTS_HELD :], held


def _prompts_run(seed: int, search: bool) -> Run:
    model, tokenizer, state, training, held = _prompts()
    model.load_state_dict(state)
    draw = random.Random(seed)

    def closures() -> Iterator[Callable[[], Tensor]]:
        while True:
            items = draw.sample(training, PROMPTS_BATCH)
            rows = zollm.rows_of(tokenizer, [(i.prompt, i.answer) for i in items])
            yield lambda: zollm.answer_losses(model, rows).mean()  # noqa: B023

    @torch.no_grad()
    def held_out() -> tuple[float, float]:
        items = held[0 if search else 1]
        options = items[0].options
        pairs = [[(i.prompt, option) for i in items] for option in options]
        losses = torch.stack([zollm.answer_losses(model, zollm.rows_of(tokenizer, p)) for p in pairs], 1)
        right = torch.tensor([options.index(i.answer) for i in items])
        loss = losses.gather(1, right[:, None]).mean().item()
        return loss, (losses.argmin(1) == right).float().mean().item()

    return Run(model, list(model.named_parameters()), closures(), held_out)


#: Where the searches of large models begin: millions of weights take smaller steps than a few thousands.
_REVIEWS = {
    "MeZO (ZO-SGD, SPSA)": 9.49e-5, "n-SPSA, q = 4": 3e-4, "ZO-SGD with momentum": 1e-5, "ZO-AdamW": 1e-4,
    "FZOO, q = 8": 1e-3, "ES at scale, N = 8": 1e-3, "ConMeZO": 1e-4, "LOZO, r = 4": 3e-5,
    "BSZO, q = 2": 3e-4, "LOREN, q = 6": 1e-4, "AGZO, r = 16": 3e-5, "forward gradient": 1e-4,
}  # fmt: skip
_PROMPTS = {
    "MeZO (ZO-SGD, SPSA)": 1e-6, "n-SPSA, q = 4": 3e-6, "ZO-AdamW": 1e-5, "FZOO, q = 8": 1e-3,
    "ES at scale, N = 8": 1e-3, "ConMeZO": 1e-6, "LOZO, r = 4": 1e-6, "forward gradient": 1e-6,
}  # fmt: skip

_WHOLE, _FROZEN = "reviews, MiniLM of 22.6 M weights", "reviews, MiniLM with its head frozen"
TASKS = {
    task.name: task
    for task in (
        Task("digits", "digits, 6,538 weights from scratch", 4000, EPS, _digits_run),
        Task(
            *("reviews", _WHOLE, 480, EPS, functools.partial(_reviews_run, head=True)),
            first=_REVIEWS,
            points=4,
        ),
        Task(
            *("reviews-encoder", _FROZEN, 480, EPS, functools.partial(_reviews_run, head=False)),
            first=_REVIEWS,
            points=4,
        ),
        Task(
            *("prompts", "prompts, SmolLM2 of 135 M weights in bf16", 240, EPS, _prompts_run),
            first=_PROMPTS,
            seeds=3,
            points=3,
        ),
    )
}
