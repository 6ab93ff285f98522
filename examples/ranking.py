"""A picture that someone likes, found by asking which of a few is the best (ZO-RankSGD, Tang et al. 2023,
arXiv 2303.03751).

The diffusion model of :mod:`examples.unet` paints a digit from a noise image (DDIM, Song et al. 2021, without
noise of its own).  That noise image is trained: :class:`ZORankSearch` paints candidates around it, gets the
best three in order, and searches along the direction that their order tells.  No score is ever known.

``python examples/ranking.py`` asks a classifier that likes sevens; with ``--ask`` it draws the pictures in
the terminal and asks you."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.examples import digits, unet
from zokernels.optim import ZORankSearch

SHADES = " .:-=+*#%@"


class Painter(nn.Module):
    """A picture [8, 8] in [-1, 1] from ``latent``, the only parameter, by a few steps of DDIM."""

    def __init__(self, steps: int = 5, seed: int = 0) -> None:
        super().__init__()
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.latent, self.times = nn.Parameter(noise), torch.linspace(unet.STEPS - 1, 0, steps).long()
        self.model = unet.load()
        ids = torch.tensor([unet.ids_of(unet.TEMPLATES[0], "digit")])
        self.register_buffer("words", self.model.words(ids))

    def forward(self) -> Tensor:
        x = self.latent
        for at, t in enumerate(self.times):
            a = self.model.alphas[t]
            noise = self.model(x, t[None], self.words)
            image = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
            if at + 1 < len(self.times):
                a = self.model.alphas[self.times[at + 1]]
                x = a.sqrt() * image + (1 - a).sqrt() * noise
        return image[0, 0]


def drawn(image: Tensor) -> list[str]:
    shades = ((image + 1) / 2 * (len(SHADES) - 1)).round().long().clamp(0, len(SHADES) - 1)
    return ["".join(2 * SHADES[i] for i in row) for row in shades.tolist()]


def ask(images: list[Tensor]) -> list[int]:
    """The order that a person types, best first; at least as many as are asked for."""
    for begin in range(0, len(images), 4):
        part = images[begin : begin + 4]
        print("   ".join(f"{begin + i:<16}" for i in range(len(part))))
        print("\n".join("   ".join(rows) for rows in zip(*map(drawn, part), strict=True)), "\n")
    return [
        int(word) for word in input("numbers of the best, best first (three of eight, one of six): ").split()
    ]


class Judge:
    """Orders images by how much a classifier takes them for a ``digit``; says nothing but the order."""

    def __init__(self, digit: int) -> None:
        self.digit, self.model = digit, digits.network(5)
        (data, _), generator = digits.load(), torch.Generator().manual_seed(5)
        optimizer = torch.optim.Adam(self.model.parameters(), 5e-3)
        for _ in range(300):
            x, y = digits.batch(data, 128, generator)
            optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            optimizer.step()

    @torch.no_grad()
    def liking(self, image: Tensor) -> float:
        """The log-probability of the digit."""
        return self.model((image.flatten() + 1) / 2).log_softmax(-1)[self.digit].item()

    def __call__(self, images: list[Tensor]) -> list[int]:
        return sorted(range(len(images)), key=lambda i: -self.liking(images[i]))


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digit", type=int, default=7, help="what the classifier likes")
    parser.add_argument("--ask", action="store_true", help="ask a person")
    args = parser.parse_args(argv)
    painter, judge = Painter(seed=args.seed), Judge(args.digit)
    optimizer = ZORankSearch(
        [("latent", painter.latent)], lr=4.0, eps=0.3, candidates=8, top=3, trials=4, rounds=2, seed=args.seed
    )
    with torch.no_grad():
        likings = [judge.liking(painter())]
    for step in range(args.steps):
        best = optimizer.step(painter, ask if args.ask else judge)
        likings.append(judge.liking(best))
        print(f"step {step + 1}: log-probability of a {args.digit} {likings[-2]:.3f} to {likings[-1]:.3f}")
    print("\n".join(drawn(best)))
    return likings


if __name__ == "__main__":
    main()
