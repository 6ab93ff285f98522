"""Federated rounds of which only coefficients travel (FedKSeed, Qin et al. 2024, arXiv 2312.06353).

All sides know the weights theta_0 and a pool of K seeds, so K numbers a describe the model of every round:
theta = theta_0 + sum_k a_k z_k.  A client takes steps of MeZO along directions of the pool.  It sends back
what it added, as pairs of the number of a direction and a coefficient, which count by the client's share of
the data.  ``python examples/fedkseed.py`` trains digits with ten clients whose data differ.

With ``--pro`` (FedKSeed-Pro) the server learns which directions matter: clients draw a direction with a
probability that grows with the mean size of its derivatives so far."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zokernels
from zokernels import Span
from zokernels.examples import digits

EPS = 1e-3


def probabilities(sums: Tensor, counts: Tensor) -> Tensor:
    """The probability of each direction, fp64 [K].

    It is the softmax of the mean sizes of the directions' derivatives, which are scaled to [0, 1] before.
    ``sums`` are the sums of the sizes, and ``counts`` how many there were; a direction that nobody has drawn
    has mean 0. (That the scaled means go through a softmax could not be confirmed.)
    """
    means = sums.double() / counts.clamp(min=1)
    spread = means.max() - means.min()
    return torch.softmax((means - means.min()) / (spread if spread > 0 else 1.0), 0)


def local_steps(
    model: nn.Module,
    span: Span,
    data: digits.Data,
    steps: int,
    lr: float,
    generator: torch.Generator,
    chances: Tensor | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes ``steps`` steps with ``model``; returns the numbers of their directions (int16) and coefficients
    (fp32).

    ``chances``: the probabilities of the directions; default: equal ones.  ``clip``: a step whose two losses
    differ by more is left out.
    """
    params, places = list(model.parameters()), {"streams": span.streams, "dist": span.dist}
    loss = lambda x, y: F.cross_entropy(model(x), y)
    if chances is None:
        chosen = torch.randint(len(span), (steps,), generator=generator)
    else:
        chosen = torch.multinomial(chances, steps, replacement=True, generator=generator)
    coeffs = torch.empty(steps)
    for i, k in enumerate(chosen):
        seed, (x, y) = span.seeds[k : k + 1], digits.batch(data, 32, generator)
        zokernels.combine_(params, seed, EPS, **places)
        plus = loss(x, y)
        zokernels.combine_(params, seed, -2 * EPS, **places)
        difference = plus - loss(x, y)
        g = difference / (2 * EPS) if clip is None or abs(difference) <= clip else 0.0
        coeffs[i] = -lr * g
        zokernels.combine_(params, seed, EPS + coeffs[i : i + 1], **places)
    return chosen.to(torch.int16), coeffs


@torch.no_grad()
def train(
    *,
    pool: int = 4096,
    rounds: int = 20,
    steps: int = 100,
    participants: int = 5,
    lr: float = 1.2e-2,
    pro: bool = False,
    clip: float | None = None,
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
    sums, counts = torch.zeros(pool), torch.zeros(pool)  # of the derivatives that came back
    result = {
        "accuracy_first": digits.accuracy(model, validation),
        "loss_first": digits.loss(model, validation),
    }
    for _ in range(rounds):
        total, rows = torch.zeros(pool), 0
        chances = probabilities(sums, counts) if pro else None
        for share in torch.randperm(len(shares), generator=generator)[:participants]:
            set_model(coeffs)
            data = shares[share]
            numbers, values = local_steps(model, span, data, steps, lr, generator, chances, clip)
            total.index_add_(0, numbers.long(), len(data[0]) * values)
            rows += len(data[0])
            sums.index_add_(0, numbers.long(), values.abs() / lr)
            counts.index_add_(0, numbers.long(), torch.ones(steps))
        coeffs += total / rows
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
    parser.add_argument("--pro", action="store_true", help="directions by the size of their derivatives")
    parser.add_argument("--clip", type=float, help="leave steps out whose two losses differ by more")
    args = parser.parse_args(argv)
    options = {"pro": args.pro, "clip": args.clip}
    result = train(pool=args.pool, rounds=args.rounds, steps=args.steps, **options)
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
