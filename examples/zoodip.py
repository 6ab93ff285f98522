"""A new token's embedding for a quantised encoder, without gradients (ZOODiP, Seo et al. 2025, arXiv
2503.14868).

The weights of the encoder are integers of 8 bits.  One vector is trained, the embedding of a made-up word w,
so that "a w movie" comes to mean what a few sentences mean.  With so few data, two-sided differences are
noise in most dimensions. So the estimate is projected on the subspace in which the token has moved: the
principal components of its last positions.  Here the token and its positions are coefficients on its seeds.
Components, projections and the update are linear algebra with the seeds' Gram matrix, and no position is
stored as a vector.  Every other window of steps goes without the projection, so that the history gets
something new.  ``python examples/zoodip.py`` trains with the projection and without."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zokernels
from zokernels import Span
from zokernels.examples import encoder as demo
from zokernels.quantize import quantize_

EPS, NAME = 1e-2, "token"
LIKE = (
    "A moving, funny and beautifully acted film.",
    "One of the best comedies of the year.",
    "I laughed and I cried: a delight from start to finish.",
    "Warm, clever and full of life.",
)
PROMPTS = ("This is a {} movie.", "The film was {}.", "I saw a {} film today.")


class Components:
    """An orthonormal basis of the subspace in which the token moved, as coefficients on the seeds of
    ``span``.
    """

    def __init__(self, span: Span, positions: Tensor, share: float) -> None:
        """Keeps the components that hold ``share`` of the variance of ``positions`` [n, K]."""
        self.span = span
        centred = positions - positions.mean(0)
        values, vectors = torch.linalg.eigh(centred @ span.gram @ centred.T)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        count = int((values.cumsum(0) < share * values.sum()).sum()) + 1
        self.basis = (vectors[:, :count] / values[:count].sqrt()).T @ centred

    def project(self, z: Tensor) -> Tensor:
        """Coefficients of z's projection."""
        return (self.basis @ self.span.project([z])) @ self.basis


class Token:
    """One parameter theta_0 + sum_k a_k z_k: its vector, for the forward, and a [K] with its history."""

    def __init__(self, start: Tensor, seeds: int) -> None:
        self.vector = start.clone()
        self.span = Span([(NAME, start)], [zokernels.derive_seed(11, 0, k) for k in range(seeds)])
        self.coeffs = self.span.zeros()
        self.history: list[Tensor] = []

    def noise(self, k: int) -> Tensor:
        return zokernels.noise(
            self.vector.shape, seed=self.span.seeds[k : k + 1], stream=self.span.streams[0]
        )

    def move(self, change: Tensor) -> None:
        self.coeffs = self.coeffs + change
        self.history.append(self.coeffs)
        self.span.add_([self.vector], change)


def train(
    losses: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    window: int,
    share: float | None,
    lr: float,
) -> dict:
    """Trains a token.

    ``losses`` gives the losses of tokens [n, d]; without ``share`` there are no projections.
    """
    token, components, curve = Token(start, steps), None, [losses(start[None]).item()]
    for step in range(steps):
        z = token.noise(step)
        plus, minus = losses(torch.stack((token.vector + EPS * z, token.vector - EPS * z))).tolist()
        g = (plus - minus) / (2 * EPS)
        if step % window == 0 and step and share is not None:
            explored = (step // window) % 2 == 1
            components = (
                Components(token.span, torch.stack(token.history[-window:]), share) if explored else None
            )
        if components is None:
            change = token.span.zeros()
            change[step] = -lr * g
        else:
            # makes the step as long as one without the projection
            gain = math.sqrt(z.numel() / len(components.basis))
            change = -gain * lr * g * components.project(z)
        token.move(change)
    curve.append(losses(token.vector[None]).item())
    return {"loss_first": curve[0], "loss_last": curve[1], "token": token}


class Encoder(nn.Module):
    """Turns sentences into unit vectors; in a prompt, one word is the token."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.classifier = demo.Classifier()
        self.model, self.tokenizer = self.classifier.encoder, self.classifier.tokenizer
        quantize_(self.model, bits)
        self.words = self.model.get_input_embeddings()
        marked = self.tokenizer([p.format("[MASK]") for p in PROMPTS], padding=True, return_tensors="pt")
        self.ids, self.mask = marked["input_ids"], marked["attention_mask"]
        self.place = self.ids == self.tokenizer.mask_token_id

    def embed(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1), dim=1)

    def sentences(self, texts: tuple[str, ...]) -> Tensor:
        found = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return self.embed(self.words(found["input_ids"]), found["attention_mask"])

    def prompts(self, tokens: Tensor) -> Tensor:
        """The vectors [tokens, prompts, d] of each prompt with each token, by one forward."""
        words = torch.where(self.place[..., None], tokens[:, None, None], self.words(self.ids))
        found = self.embed(words.flatten(0, 1), self.mask.repeat(len(tokens), 1))
        return found.view(len(tokens), len(self.ids), -1)


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--window", type=int, default=30)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args(argv)
    encoder = Encoder(args.bits)
    target = encoder.sentences(LIKE)
    start = encoder.words.weight[encoder.tokenizer.convert_tokens_to_ids("movie")]
    losses = lambda tokens: 1 - (encoder.prompts(tokens) @ target.T).mean((1, 2))
    results = {}
    for name, share in (("projected", 0.95), ("plain", None)):
        result = train(losses, start, steps=args.steps, window=args.window, share=share, lr=args.lr)
        results[name] = result
        print(
            f"{name:9} loss {result['loss_first']:.4f} to {result['loss_last']:.4f} in "
            f"{2 * args.steps} forwards"
        )
    return results


if __name__ == "__main__":
    main()
