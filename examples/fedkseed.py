"""Federated rounds of which only coefficients travel (FedKSeed, Qin et al. 2024, arXiv 2312.06353).

All sides know the weights theta_0 and a pool of K seeds, so K numbers a describe the model of every round:
theta = theta_0 + sum_k a_k z_k.  A client takes steps of MeZO along directions of the pool.  It sends back
what it added, as pairs of the number of a direction and a coefficient.  ``python examples/fedkseed.py``
trains digits with ten clients whose data differ."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zokernels
from zokernels import Span
from zokernels.examples import digits

EPS = 1e-3


def local_steps(
    model: nn.Module, span: Span, data: digits.Data, steps: int, lr: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Takes ``steps`` steps with ``model``; returns the numbers of their directions (int16) and coefficients
    (fp32).
    """
    params, places = list(model.parameters()), {"streams": span.streams, "dist": span.dist}
    loss = lambda x, y: F.cross_entropy(model(x), y)
    chosen = torch.randint(len(span), (steps,), generator=generator)
    coeffs = torch.empty(steps)
    for i, k in enumerate(chosen):
        seed, (x, y) = span.seeds[k : k + 1], digits.batch(data, 32, generator)
        zokernels.combine_(params, seed, EPS, **places)
        plus = loss(x, y)
        zokernels.combine_(params, seed, -2 * EPS, **places)
        g = (plus - loss(x, y)) / (2 * EPS)
        coeffs[i] = -lr * g
        zokernels.combine_(params, seed, EPS + coeffs[i : i + 1], **places)
    return chosen.to(torch.int16), coeffs


@torch.no_grad()
def train(
    *, pool: int = 4096, rounds: int = 20, steps: int = 100, participants: int = 5, lr: float = 1.2e-2
) -> dict:
    training, validation = digits.load()
    model, shares = digits.network(), digits.clients(training, 10)
    base = [p.clone() for p in model.parameters()]
    span = Span(list(model.named_parameters()), range(pool), "rademacher")
    generator = torch.Generator().manual_seed(1)

    def set_model(coeffs: Tensor) -> None:
        for p, b in zip(model.parameters(), base, strict=True):
            p.copy_(b)
        span.add_(list(model.parameters()), coeffs)

    coeffs = torch.zeros(pool)  # the server holds these, and sends them
    result = {
        "accuracy_first": digits.accuracy(model, validation),
        "loss_first": digits.loss(model, validation),
    }
    for _ in range(rounds):
        total = torch.zeros(pool)
        for share in torch.randperm(len(shares), generator=generator)[:participants]:
            set_model(coeffs)
            numbers, values = local_steps(model, span, shares[share], steps, lr, generator)
            total.index_add_(0, numbers.long(), values)
        coeffs += total / participants
    set_model(coeffs)
    down, up = coeffs.nbytes, numbers.nbytes + values.nbytes
    result |= {
        "accuracy_last": digits.accuracy(model, validation),
        "loss_last": digits.loss(model, validation),
    }
    return result | {
        "bytes_down": down,
        "bytes_up": up,
        "bytes_of_weights": sum(p.nbytes for p in base),
        "model": model,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pool", type=int, default=4096, help="seeds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="of a client in a round")
    args = parser.parse_args(argv)
    result = train(pool=args.pool, rounds=args.rounds, steps=args.steps)
    print(
        f"a client's round: {result['bytes_down']:,} bytes down, {result['bytes_up']:,} up, whatever "
        "the model's size"
    )
    for when in ("first", "last"):
        print(
            f"{when:5} loss {result[f'loss_{when}']:.3f}, accuracy {100 * result[f'accuracy_{when}']:.1f} %"
        )
    return result


if __name__ == "__main__":
    main()
