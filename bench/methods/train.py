"""Loss after equal forwards: every method trains the same small network on scikit-learn's handwritten
digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .catalog import Method

WIDTH, LAYERS, BATCH, EPS = 32, 4, 128, 1e-3


class Network(nn.Module):
    """64 inputs, four residual layers of width 32, and 10 outputs.

    It has 6,538 weights, with layers that can be skipped and matrices that can be factored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        for layer in self.layers:
            x = x + F.relu(layer(x)) / LAYERS
        return self.head(x)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images of 8 x 8 with values in [0, 1], and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def batches(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        return x[rows], y[rows]

    return batch


Curve = list[tuple[int, float]]


def curve_of(
    step: Callable[[], None], loss: Callable[[], float], forwards: float, budget: int, points: int
) -> Curve:
    """(forwards, loss on all data), from before the first step to the last that ends within ``budget``
    forwards.
    """
    curve, every, steps = [(0, loss())], max(1, int(budget // (forwards * points))), int(budget // forwards)
    for i in range(1, steps + 1):
        step()
        if i % every == 0 or i == steps:
            curve.append((int(i * forwards), loss()))
    return curve


def train(method: Method, budget: int, points: int = 50, seed: int = 0) -> Curve:
    torch.manual_seed(seed)
    model, batch, (x, y) = Network(), batches(seed), digits()
    optimizer = method.make(list(model.named_parameters()), method.lr, model, eps=EPS, seed=seed)

    def step() -> None:
        rows, labels = batch()
        optimizer.step(lambda: F.cross_entropy(model(rows), labels))

    @torch.no_grad()
    def loss() -> float:
        return F.cross_entropy(model(x), y).item()

    return curve_of(step, loss, method.forwards, budget, points)
