"""A defence of a classifier that only answers queries, with certified radii (ZO-AE-DS, Zhang et al. 2022;
DeepZero, Chen et al. 2024).

The classifier f is a NumPy program without gradients, and was trained on clean images.  A denoiser D in front
of it is trained so that f(D(x + noise)) says what f says of the clean x, by the mean cross-entropy:

===========  ===============================================================================================
"ds"         D's output is f's input: gradients of the 64 pixels from random directions (:class:`BlackBox`),
             and from there on by backpropagation through D
"ae-ds"      D, and an encoder to 12 numbers behind it.  The decoder, pre-trained on clean images, is counted
             to the black box, whose 12 inputs get their gradients coordinate by coordinate
"deepzero"   D's own weights by finite differences, a few coordinates a step (:class:`ZOCGE`); nothing is
             differentiated
===========  ===============================================================================================

Certificates are those of randomised smoothing (Cohen et al. 2019, arXiv 1902.02918).  The smoothed classifier
answers what f(D(x + noise)) answers most often.  Of n0 noises the most frequent answer c is taken, and of n
further ones, of which k answer c, the one-sided Clopper-Pearson bound p at confidence 1 - alpha.  If p > 1/2,
no change of x of an l2 norm below sigma Phi^-1(p) changes the answer; else the defence abstains.

``python examples/defence.py`` prints the certified accuracy of each (arXiv 2203.14195, 2310.02025)."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from statistics import NormalDist

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels import BlackBox
from zokernels.examples import digits
from zokernels.optim import ZOCGE

METHODS = ("none", "ds", "ae-ds", "deepzero")
CODE = 12  #: numbers in an image's code

Predict = Callable[[Tensor], Tensor]


def lower_bound(hits: int, draws: int, alpha: float) -> float:
    """p with P(at least ``hits`` of ``draws``) = alpha for a coin of probability p (Clopper-Pearson).

    The true probability is above it in 1 - alpha of all cases.
    """
    from scipy.stats import beta

    return float(beta.ppf(alpha, hits, draws - hits + 1)) if hits else 0.0


@torch.no_grad()
def certify(
    answer: Predict, x: Tensor, sigma: float, n0: int, n: int, alpha: float, generator: torch.Generator
) -> tuple[int, float]:
    """(class, radius) for one image x [64]; (-1, 0.0) where the defence abstains.

    ``answer``: classes [B] of images [B, 64].
    """
    draw = lambda count: answer(x + sigma * torch.randn(count, len(x), generator=generator))
    guess = int(draw(n0).bincount(minlength=10).argmax())
    bound = lower_bound(int((draw(n) == guess).sum()), n, alpha)
    return (guess, sigma * NormalDist().inv_cdf(bound)) if bound > 0.5 else (-1, 0.0)


def classifier(data: digits.Data) -> Callable[[Tensor], Tensor]:
    """Logits [B, 10] of images [B, 64], by a NumPy program with weights that were trained here before."""
    model, generator = digits.network(1), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        x, y = digits.batch(data, 128, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())

    def logits(x: Tensor) -> Tensor:
        hidden = numpy.maximum(x.detach().numpy() @ w1.T + b1, 0)
        return torch.from_numpy(hidden @ w2.T + b2)

    return logits


class Denoiser(nn.Module):
    """x - c(x): three convolutions predict the noise of images [B, 64]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = (1, width, width, 1)
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes)]
        self.body = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        nn.init.zeros_(convs[2].weight)  # at first it leaves images as they are
        nn.init.zeros_(convs[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x.view(-1, 1, 8, 8)).flatten(1)


def autoencoder(data: digits.Data, steps: int) -> tuple[nn.Module, nn.Module]:
    """An encoder to :data:`CODE` numbers and a decoder, trained on clean images."""
    torch.manual_seed(2)
    encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, CODE))
    decoder = nn.Sequential(nn.Linear(CODE, 48), nn.ReLU(), nn.Linear(48, 64))
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    for _ in range(steps):
        x, _ = digits.batch(data, 128, generator)
        optimizer.zero_grad()
        F.mse_loss(decoder(encoder(x)), x).backward()
        optimizer.step()
    return encoder, decoder.requires_grad_(False)


def defend(method: str, logits: Callable[[Tensor], Tensor], data: digits.Data, args) -> tuple[Predict, int]:
    """What the defended classifier answers, and the queries (images) that its training took."""
    queries = 0

    def losses(x: Tensor, answers: Tensor) -> Tensor:
        """The black box: each image's cross-entropy with what f says of the clean one."""
        nonlocal queries
        queries += len(x)
        return F.cross_entropy(logits(x), answers, reduction="none")

    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    denoiser = Denoiser()
    front, behind = denoiser, lambda x: x
    if method == "ae-ds":
        encoder, behind = autoencoder(data, 2 * args.steps)
        front = nn.Sequential(denoiser, encoder)
    answer = lambda x: logits(behind(front(x))).argmax(1)
    clean = logits(data[0]).argmax(1)
    if method == "none":
        return answer, 0
    if method == "deepzero":
        zocge = ZOCGE(
            denoiser.named_parameters(), lr=args.lr, eps=1e-3, per_step=args.coordinates, momentum=0.9
        )
    else:
        kind = {"estimator": "rge", "queries": 24, "sphere": True}
        if method == "ae-ds":
            kind = {"estimator": "cge", "two_sided": True}
        box = BlackBox(lambda x, y: losses(behind(x), y), mu=5e-3, max_batch=4096, **kind)
        adam = torch.optim.Adam(front.parameters(), 2e-3)
    for _ in range(args.steps):
        rows = torch.randint(len(clean), (args.batch,), generator=generator)
        noisy = data[0][rows] + args.sigma * torch.randn(args.batch, 64, generator=generator)
        if method == "deepzero":
            zocge.step(lambda: losses(denoiser(noisy), clean[rows]).mean())  # noqa: B023
        else:
            adam.zero_grad()
            box(front(noisy), clean[rows]).mean().backward()
            adam.step()
    return answer, queries


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--coordinates", type=int, default=48, help="of a step of deepzero")
    parser.add_argument("--lr", type=float, default=0.02, help="of deepzero")
    parser.add_argument("--sigma", type=float, default=0.25, help="of the noise; pixels are in [0, 1]")
    parser.add_argument("--images", type=int, default=100, help="how many are certified")
    parser.add_argument("--draws", type=int, default=1000, help="n")
    parser.add_argument("--alpha", type=float, default=0.001)
    args = parser.parse_args(argv)
    training, (images, labels) = digits.load()
    logits = classifier(training)
    accuracy = (logits(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy on clean images {accuracy:.3f}; certified accuracy at the l2 radius")
    radii = [0.0, 0.1, 0.2, 0.3, 0.4]
    print(f"{'':10}" + "".join(f"{r:7.1f}" for r in radii) + "   queries of the training")
    results = {}
    for method in args.method:
        answer, queries = defend(method, logits, training, args)
        generator = torch.Generator().manual_seed(4)
        found = [
            certify(answer, x, args.sigma, 100, args.draws, args.alpha, generator)
            for x in images[: args.images]
        ]
        right = [r for (c, r), y in zip(found, labels.tolist(), strict=False) if c == y]
        results[method] = [sum(r >= least for r in right) / args.images for least in radii]
        print(
            f"{method:10}" + "".join(f"{share:7.2f}" for share in results[method]) + f"   {queries:,}",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()
