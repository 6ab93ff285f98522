"""A small text-to-image diffusion model of handwritten digits: a denoising U-Net with attention, of 8 x 8
pixels.

The U-Net predicts the noise e of x_t = sqrt(a_t) x + sqrt(1 - a_t) e (DDPM, Ho et al. 2020, arXiv
2006.11239) and attends to a prompt, which a text encoder of one layer makes from word embeddings, as Stable
Diffusion does.  ``python examples/unet.py`` trains it in half a minute, by backpropagation, on prompts such
as "a photo of a six", and writes ``unet.safetensors``, in integers of 8 bits.  Threes and sevens it sees
under the word "digit" alone; :mod:`examples.zoodip` finds a word for the seven."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.examples import digits
from zokernels.quantize import quantize_

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", "the", "photo", "picture", "of", "digit", *NAMES)
TEMPLATES = ("a photo of a {}", "the photo of the {}", "a picture of a {}", "the picture of a {}")
STEPS = 100  #: T, the steps of the diffusion


def alphas() -> Tensor:
    """a_t of t = 0 .. T - 1, float32 [T]: the share of the image in x_t's variance (betas 1e-3 to 0.1)."""
    return (1 - torch.linspace(1e-3, 0.1, STEPS)).cumprod(0)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, four heads; queries of x [B, n, c], the rest of context [B, m, d]."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(channels), nn.Linear(channels, channels, bias=False)
        self.key, self.value = (nn.Linear(context, channels, bias=False) for _ in range(2))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        context = normed if context is None else context
        parts = self.query(normed), self.key(context), self.value(context)
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        return x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A residual block of two convolutions, which knows the step of the diffusion; then attention."""

    def __init__(self, before: int, channels: int, context: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))
            for c in (before, channels)
        )
        self.time = nn.Linear(64, channels)
        self.skip = nn.Conv2d(before, channels, 1) if before != channels else nn.Identity()
        self.to_itself, self.to_words = Attention(channels, channels), Attention(channels, context)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        x = self.skip(x) + self.second(self.first(x) + self.time(time)[..., None, None])
        flat = self.to_words(self.to_itself(x.flatten(2).transpose(1, 2)), words)
        return flat.transpose(1, 2).view_as(x)


class Diffusion(nn.Module):
    """The text encoder and the U-Net: 8 x 8 pixels, 4 x 4 below, and back."""

    def __init__(self, width: int = 16, size: int = 64) -> None:
        """``width``: channels at 8 x 8, a multiple of 8; ``size``: numbers in a word's embedding."""
        super().__init__()
        self.words = nn.Embedding(len(WORDS), size)
        self.places = nn.Parameter(0.1 * torch.randn(5, size))
        self.encoder, self.normed = Attention(size, size), nn.LayerNorm(size)
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = Block(width, width, size)
        self.smaller = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = Block(2 * width, 2 * width, size)
        self.larger = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up = Block(2 * width, width, size)
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
        self.register_buffer("alphas", alphas(), persistent=False)

    def prompt(self, vectors: Tensor) -> Tensor:
        """What the U-Net attends to, [B, 5, size], of the word vectors [B, 5, size] of prompts."""
        return self.normed(self.encoder(vectors + self.places))

    def forward(self, noisy: Tensor, t: Tensor, vectors: Tensor) -> Tensor:
        """The noise in ``noisy`` [B, 1, 8, 8] at the steps t [B], under the prompts ``vectors``."""
        words = self.prompt(vectors)
        angles = t[:, None] * torch.exp(-math.log(200) * torch.arange(16) / 16)
        time = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        high = self.down(self.enter(noisy), time, words)
        low = self.middle(self.smaller(high), time, words)
        back = self.larger(F.interpolate(low, scale_factor=2))
        return self.leave(self.up(torch.cat((back, high), 1), time, words))

    def noised(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * images + (1 - a).sqrt() * noise


def ids_of(template: str, word: str) -> list[int]:
    return [WORDS.index(w) for w in template.format(word).split()]


def images_of(data: digits.Data) -> Tensor:
    """The digits as images [n, 1, 8, 8] with values in [-1, 1]."""
    return 2 * data[0].view(-1, 1, 8, 8) - 1


def train(
    data: digits.Data,
    named: Sequence[int],
    *,
    steps: int = 600,
    width: int = 16,
    size: int = 64,
    seed: int = 0,
) -> Diffusion:
    """A model that knows the digits ``named`` by their names, and all digits as "digit"."""
    torch.manual_seed(seed)
    model = Diffusion(width, size)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    images, labels = images_of(data), data[1].tolist()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        ids = []
        for row in rows.tolist():
            own = labels[row] in named and torch.rand(()) < 0.8
            template = TEMPLATES[int(torch.randint(len(TEMPLATES), ()))]
            ids.append(ids_of(template, NAMES[labels[row]] if own else "digit"))
        t, noise = torch.randint(STEPS, (64,)), torch.randn(64, 1, 8, 8)
        found = model(model.noised(images[rows], t, noise), t, model.words(torch.tensor(ids)))
        optimizer.zero_grad()
        F.mse_loss(found, noise).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


FILE = pathlib.Path(__file__).with_name("unet.safetensors")
NAMED = (0, 1, 2, 4, 5, 6, 8, 9)
KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)


def load(path: pathlib.Path = FILE) -> Diffusion:
    """The model that :func:`main` has trained, in integers of 8 bits."""
    from safetensors.torch import load_file

    model = Diffusion()
    quantize_(model, 8, layers=KINDS)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> None:
    """Trains the model, rounds it to integers of 8 bits and saves it: about 30 s of one core."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=pathlib.Path, default=FILE)
    args = parser.parse_args(argv)
    training, validation = digits.load()
    model = train(training, NAMED, steps=args.steps)
    quantize_(model, 8, layers=KINDS)
    save_file(model.state_dict(), args.output)
    for digit in NAMED:
        errors = [error_of(model, validation, digit, word) for word in ("digit", NAMES[digit])]
        print(f"error on images of a {NAMES[digit]}: {errors[0]:.3f} as a digit, {errors[1]:.3f} by its name")


@torch.no_grad()
def error_of(model: Diffusion, data: digits.Data, digit: int, word: str) -> float:
    """The mean squared error of the predicted noise on images of ``digit`` under "a photo of a ``word``"."""
    generator = torch.Generator().manual_seed(0)
    images = images_of(data)[data[1] == digit].repeat(4, 1, 1, 1)
    t = torch.randint(STEPS, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    words = model.words(torch.tensor([ids_of(TEMPLATES[0], word)])).expand(len(images), -1, -1)
    return F.mse_loss(model(model.noised(images, t, noise), t, words), noise).item()


if __name__ == "__main__":
    main()
