"""Surrogate gradients from the history of queries, points kept as coefficients (FZooS, Shu et al. 2024).

A Gaussian process over the points already queried has a mean whose gradient costs no query:

    grad mu(x) = sum_i w_i k(x, x_i) (x_i - x) / l^2,    w = (K + s I)^-1 (f - mean),
    k(x, x') = exp(-|x - x'|^2 / 2 l^2).

It needs only distances and differences of points, and it lies in their span.  So a point x = theta_0 + sum_k
a_k z_k is stored as its a, and distances come from the Gram matrix of the seeds.  A history of hundreds of
points of any model takes a few kB.  Here several clients, each with data of its own, walk along the gradients
of their surrogates between rounds, and a round averages their coefficients.  The paper's correction between
clients is left out. ``python examples/fzoos.py`` compares this with finite differences of as many queries
(arXiv 2308.04077)."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels import Span
from zokernels.examples import digits


class BlackBox:
    """A function from a to the loss of theta_0 + sum_k a_k z_k on some data, which counts its calls."""

    def __init__(self, model: nn.Module, span: Span, data: digits.Data) -> None:
        self.model, self.span, self.data, self.queries = model, span, data, 0
        self.base = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def __call__(self, a: Tensor) -> float:
        self.queries += 1
        params = list(self.model.parameters())
        for p, b in zip(params, self.base, strict=True):
            p.copy_(b)
        self.span.add_(params, a)
        return F.cross_entropy(self.model(self.data[0]), self.data[1]).item()


class Surrogate:
    """The Gaussian process over the last ``keep`` queries: their points [n, K] and values [n]."""

    def __init__(self, span: Span, length: float, keep: int, noise: float = 1e-4) -> None:
        self.span, self.length, self.keep, self.noise = span, length, keep, noise
        self.points, self.values = span.zeros(0), torch.zeros(0, dtype=torch.float64)

    def add(self, a: Tensor, value: float) -> None:
        self.points = torch.cat((self.points, a[None]))[-self.keep :]
        self.values = torch.cat((self.values, torch.tensor([value], dtype=torch.float64)))[-self.keep :]

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * (self.span.distances(a, b) / self.length).square())

    def fit(self) -> Tensor:
        """The weights w of the process."""
        covariance = self.kernel(self.points, self.points)
        covariance += self.noise * torch.eye(len(covariance), dtype=torch.float64)
        return torch.linalg.solve(covariance, self.values - self.values.mean())

    def gradient(self, a: Tensor, weights: Tensor) -> Tensor:
        """The coefficients of grad mu(x)."""
        scaled = weights * self.kernel(a[None], self.points)[0]
        return (scaled @ self.points - scaled.sum() * a) / self.length**2


def descend(a: Tensor, gradient: Tensor, span: Span, step: float) -> Tensor:
    """a after a step of the length ``step``, measured in the weights."""
    return a - step * gradient / span.norm(gradient).clamp(min=1e-12)


def surrogate_round(box: BlackBox, surrogate: Surrogate, a: Tensor, args: argparse.Namespace) -> Tensor:
    """Makes ``args.queries`` queries around a, then ``args.walk`` steps along the surrogate, which cost
    none.
    """
    surrogate.add(a, box(a))
    for _ in range(args.queries - 1):
        direction = torch.randn(len(box.span), generator=args.generator, dtype=torch.float64)
        point = descend(a, direction, box.span, args.radius)
        surrogate.add(point, box(point))
    weights = surrogate.fit()
    for _ in range(args.walk):
        a = descend(a, surrogate.gradient(a, weights), box.span, args.step / args.walk)
    return a


def difference_round(box: BlackBox, _: Surrogate, a: Tensor, args: argparse.Namespace) -> Tensor:
    """Spends the same number of queries on two-sided differences along directions of the span."""
    total = box.span.zeros()
    for _ in range(args.queries // 2):
        direction = torch.randn(len(box.span), generator=args.generator, dtype=torch.float64)
        direction *= args.radius / box.span.norm(direction)
        total += (box(a + direction) - box(a - direction)) * direction
    return descend(a, total, box.span, args.step)


def train(round_of, *, seeds: int = 48, rounds: int = 60, count: int = 3, **options) -> dict:
    args = argparse.Namespace(**{"queries": 8, "walk": 4, "radius": 0.5, "step": 0.8, **options})
    args.generator = torch.Generator().manual_seed(3)
    training, _ = digits.load()
    model = digits.network()
    warm_up(model, training)
    span = Span(list(model.named_parameters()), range(seeds))
    boxes = [BlackBox(model, span, share) for share in digits.clients(training, count)]
    surrogates = [Surrogate(span, length=3.0, keep=200) for _ in boxes]
    whole, a = BlackBox(model, span, training), span.zeros()
    curve = [(0, whole(a))]
    for _ in range(rounds):
        a = torch.stack([round_of(b, s, a, args) for b, s in zip(boxes, surrogates, strict=True)]).mean(0)
        curve.append((sum(b.queries for b in boxes), whole(a)))
    history = sum(s.points.nbytes for s in surrogates)
    points = sum(len(s.points) for s in surrogates)
    return {"curve": curve, "history_bytes": history, "vector_bytes": 4 * sum(span.sizes) * points}


def warm_up(model: nn.Module, data: digits.Data, steps: int = 30) -> None:
    """Takes a few steps of Adam, so that the clients start from a model and not from noise."""
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = digits.batch(data, 64, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args(argv)
    results = {}
    for name, round_of in (("surrogates", surrogate_round), ("differences", difference_round)):
        result = results[name] = train(round_of, seeds=args.seeds, rounds=args.rounds)
        (_, first), (queries, last) = result["curve"][0], result["curve"][-1]
        print(f"{name:12} loss {first:.3f} to {last:.3f} in {queries} queries")
    result = results["surrogates"]
    print(
        f"history: {result['history_bytes']:,} bytes as coefficients, {result['vector_bytes']:,} as vectors"
    )
    return results


if __name__ == "__main__":
    main()
