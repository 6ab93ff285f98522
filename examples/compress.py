"""An ordinary update on K numbers: backpropagation's delta, projected on the span of K seeds by least
squares.

A worker trains with Adam.  It sends a = G^-1 p, the coefficients of the projection of its delta, and the
receiver adds sum_k a_k z_k.  A projection on K of n dimensions keeps about K / n of the delta's square.  What
it drops is added to the next delta (error feedback).  ``python examples/compress.py`` trains digits in this
way, and with the whole delta."""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zokernels
from zokernels import Span
from zokernels.examples import digits


def delta_of(
    model: nn.Module, data: digits.Data, steps: int, lr: float, generator: torch.Generator
) -> list[Tensor]:
    """The change of each weight that ``steps`` steps of Adam make."""
    trained = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trained.parameters(), lr)
    for _ in range(steps):
        x, y = digits.batch(data, 64, generator)
        optimizer.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return [new - old for new, old in zip(trained.parameters(), model.parameters(), strict=True)]


def train(*, directions: int | None = 256, rounds: int = 60, steps: int = 10, lr: float = 2e-3) -> dict:
    """Trains with ``directions`` coefficients a round, or with the whole delta if it is None."""
    training, validation = digits.load()
    model, generator = digits.network(), torch.Generator().manual_seed(2)
    params = list(model.parameters())
    left = [torch.zeros_like(p) for p in params]
    kept = []
    for step in range(rounds):
        delta = delta_of(model, training, steps, lr, generator)
        with torch.no_grad():
            if directions is None:
                for p, d in zip(params, delta, strict=True):
                    p.add_(d)
                continue
            seeds = [zokernels.derive_seed(7, step, k) for k in range(directions)]
            span = Span(list(model.named_parameters()), seeds)
            torch._foreach_add_(left, delta)
            energy = sum(t.double().square().sum() for t in left)
            coeffs = span.fit(left)  # these are sent
            kept.append((span.norm(coeffs).square() / energy).item())
            span.add_(params, coeffs)
            span.add_(left, -coeffs)
    numel = sum(p.numel() for p in params)
    return {
        "loss": digits.loss(model, validation),
        "accuracy": digits.accuracy(model, validation),
        "kept": sum(kept) / max(1, len(kept)),
        "expected": (directions or numel) / numel,
        "bytes": 4 * (directions or numel),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directions", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args(argv)
    results = {}
    for name, directions in (("whole delta", None), (f"{args.directions} coefficients", args.directions)):
        result = results[name] = train(directions=directions, rounds=args.rounds)
        print(
            f"{name}: {result['bytes']:,} bytes a round; loss {result['loss']:.3f}, "
            f"accuracy {100 * result['accuracy']:.1f} %"
        )
    print(f"kept of the square: {result['kept']:.3f}; K / n = {result['expected']:.3f}")
    return results


if __name__ == "__main__":
    main()
