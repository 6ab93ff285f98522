"""A network of 2,410 weights on scikit-learn's handwritten digits, which the small examples train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]


def load() -> tuple[Data, Data]:
    """The training and the validation data: 1,437 and 360 images of 8 x 8 in [0, 1], and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@torch.no_grad()
def loss(model: nn.Module, data: Data) -> float:
    return F.cross_entropy(model(data[0]), data[1]).item()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def batch(data: Data, size: int, generator: torch.Generator) -> Data:
    rows = torch.randint(len(data[0]), (size,), generator=generator)
    return data[0][rows], data[1][rows]


def clients(data: Data, count: int) -> list[Data]:
    """Shares of the data that differ: one half of each is drawn at random, the other is sorted by digit."""
    half = len(data[0]) // 2
    order = torch.cat((torch.arange(half), half + data[1][half:].argsort()))
    even, rest = order[:half].chunk(count), order[half:].chunk(count)
    rows = [torch.cat(parts) for parts in zip(even, rest, strict=True)]
    return [(data[0][r], data[1][r]) for r in rows]
