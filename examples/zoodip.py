"""A word for a digit that a quantised diffusion model has no word for, without gradients (ZOODiP, Seo et al.
2025, arXiv 2503.14868).

The text-to-image model of :mod:`examples.unet` is rounded to integers of 8 bits: linear layers,
convolutions and embeddings.  Of the seven it knows images, but no name.  So the embedding of a made-up word w
is trained on a few images of sevens under "a photo of a w" and other prompts (textual inversion); all else
stays as it is.  A step is forwards alone:

    g     = 1 / (c n) sum_k (L(w + eps z_k) - L(w)) / eps * z_k,   k = 1 .. n,   c = sqrt((d + n - 1) / n)
    g     <- g - g E^T E                                                         (subspace gradient)
    w     <- Adam(g)

L is the error of the predicted noise, at one image, one noise and one step of the diffusion, which are drawn
anew in each step of the training and are the same for all forwards of a step.  The steps of the diffusion are
drawn from [T / 2, 9 T / 10) alone, where the prompt matters most (partial uniform timestep sampling).  The
rows of E are the directions in which w has hardly moved: every tau steps the last tau positions of w are
standardised (each coordinate has mean 0 and variance 1), and E gets the principal components after those that
hold 1 - nu of the variance.  d is the size of w, less the rows of E.

``python examples/zoodip.py`` compares steps with and without the subspace, and with all steps of the
diffusion, on equal images and noise.  n = 2, Adam's eps of 1e-3 and the order of things are those of the
authors' code.  Sizes go with the model: there tau is 128 and d 768, here 11 and 64, which is the same share;
and eps and lr go with the deviation of the embeddings, which is 1 here."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import zokernels
from zokernels.examples import digits, unet

STREAM = zokernels.stream_of("word")


def still_directions(history: Tensor, nu: float) -> Tensor:
    """E [r, d]: the principal components that hold the last share ``nu`` of the variance of ``history``
    [tau, d], whose coordinates are standardised before.

    The components come in the order of their variance.  The first of them whose sum of variances is above
    1 - nu still stays out of E, as in the authors' code.  Positions less their mean span tau - 1 dimensions
    at most; what comes after those is no component and stays out, too (the authors have one of these in E).
    """
    centred = (history - history.mean(0)).double()
    deviation = centred.square().mean(0).sqrt()
    centred /= torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    _, values, components = torch.linalg.svd(centred, full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum()
    first = int((share <= 1 - nu).sum())
    rank = min(len(history) - 1, int((values > 1e-9 * values[0]).sum()))
    return components[first + 1 : rank].to(history.dtype)


@dataclass
class Token:
    """The embedding of a word, ``vector`` [d], and what its training keeps.

    Args:
        seed: of the directions.
        nu: the share of variance that E holds; None: no subspace.
        tau: positions in the history, and steps between two refits of E.
        directions: n.
    """

    vector: Tensor
    seed: int
    nu: float | None = 1e-3
    tau: int = 11
    directions: int = 2
    lr: float = 0.1
    eps: float = 0.05
    still: Tensor | None = None
    history: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vector = self.vector.clone()
        self.adam = torch.optim.Adam([self.vector], self.lr, eps=1e-3)

    def seeds(self) -> Tensor:
        """Those of this step's directions, int64 [n]."""
        return zokernels.derive_seed(self.seed, len(self.history), torch.arange(self.directions))

    def points(self) -> Tensor:
        """w, and w + eps z_k for each direction: [n + 1, d]."""
        points = self.vector.new_empty(self.directions, len(self.vector))
        steps = torch.full((self.directions,), self.eps)
        zokernels.spread(points, self.vector, self.seeds(), steps, stream=STREAM)
        return torch.cat((self.vector[None], points))

    def gradient(self, losses: Tensor) -> Tensor:
        """g [d] from the losses [n + 1] at :meth:`points`."""
        n, d = self.directions, len(self.vector) - (0 if self.still is None else len(self.still))
        coeffs = (losses[1:] - losses[0]) / (self.eps * n * math.sqrt((d + n - 1) / n))
        g = torch.full_like(self.vector, -0.0)  # the neutral element of addition
        zokernels.combine_([g], self.seeds(), coeffs, streams=[STREAM])
        return g if self.still is None else g - (g @ self.still.T) @ self.still

    def update(self, losses: Tensor) -> None:
        self.vector.grad = self.gradient(losses)
        self.adam.step()
        self.history.append(self.vector.clone())
        if self.nu is not None and len(self.history) % self.tau == 0:
            self.still = still_directions(torch.stack(self.history[-self.tau :]), self.nu)


