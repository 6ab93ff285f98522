"""The optimizers of zokernels.optim, and one step of each in ordinary PyTorch, in which every z is stored."""

from dataclasses import dataclass, field
from itertools import combinations
from statistics import stdev

import pytest
import torch
from zosgd_cases import combined

import zokernels as zk
from zokernels.optim import FZOO, ZOSGD, ForwardGradient, ZOConservative, ZORankSGD


def two_sided(losses, eps, q):
    return [(losses[2 * k] - losses[2 * k + 1]) / (2 * eps * q) for k in range(q)]


def one_sided(losses, eps, q):
    return [(loss - losses[0]) / (eps * q) for loss in losses[1:]]


def normalized(losses, eps, q):
    return [(loss - losses[0]) / (q * stdev(losses[1:])) for loss in losses[1:]]


def ranked(losses, eps, q, top=2):
    order = sorted(range(q), key=lambda k: losses[k])
    edges = [(i, j) for i, j in combinations(order, 2) if order.index(i) < top]
    return [sum((k == j) - (k == i) for i, j in edges) / len(edges) for k in range(q)]


def pairs(q):
    return [(k, sign) for k in range(q) for sign in (1, -1)]


def from_theta(q):
    return [(0, 0), *((k, 1) for k in range(q))]


@dataclass
class Method:
    make: type
    q: int
    options: dict = field(default_factory=dict)
    points: list = ()
    g: object = None
    conservative: bool = False
    dist: str = "normal"

    def __call__(self, params, **options):
        return self.make(params, **{"lr": 0.05, "eps": 2.0**-5, **self.options, **options})


METHODS = {
    "two-sided": Method(ZOSGD, 3, {"directions": 3}, pairs(3), two_sided),
    "one-sided": Method(ZOSGD, 2, {"directions": 2, "estimator": "one-sided"}, from_theta(2), one_sided),
    "fzoo": Method(FZOO, 4, {"directions": 4}, from_theta(4), normalized, dist="rademacher"),
    "ranking": Method(ZORankSGD, 4, {"candidates": 4, "top": 2}, [(k, 1) for k in range(4)], ranked),
    "conservative": Method(ZOConservative, 2, {"directions": 2}, pairs(2), two_sided, True),
}
FORWARD = {"forward": Method(ForwardGradient, 3, {"directions": 3})}
PERTURBING = pytest.mark.parametrize("method", METHODS)


def restores(method):
    return ("exact",) if method in FORWARD else ("exact", "inplace")


#: Every method, with each way to restore the weights that it has.
CASES = pytest.mark.parametrize(
    ("method", "restore"), [(name, restore) for name in (*METHODS, *FORWARD) for restore in restores(name)]
)


def build(method, params, **options):
    return ({**METHODS, **FORWARD}[method])(params, **options)


def seeds_of(seed, step, q):
    return [zk.contract.seed_to_int64(zk.derive_seed(seed, step, k)) for k in range(q)]


class Weights:
    """theta by name, each z, and what was added to theta: a coefficient for each direction."""

    def __init__(self, theta, seeds, dist, restore):
        self.theta, self.values, self.at, self.restore = theta, dict(theta), {}, restore
        self.z = {
            n: [zk.noise(p.shape, seed=s, stream=zk.stream_of(n), dist=dist) for s in seeds]
            for n, p in theta.items()
        }

    def to(self, point):
        """The weights at ``point``, made from theta or moved there from where they are."""
        start, values = ({}, self.theta) if self.restore == "exact" else (self.at, self.values)
        way = {k: point.get(k, 0.0) - start.get(k, 0.0) for k in {**start, **point}}
        way = {k: c for k, c in way.items() if c}
        if way:
            values = {
                n: combined(p, tuple(self.z[n][k] for k in way), tuple(way.values()))
                for n, p in values.items()
            }
        if self.restore == "inplace":
            self.at, self.values = point, values
        return values


def plain_step(case, theta, loss, step, log, *, seed, lr, eps, weight_decay, dist, rounding, restore):
    """The losses, g in float64 by the formula, and the new weights.  ``loss`` takes the weights by name.

    ``log`` is the optimizer's own fp32 g, from which the weights must follow bit for bit.
    """
    q = case.q
    seeds = seeds_of(seed, step, q)
    weights = Weights(theta, seeds, dist, restore)
    losses = [loss(weights.to({k: sign * eps} if sign else {})) for k, sign in case.points]
    formula = case.g([float(value) for value in losses], eps, q)
    g = [float(torch.tensor(value).float()) for value in formula]
    if case.conservative:
        c = [float(torch.tensor(-lr * value).float()) for value in g]
        tried = [loss(weights.to({k: m * c[k] for k in range(q)} if m else {})) for m in (0, 1, -1)]
        losses += tried
        formula = [value * (0, 1, -1)[tried.index(min(tried))] for value in formula]
    decay = 1 - lr * weight_decay
    new = {
        n: combined(
            weights.values[n],
            tuple(weights.z[n]),
            tuple(-decay * weights.at.get(k, 0.0) - lr * log[k] for k in range(q)),
            decay=decay if weight_decay else None,
            stochastic_seed=seeds[0] if rounding == "stochastic" else None,
            stream=zk.stream_of(n),
        )
        for n in theta
    }
    return losses, formula, new
