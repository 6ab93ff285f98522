"""Each method as its authors' trainers run it: eager torch, a z from torch's global generator for every use.

They repeat the published operations, but not mistakes of the published code (a second z, the same z for every
tensor, a mask made of perturbed weights), so that a ratio of times compares kernels alone.  As ours, a step
takes the parameters and a closure.  Between steps each keeps what its authors keep, such as moments, masks or
factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..baselines import draw

Closure = Callable[[], Tensor | float]


class Eager:
    """theta + c z, tensor after tensor, and the plain step of SPSA.

    Subclasses change z, the points or the rule.
    """

    dist = "normal"

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], lr: float = 1e-6, eps: float = 1e-3, **options: object
    ) -> None:
        self.named, self.params = list(named), [p for _, p in named]
        self.lr, self.eps, self.step_count = lr, eps, 0
        self.setup(**options)

    def setup(self) -> None:
        """Makes what the method keeps between steps."""

    def seed(self, k: int = 0) -> int:
        return 1_000_003 * self.step_count + k

    def noises(self, seed: int):
        """Yields (parameter, z) of every tensor that the step moves."""
        torch.manual_seed(seed)
        for p in self.params:
            yield p, draw(p.data, self.dist)

    def perturb(self, seed: int, scaling: float) -> None:
        for p, z in self.noises(seed):
            p.data = p.data + scaling * z * self.eps

    def apply(self, seed: int, g: float) -> None:
        for p, z in self.noises(seed):
            p.data = p.data - self.lr * (g * z)

    def two_sided(self, closure: Closure, k: int = 0) -> float:
        """The projected gradient g.  The weights are back where they were."""
        seed = self.seed(k)
        self.perturb(seed, 1)
        plus = float(closure())
        self.perturb(seed, -2)
        minus = float(closure())
        self.perturb(seed, 1)
        return (plus - minus) / (2 * self.eps)

    def one_sided(self, closure: Closure, k: int = 0) -> float:
        """The loss L(theta + eps z); afterwards the weights are moved back."""
        seed = self.seed(k)
        self.perturb(seed, 1)
        loss = float(closure())
        self.perturb(seed, -1)
        return loss

    def step(self, closure: Closure) -> None:
        with torch.no_grad():
            self.run(closure)
        self.step_count += 1

    def run(self, closure: Closure) -> None:
        g = self.two_sided(closure)
        self.apply(self.seed(), g)


class Rademacher(Eager):
    dist = "rademacher"


class Decay(Eager):
    def apply(self, seed: int, g: float) -> None:
        for p, z in self.noises(seed):
            p.data = p.data - self.lr * (g * z + 0.1 * p.data)


class OneSided(Eager):
    def run(self, closure: Closure) -> None:
        base = float(closure())
        self.apply(self.seed(), (self.one_sided(closure) - base) / self.eps)


class ManyDirections(Eager):
    """n-SPSA: q pairs of forwards, then q update passes."""

    def setup(self, directions: int) -> None:
        self.directions = directions

    def run(self, closure: Closure) -> None:
        gs = [self.two_sided(closure, k) for k in range(self.directions)]
        for k, g in enumerate(gs):
            self.apply(self.seed(k), g / self.directions)


class FZOO(ManyDirections):
    dist = "rademacher"

    def run(self, closure: Closure) -> None:
        base = float(closure())
        losses = torch.tensor([self.one_sided(closure, k) for k in range(self.directions)])
        sigma = losses.std().item() + 1e-8
        for k, loss in enumerate(losses.tolist()):
            self.apply(self.seed(k), (loss - base) / (self.directions * sigma))


class ES(ManyDirections):
    """ES at scale: z-scores of the population's losses."""

    def run(self, closure: Closure) -> None:
        losses = torch.tensor([self.one_sided(closure, k) for k in range(self.directions)])
        scores = (losses - losses.mean()) / (losses.std(correction=0) + 1e-8)
        for k, score in enumerate(scores.tolist()):
            self.apply(self.seed(k), score / self.directions)