class Concept:
    """A few images, and the model's error on them for a word."""

    def __init__(self, model: unet.Diffusion, images: Tensor) -> None:
        self.model, self.images = model, images
        ids = torch.tensor([unet.ids_of(template, "digit") for template in unet.TEMPLATES])
        self.place = ids == unet.WORDS.index("digit")
        self.prompts = model.words(ids)

    def losses(self, vectors: Tensor, rows: Tensor, prompts: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[N]: the mean squared error of the predicted noise for each of ``vectors`` [N, d], with an image,
        a prompt, a step of the diffusion ([N] each) and a noise [N, 1, 8, 8] of its own.
        """
        words = torch.where(self.place[prompts][..., None], vectors[:, None], self.prompts[prompts])
        found = self.model(self.model.noised(self.images[rows], t, noise), t, words)
        return F.mse_loss(found, noise, reduction="none").mean((1, 2, 3))

    def draw(self, count: int, times: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Images, prompts, steps of the diffusion in range(*times) and noise, for ``count`` errors."""
        integers = lambda low, high: torch.randint(low, high, (count,), generator=generator)
        noise = torch.randn(count, 1, 8, 8, generator=generator)
        return integers(0, len(self.images)), integers(0, len(self.prompts)), integers(*times), noise

    def error(self, vector: Tensor, times: tuple[int, int], count: int = 512) -> float:
        """The mean error over ``count`` draws that are always the same."""
        drawn = self.draw(count, times, torch.Generator().manual_seed(1))
        return self.losses(vector.expand(count, -1), *drawn).mean().item()


@torch.no_grad()
def train(concept: Concept, tokens: list[Token], steps: int, times: list[tuple[int, int]]) -> None:
    """Trains ``tokens`` side by side: one forward of the model is one forward of each point of each of them.

    Tokens with the same seed see the same images, prompts and noise; the i-th draws from range(*times[i]).
    """
    generators = [torch.Generator().manual_seed(token.seed) for token in tokens]
    for _ in range(steps):
        points = [token.points() for token in tokens]
        drawn = [concept.draw(1, own, g) for own, g in zip(times, generators, strict=True)]
        repeated = [
            torch.cat([x.expand(len(p), *x.shape[1:]) for x, p in zip(part, points, strict=True)])
            for part in zip(*drawn, strict=True)
        ]
        losses = concept.losses(torch.cat(points), *repeated).split([len(p) for p in points])
        for token, own in zip(tokens, losses, strict=True):
            token.update(own)


FORMS = {"subspace": (1e-3, True), "plain": (None, True), "all timesteps": (1e-3, False)}


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tau", type=int, default=11)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=6, help="how many sevens are given")
    args = parser.parse_args(argv)
    training, validation = digits.load()
    model = unet.load()
    sevens = lambda data: unet.images_of(data)[data[1] == 7]
    concept = Concept(model, sevens(training)[: args.images])
    unseen = Concept(model, sevens(validation))
    start = model.words(torch.tensor(unet.WORDS.index("digit")))
    late, every = (unet.STEPS // 2, 9 * unet.STEPS // 10), (0, unet.STEPS)
    runs = [(form, seed) for form in FORMS for seed in range(args.seeds)]
    tokens = [Token(start, seed, FORMS[form][0], args.tau, lr=args.lr) for form, seed in runs]
    train(concept, tokens, args.steps, [late if FORMS[form][1] else every for form, _ in runs])
    print("error on sevens that were not shown, at timesteps of the training and at all")
    print(f"{'the word digit':15} {unseen.error(start, late):.4f} {unseen.error(start, every):.4f}")
    errors: dict[str, list[float]] = {}
    for (form, seed), token in zip(runs, tokens, strict=True):
        errors.setdefault(form, []).append(unseen.error(token.vector, late))
        rows = 0 if token.still is None else len(token.still)
        whole = unseen.error(token.vector, every)
        print(f"{form:15} {errors[form][-1]:.4f} {whole:.4f}  seed {seed}, {rows} directions removed")
    errors["start"] = [unseen.error(start, late)]
    return errors


if __name__ == "__main__":
    main()