class Guided(ManyDirections):
    """MeZO-GV: a pass for each candidate, then the guiding vector, a z at a time, in each move along it."""

    def run(self, closure: Closure) -> None:
        losses, q = [self.one_sided(closure, k) for k in range(self.directions)], self.directions
        top = sorted(range(q), key=losses.__getitem__)[: q // 2]
        weights = [2 / q if k in top else -2 / q for k in range(q)]
        pair = []
        for move in (1, -2, 1):
            for k, w in enumerate(weights):
                self.perturb(self.seed(k), move * w)
            if move != 1 or not pair:
                pair.append(float(closure()))
        g = (pair[0] - pair[1]) / (2 * self.eps)
        for k, w in enumerate(weights):
            self.apply(self.seed(k), g * w)


class Bayesian(ManyDirections):
    """BSZO: one-sided differences, and their posterior mean, a number a direction."""

    def run(self, closure: Closure) -> None:
        base = float(closure())
        for k in range(self.directions):
            y = (self.one_sided(closure, k) - base) / self.eps
            self.apply(self.seed(k), y / 2)


class Ranking(ManyDirections):
    def run(self, closure: Closure) -> None:
        losses = [self.one_sided(closure, k) for k in range(self.directions)]
        order, m = sorted(range(self.directions), key=losses.__getitem__), self.directions
        for rank, k in enumerate(order):
            self.apply(self.seed(k), (2 * rank - (m - 1)) / (m * (m - 1) / 2))


class RankSearch(ManyDirections):
    """Ranks, then a line search along their direction, which moves the weights from point to point."""

    def move(self, by: float, coefficients: list[float]) -> None:
        for k, w in enumerate(coefficients):
            for p, z in self.noises(self.seed(k)):
                p.data = p.data - by * (w * z)

    def run(self, closure: Closure) -> None:
        losses, m = [self.one_sided(closure, k) for k in range(self.directions)], self.directions
        order, w = sorted(range(m), key=losses.__getitem__), [0.0] * m
        for rank, k in enumerate(order):
            w[k] = (2 * rank - (m - 1)) / (m * (m - 1) / 2)
        searched = []
        for j in range(5):
            self.move(self.lr * 0.5**j, w)
            searched.append(float(closure()))
            self.move(-self.lr * 0.5**j, w)
        searched.append(self.one_sided(closure, order[0]))
        theta = float(closure())
        best = min(range(6), key=searched.__getitem__)
        if searched[best] < theta:
            if best < 5:
                self.move(self.lr * 0.5**best, w)
            else:
                self.perturb(self.seed(order[0]), 1)


class Consensus(ManyDirections):
    def run(self, closure: Closure) -> None:
        losses = torch.tensor([self.one_sided(closure, k) for k in range(self.directions)])
        for k, w in enumerate(torch.softmax(-10 * losses, 0).tolist()):
            self.apply(self.seed(k), -self.eps * w)


class Conservative(Eager):
    """The best of theta, theta - lr g z and theta + lr g z."""

    def run(self, closure: Closure) -> None:
        g, seed = self.two_sided(closure), self.seed()
        losses = [float(closure())]
        self.apply(seed, g)
        losses.append(float(closure()))
        self.apply(seed, -2 * g)
        losses.append(float(closure()))
        best = min(range(3), key=losses.__getitem__)
        self.apply(seed, (g, 2 * g, 0.0)[best])


class Sign(Eager):
    def apply(self, seed: int, g: float) -> None:
        for p, z in self.noises(seed):
            p.data = p.data - self.lr * torch.sign(g * z)


class Momentum(Eager):
    def setup(self, momentum: float = 0.9) -> None:
        self.momentum, self.buffers = (
            momentum,
            [torch.zeros_like(p, dtype=torch.float32) for p in self.params],
        )

    def apply(self, seed: int, g: float) -> None:
        for (p, z), m in zip(self.noises(seed), self.buffers, strict=True):
            m.mul_(self.momentum).add_(g * z)
            p.data = p.data - self.lr * m.to(p.dtype)


class Adam(Eager):
    """Adam by torch's formula, on the gradient g z, which is stored for it."""

    def setup(self, betas: tuple[float, float] = (0.9, 0.999), l2: float = 0.0) -> None:
        self.betas, self.l2 = betas, l2
        self.m, self.v = ([torch.zeros_like(p, dtype=torch.float32) for p in self.params] for _ in range(2))

    def apply(self, seed: int, g: float) -> None:
        (b1, b2), t = self.betas, self.step_count + 1
        for (p, z), m, v in zip(self.noises(seed), self.m, self.v, strict=True):
            gradient = (g * z).float()
            if self.l2:
                gradient = gradient.add_(p, alpha=self.l2)
            m.mul_(b1).add_(gradient, alpha=1 - b1)
            v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            denominator = (v / (1 - b2**t)).sqrt_().add_(1e-8)
            p.data = p.data - (self.lr / (1 - b1**t) * (m / denominator)).to(p.dtype)


class WindowMomentum(Eager):
    """Momentum from the last h pairs (seed, g), which takes h draws and passes."""

    def setup(self, window: int, momentum: float = 0.9) -> None:
        self.window, self.momentum, self.history = window, momentum, []

    def apply(self, seed: int, g: float) -> None:
        self.history = [*self.history, (seed, g)][-self.window :]
        for age, (old, g_old) in enumerate(reversed(self.history)):
            super().apply(old, self.momentum**age * g_old)


class WindowAdam(Eager):
    """Adam's moments rebuilt from the last h (seed, g) in two temporaries of the model's size."""

    def setup(self, window: int, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.window, self.betas, self.history = window, betas, []

    def apply(self, seed: int, g: float) -> None:
        self.history = [*self.history, (seed, g)][-self.window :]
        m, v = ([torch.zeros_like(p, dtype=torch.float32) for p in self.params] for _ in range(2))
        b1, b2 = self.betas
        n = len(self.history)
        for age, (old, g_old) in enumerate(reversed(self.history)):
            for i, (_, z) in enumerate(self.noises(old)):
                gradient = (g_old * z).float()
                m[i].add_(gradient, alpha=(1 - b1) * b1**age / (1 - b1**n))
                v[i].addcmul_(gradient, gradient, value=(1 - b2) * b2**age / (1 - b2**n))
        for p, mean, square in zip(self.params, m, v, strict=True):
            p.data = p.data - (self.lr * mean / (square.sqrt() + 1e-8)).to(p.dtype)


class HiZOO(Eager):
    """Three losses; perturbation and update scaled by the root of a diagonal curvature."""

    def setup(self, smooth: float = 1e-6) -> None:
        self.smooth, self.h = smooth, [torch.ones_like(p) for p in self.params]

    def perturb(self, seed: int, scaling: float) -> None:
        for (p, z), h in zip(self.noises(seed), self.h, strict=True):
            p.data = p.data + scaling / torch.sqrt(h) * z * self.eps

    def run(self, closure: Closure) -> None:
        base, seed = float(closure()), self.seed()
        self.perturb(seed, 1)
        plus = float(closure())
        self.perturb(seed, -2)
        minus = float(closure())
        self.perturb(seed, 1)
        g, bend = (plus - minus) / (2 * self.eps), abs(plus + minus - 2 * base)
        for i, (p, z) in enumerate(self.noises(seed)):
            estimate = bend * (self.h[i] * z * z) * self.smooth / (2 * self.eps**2)
            self.h[i] = (1 - self.smooth) * self.h[i] + estimate
            p.data = p.data - self.lr * (g * z / torch.sqrt(self.h[i]))


class Masked(Eager):
    """Sparse-MeZO: thresholds of the model at the start, and at each step a bool mask of the weights
    below them.
    """

    def setup(self, sparsity: float = 0.75) -> None:
        self.thresholds = [p.abs().float().quantile(1 - sparsity) if p.numel() < 2**24 else torch.tensor(1e-2)
                           for p in self.params]  # fmt: skip

    def run(self, closure: Closure) -> None:
        self.masks = [p.abs() <= t.to(p.device) for p, t in zip(self.params, self.thresholds, strict=True)]
        super().run(closure)

    def noises(self, seed: int):
        for (p, z), mask in zip(super().noises(seed), self.masks, strict=True):
            yield p, z * mask


class RandomMasked(Eager):
    """A mask of given density, drawn anew in every pass from a seed of its own."""

    def setup(self, density: float = 0.25) -> None:
        self.density, self.generator = density, torch.Generator(self.params[0].device)

    def noises(self, seed: int):
        self.generator.manual_seed(1)
        for p, z in super().noises(seed):
            keep = torch.rand(p.shape, generator=self.generator, device=p.device) < self.density
            yield p, z * keep


class Subset(Eager):
    """Only some tensors move in a step: one layer, or what is in none, in turn (BCD); or that and ``kept``
    layers.
    """

    def setup(self, kept: int = 0) -> None:
        of = lambda name: int(name.split(".")[1]) if name.startswith("layers.") else None
        self.kept, self.layer = kept, [of(name) for name, _ in self.named]
        self.count, self.all = 1 + max(layer for layer in self.layer if layer is not None), self.params

    def run(self, closure: Closure) -> None:
        turn = self.step_count
        if self.kept:
            chosen = {None, *((turn + i) % self.count for i in range(self.kept))}
        else:
            chosen = {[*range(self.count), None][turn % (self.count + 1)]}
        self.params = [p for p, layer in zip(self.all, self.layer, strict=True) if layer in chosen]
        super().run(closure)
        self.params = self.all


class TensorScaled(Eager):
    """z times the root mean square of its tensor, measured once."""

    def setup(self) -> None:
        self.scales = [p.float().square().mean().sqrt().item() for p in self.params]

    def noises(self, seed: int):
        for (p, z), scale in zip(super().noises(seed), self.scales, strict=True):
            yield p, z * scale


class Sphere(Eager):
    """z sqrt(d) / |z|: one more draw of everything for the norm."""

    def noises(self, seed: int):
        total = sum(z.float().square().sum() for _, z in super().noises(seed))
        scale = math.sqrt(sum(p.numel() for p in self.params)) / total.sqrt().item()
        for p, z in super().noises(seed):
            yield p, z * scale


class LowRank(Eager):
    """Matrices move by a product of factors, made dense in every pass; the rest as in MeZO."""

    def setup(self, rank: int = 4) -> None:
        self.rank = rank
        self.kept = [self.keep(p) if p.dim() >= 2 else None for p in self.params]

    def keep(self, p: Tensor) -> tuple[Tensor, ...]:
        """What is kept of a matrix from step to step."""
        raise NotImplementedError

    def product(self, p: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError

    def noises(self, seed: int):
        torch.manual_seed(seed)
        for p, kept in zip(self.params, self.kept, strict=True):
            yield p, draw(p.data, "normal") if kept is None else self.product(p, kept).view_as(p)

    def randn(self, p: Tensor, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=p.dtype, device=p.device)


class LOZO(LowRank):
    def keep(self, p: Tensor) -> tuple[Tensor, ...]:
        return (self.randn(p, p[0].numel(), self.rank),)

    def product(self, p: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return self.randn(p, p.shape[0], self.rank) @ kept[0].t() / self.rank**0.5


class SubZero(LowRank):
    def keep(self, p: Tensor) -> tuple[Tensor, ...]:
        left, right = (torch.linalg.qr(torch.randn(n, self.rank)).Q.to(p) for n in (p.shape[0], p[0].numel()))
        return left, right

    def product(self, p: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        left, right = kept
        return left @ self.randn(p, self.rank, self.rank) @ right.t()


class TeZO(LowRank):
    def keep(self, p: Tensor) -> tuple[Tensor, ...]:
        return self.randn(p, p.shape[0], self.rank), self.randn(p, p[0].numel(), self.rank)

    def product(self, p: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        left, right = kept
        return (left * self.randn(p, self.rank)) @ right.t()


class EGGROLL(LowRank):
    def keep(self, p: Tensor) -> tuple[Tensor, ...]:
        return ()

    def product(self, p: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        left = self.randn(p, p.shape[0], self.rank)
        return left @ self.randn(p, p[0].numel(), self.rank).t() / self.rank**0.5


class Coordinatewise(Eager):
    """CGE: one coordinate at a time, forward differences; then the sparse gradient."""

    def setup(self, coordinates: int = 64) -> None:
        self.coordinates = coordinates

    def run(self, closure: Closure) -> None:
        base = float(closure())
        total = sum(p.numel() for p in self.params)
        chosen = torch.randperm(min(total, 1 << 20), generator=torch.Generator().manual_seed(self.seed()))
        gradients = [torch.zeros_like(p) for p in self.params]
        bounds = torch.tensor([p.numel() for p in self.params]).cumsum(0)
        for flat in chosen[: self.coordinates].tolist():
            i = int(torch.searchsorted(bounds, flat, right=True))
            p, at = self.params[i].data.view(-1), flat - (int(bounds[i - 1]) if i else 0)
            old = p[at].clone()
            p[at] += self.eps
            gradients[i].view(-1)[at] = (float(closure()) - base) / self.eps
            p[at] = old
        for p, gradient in zip(self.params, gradients, strict=True):
            p.data = p.data - self.lr * gradient


class Floored(Eager):
    """QZO: a clipped derivative, and scales that stay above 1e-7."""

    def apply(self, seed: int, g: float) -> None:
        super().apply(seed, max(-100.0, min(100.0, g)))
        for p in self.params:
            p.data = p.data.clamp(min=1e-7)


class QuZO(Eager):
    """int8 weights: z scaled to steps, rounded stochastically; the update with bits of its own."""

    def moved(self, q: Tensor, z: Tensor) -> Tensor:
        return (q + torch.floor(z + torch.rand_like(z))).clamp(-127, 127).to(torch.int8)

    def noises(self, seed: int):
        torch.manual_seed(seed)
        for p in self.params:
            yield p, torch.randn(p.shape, device=p.device)

    def run(self, closure: Closure) -> None:
        kept, losses = [p.data.clone() for p in self.params], []
        for sign in (1, -1):
            for (p, z), q in zip(self.noises(self.seed()), kept, strict=True):
                p.data = self.moved(q, sign * self.eps * z)
            losses.append(float(closure()))
        g = (losses[0] - losses[1]) / (2 * self.eps)
        for (p, z), q in zip(self.noises(self.seed()), kept, strict=True):
            p.data = self.moved(q, -self.lr * g * z)


def forward_gradient(
    model: Callable[..., Tensor], params: dict[str, Tensor], lr: float
) -> Callable[[int], None]:
    """theta -= lr (jvp along z) z with z of the whole model in memory; ``model``: loss of a dict of
    parameters.
    """

    def step(seed: int) -> None:
        torch.manual_seed(seed)
        z = {name: torch.randn_like(p) for name, p in params.items()}
        _, g = torch.func.jvp(model, (params,), (z,))
        with torch.no_grad():
            for name, p in params.items():
                p -= lr * g * z[name]

    return step


def black_box(f: Callable[[Tensor], Tensor], x: Tensor, mu: float, directions: int) -> Tensor:
    """Gradient of sum f by one-sided random directions for each sample, with every z in memory."""
    z = torch.randn(directions, *x.shape)
    losses = f((x + mu * z).flatten(0, 1)).view(directions, len(x))
    weights = (losses - f(x)) / (mu * directions)
    return (weights.view(directions, len(x), *[1] * (x.dim() - 1)) * z).sum(0)


def black_box_coordinates(f: Callable[[Tensor], Tensor], x: Tensor, mu: float) -> Tensor:
    """The gradient of ``f`` at ``x`` by forward differences along one coordinate after the other."""
    base, gradient = f(x), torch.empty_like(x).flatten(1)
    for i in range(gradient.shape[1]):
        moved = x.clone()
        moved.flatten(1)[:, i] += mu
        gradient[:, i] = (f(moved) - base) / mu
    return gradient.view_as(x)


class EGGROLLPairs(EGGROLL, ManyDirections):
    """q antithetic pairs, each product made dense in every pass."""

    def setup(self, directions: int, rank: int = 1) -> None:
        ManyDirections.setup(self, directions)
        LowRank.setup(self, rank)

    def run(self, closure: Closure) -> None:
        losses = []
        for k in range(self.directions):
            seed = self.seed(k)
            for move in (1, -2):
                self.perturb(seed, move)
                losses.append(float(closure()))
            self.perturb(seed, 1)
        found = torch.tensor(losses)
        fitness = (
            (found - found.mean()) / (found.var(correction=0) + 1e-5).sqrt() * self.eps / len(losses) ** 0.5
        )
        for k, (plus, minus) in enumerate(fitness.view(-1, 2).tolist()):
            self.apply(self.seed(k), plus - minus)


class Cone(Eager):
    """ConMeZO: z is made of the stored momentum and a fresh u in each use; then the momentum takes g z."""

    def setup(self, beta: float = 0.99, angle: float = 1.35) -> None:
        self.momenta = [torch.zeros_like(p.data) for p in self.params]
        self.beta, self.angle, self.size = beta, angle, 0.0

    def noises(self, seed: int):
        torch.manual_seed(seed)
        toward, across = (math.cos(self.angle) / self.size, math.sin(self.angle)) if self.size else (0.0, 1.0)
        for p, m in zip(self.params, self.momenta, strict=True):
            yield p, toward * m + across * draw(p.data, self.dist)

    def run(self, closure: Closure) -> None:
        g = self.two_sided(closure)
        self.apply(self.seed(), g)
        toward, across = (math.cos(self.angle) / self.size, math.sin(self.angle)) if self.size else (0.0, 1.0)
        for m, (_, z) in zip(self.momenta, self.noises(self.seed()), strict=True):
            m.copy_(self.beta * m + (1 - self.beta) * g * z)
        along = (self.beta + (1 - self.beta) * g * toward) * self.size
        self.size = math.hypot(along, (1 - self.beta) * g * across)


class Covariance(ManyDirections):
    """LOREN: z = u - alpha a, with a pass over u for the projection on a in each use; then momentum and a."""

    def setup(self, directions: int, damping: float = 0.1, beta: float = 0.9) -> None:
        self.directions, self.damping, self.beta = directions, damping, beta
        self.axes = [torch.randn(p.shape[-1], dtype=p.dtype, device=p.device) for p in self.params]
        self.momenta = [torch.zeros_like(p.data) for p in self.params]

    def noises(self, seed: int):
        torch.manual_seed(seed)
        for p, a in zip(self.params, self.axes, strict=True):
            u, tiled = draw(p.data, self.dist), a.expand_as(p)
            s, dot = (tiled * tiled).sum(), (tiled * u).sum()
            root = (self.damping + s).sqrt()
            yield p, u - (self.damping**0.5 + root) * dot / (s * root) * tiled

    def run(self, closure: Closure) -> None:
        losses = torch.tensor([self.one_sided(closure, k) for k in range(self.directions)])
        weights = ((losses - losses.mean()) / (self.eps * (self.directions - 1))).tolist()
        for k, g in enumerate(weights):
            for m, a, (p, z) in zip(self.momenta, self.axes, self.noises(self.seed(k)), strict=True):
                m.copy_(self.beta * m + g * z)
                p.data = p.data - self.lr * m
                a.sub_(1e-3 * g * self.eps**3 * z.reshape(-1, len(a)).sum(0))


class Sampled(Eager):
    """CurvZO: two fifths of the tensors by their scores; the update divides by the probabilities."""

    def setup(self, ratio: float = 0.4) -> None:
        self.scores, self.ratio, self.mean = torch.full((len(self.params),), 0.01), ratio, 1e-8

    def noises(self, seed: int):
        torch.manual_seed(seed)
        for i in self.chosen:
            yield self.params[i], draw(self.params[i].data, self.dist)

    def run(self, closure: Closure) -> None:
        share = self.scores / self.scores.sum()
        self.chance = (max(1, int(len(share) * self.ratio)) * share).clamp(max=1)
        torch.manual_seed(self.seed())
        self.chosen = (torch.rand(len(share)) < self.chance).nonzero().flatten().tolist() or [
            int(self.chance.argmax())
        ]
        g = self.two_sided(closure)
        self.mean = 0.9 * self.mean + 0.1 * abs(g)
        energies = []
        for i, (p, z) in zip(self.chosen, self.noises(self.seed()), strict=True):
            p.data = p.data - self.lr * (g / self.chance[i].item() * z)
            energies.append(z.float().square().sum() / self.chance[i] ** 2)
        total = sum(energies)
        for i, energy in zip(self.chosen, energies, strict=True):
            self.scores[i] = 0.9 * self.scores[i] + 0.1 * abs(g) / self.mean * energy / total


class GradientSpace(Eager):
    """P-GAP: z = U Z V^T in the space of a gradient that is estimated along dense noise from time to time."""

    def setup(self, rank: int = 8, interval: int = 100, probes: int = 4) -> None:
        self.rank, self.interval, self.probes, self.spaces = rank, interval, probes, {}

    def noises(self, seed: int):
        torch.manual_seed(seed)
        for i, p in enumerate(self.params):
            if i not in self.spaces:
                yield p, draw(p.data, self.dist)
                continue
            u, s, v = self.spaces[i]
            z = torch.randn(len(s), len(s), dtype=p.dtype, device=p.device)
            norm = s.norm()
            z.diagonal().sub_(((z.diagonal() * s).sum() - norm) / norm**2 * s)
            yield p, u @ z @ v.t()

    def run(self, closure: Closure) -> None:
        if self.step_count % self.interval == 0:
            self.spaces = {}
            gradients = [torch.zeros_like(p.data, dtype=torch.float32) for p in self.params]
            for k in range(1, self.probes + 1):
                g = self.two_sided(closure, k)
                for gradient, (_, z) in zip(gradients, self.noises(self.seed(k)), strict=True):
                    gradient += g * z
            for i, (p, gradient) in enumerate(zip(self.params, gradients, strict=True)):
                if p.dim() == 2:
                    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
                    parts = u[:, : self.rank], s[: self.rank], v[: self.rank].t()
                    self.spaces[i] = tuple(t.to(p.dtype) for t in parts)
        super().run(closure)


class Activations(Eager):
    """AGZO: z = R A^T for the layers of ``model``, whose inputs a hook sees in the forward at theta."""

    def setup(self, model: torch.nn.Module, rank: int = 16, iterations: int = 3) -> None:
        self.rank, self.iterations, self.spaces = rank, iterations, {}
        self.layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]

    def measure(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        h = inputs[0].reshape(-1, module.in_features)
        basis = torch.randn(h.shape[1], min(self.rank, *h.shape))
        for _ in range(self.iterations):
            basis = torch.linalg.qr(h.t() @ (h @ torch.linalg.qr(basis).Q)).Q
        self.spaces[id(module.weight)] = basis

    def noises(self, seed: int):
        torch.manual_seed(seed)
        for p in self.params:
            if (basis := self.spaces.get(id(p))) is None:
                yield p, draw(p.data, self.dist)
            else:
                yield p, torch.randn(p.shape[0], basis.shape[1]) @ basis.t()

    def run(self, closure: Closure) -> None:
        hooks = [layer.register_forward_pre_hook(self.measure) for layer in self.layers]
        base = float(closure())
        for hook in hooks:
            hook.remove()
        self.apply(self.seed(), (self.one_sided(closure) - base) / self.eps)


class QES(ManyDirections):
    """Integer codes, rounded noise drawn again for the update, and a residual in half precision."""

    def setup(self, directions: int, decay: float = 0.9) -> None:
        self.directions, self.decay = directions, decay
        self.residuals = [(torch.rand(p.shape) - 0.5).half() for p in self.params]

    def steps(self, p: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        scaled = torch.randn(p.shape) * self.eps
        floor = scaled.floor()
        step = (floor + torch.bernoulli(scaled - floor)).to(torch.int32)
        moved = p.to(torch.int32) + step
        return step.masked_fill((moved > 127) | (moved < -127), 0)

    def run(self, closure: Closure) -> None:
        losses = []
        for k in range(self.directions):
            kept = [p.clone() for p in self.params]
            for p in self.params:
                p.copy_((p.to(torch.int32) + self.steps(p, self.seed(k))).to(torch.int8))
            losses.append(float(closure()))
            for p, before in zip(self.params, kept, strict=True):
                p.copy_(before)
        scores = torch.tensor(losses)
        scores = (scores - scores.mean()) / (scores.std(correction=0) + 1e-8)
        for p, residual in zip(self.params, self.residuals, strict=True):
            gradient = torch.zeros(p.shape)
            for k, score in enumerate(scores.tolist()):
                gradient.add_(self.steps(p, self.seed(k)).float(), alpha=score)
            step = -self.lr / self.directions / self.eps * gradient + self.decay * residual.float()
            moves = step.round()
            q = p.float() + moves
            moves = torch.where(q.abs() <= 127, moves, torch.zeros_like(moves))
            p.copy_((p.float() + moves).to(torch.int8))
            residual.copy_((step - moves).clamp(-1.5, 1.5))
