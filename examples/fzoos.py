"""Federated descent along surrogate gradients, whose points are kept as coefficients (FZooS, Shu et al.
2024).

Several clients have data of their own and may only ask for losses.  Each keeps a Gaussian process of the
points that it has queried, whose mean has a gradient that costs no query:

    grad mu(x) = sum_i w_i k(x, x_i) (x_i - x) / l^2,    w = (K + s I)^-1 (f - mean),
    k(x, x') = exp(-|x - x'|^2 / 2 l^2).

In a round, client i starts from the server's x and takes a few steps along

    grad mu_i(x) + gamma_t (grad mu(x) - grad mu_i0(x)),   gamma_t = 1 / (t + 1),

where mu is the mean of all clients' surrogates at the beginning of the round and mu_i0 its own then (adaptive
correction: what its data lack of the others' is added, less and less with each local step t, as the surrogate
ages).  After each step it queries its new x, and a point close by at which the surrogate's gradient is the
most uncertain (active queries).  At the end of a round the server averages the clients' points, and l is
refitted by the likelihood of the queries.

The process needs only distances and differences of points, and its gradient lies in their span.  So a point x
= theta_0 + sum_k a_k z_k is stored as its a, and distances come from the Gram matrix of the seeds.  A history
of hundreds of points of any model takes a few kB, and so do the surrogates that clients share.  With
``--features M`` they share random Fourier features instead, as in the paper: weights v [M] with mu(x) =
sqrt(2 / M) sum_m v_m cos(<w_m, x> + b_m), which tell nobody the points that were queried.

``python examples/fzoos.py`` compares this with FedZO (Fang et al. 2022: the same local steps along finite
differences) at equal numbers of queries, over several seeds; ``--plot FILE`` draws it (arXiv 2308.04077)."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels import Span
from zokernels.examples import digits


class BlackBox:
    """A function from a to the loss of theta_0 + sum_k a_k z_k on some data, which counts its calls."""

    def __init__(self, model: nn.Module, span: Span, data: digits.Data) -> None:
        self.model, self.span, self.data, self.queries = model, span, data, 0
        self.base = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def __call__(self, a: Tensor) -> float:
        self.queries += 1
        params = list(self.model.parameters())
        for p, b in zip(params, self.base, strict=True):
            p.copy_(b)
        self.span.add_(params, a)
        return F.cross_entropy(self.model(self.data[0]), self.data[1]).item()


class Surrogate:
    """The Gaussian process over the last ``keep`` queries: their points [n, K] and values [n]."""

    def __init__(self, span: Span, length: float, keep: int, noise: float = 1e-4) -> None:
        self.span, self.length, self.keep, self.noise = span, length, keep, noise
        self.points, self.values = span.zeros(0), torch.zeros(0, dtype=torch.float64)

    def add(self, a: Tensor, value: float) -> None:
        self.points = torch.cat((self.points, a[None]))[-self.keep :]
        self.values = torch.cat((self.values, torch.tensor([value], dtype=torch.float64)))[-self.keep :]

    def kernel(self, a: Tensor, b: Tensor, length: float | None = None) -> Tensor:
        return torch.exp(-0.5 * (self.span.distances(a, b) / (length or self.length)).square())

    def _factor(self, length: float | None = None) -> Tensor:
        """The Cholesky factor of K + s I."""
        covariance = self.kernel(self.points, self.points, length)
        return torch.linalg.cholesky(
            covariance + self.noise * torch.eye(len(covariance), dtype=torch.float64)
        )

    def _centred(self) -> Tensor:
        return (self.values - self.values.mean())[:, None]

    def fit(self) -> Tensor:
        """The weights w of the process."""
        return torch.cholesky_solve(self._centred(), self._factor())[:, 0]

    def refit_length(self) -> None:
        """Takes half, the same or twice the length, whichever makes the values the most likely.

        The likelihood is that of a process with the best scale: -n / 2 log(f^T (K + s I)^-1 f) - 1/2 log det.
        """

        def likelihood(length: float) -> float:
            factor, f = self._factor(length), self._centred()
            fitted = (f * torch.cholesky_solve(f, factor)).sum().clamp(min=1e-300)
            return (-0.5 * len(f) * fitted.log() - factor.diagonal().log().sum()).item()

        self.length = max((self.length * c for c in (1.0, 0.5, 2.0)), key=likelihood)

    def gradient(self, a: Tensor, weights: Tensor) -> Tensor:
        """The coefficients of grad mu(x)."""
        scaled = weights * self.kernel(a[None], self.points)[0]
        return (scaled @ self.points - scaled.sum() * a) / self.length**2

    def uncertainty(self, candidates: Tensor) -> Tensor:
        """tr Cov[grad f(x)] of the process at each of ``candidates`` [C, K], up to a constant and a factor:
        -tr J^T (K + s I)^-1 J with the rows J_i = k(x, x_i) (x_i - x) / l^2.
        """
        factor = self._factor()
        found = []
        for a in candidates:
            rows = self.kernel(a[None], self.points)[0][:, None] * (self.points - a) / self.length**2
            solved = torch.cholesky_solve(rows, factor)
            found.append(-self.span.dot(rows, solved).sum())
        return torch.stack(found)

    def shared(self) -> Callable[[Tensor], Tensor]:
        """grad mu as it is now, a function of a: what a client sends, its points and their weights."""
        frozen = Surrogate(self.span, self.length, self.keep)
        frozen.points, frozen.values, weights = self.points, self.values, self.fit()
        return lambda a: frozen.gradient(a, weights)


class Features:
    """Random Fourier features of the kernel in the span, the same for all clients.

    phi_m(x) = sqrt(2 / M) cos(<w_m, u> + b_m), where u = a L with L L^T the Gram matrix has the distances of
    x, and w_m is drawn from N(0, 1 / l^2): E <phi(x), phi(x')> = k(x, x') (Rahimi and Recht, 2007).
    """

    def __init__(self, span: Span, length: float, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.root = torch.linalg.cholesky(span.gram)
        self.waves = torch.randn(len(span), count, generator=generator, dtype=torch.float64) / length
        self.shifts = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)

    def of(self, a: Tensor) -> Tensor:
        """The features phi of points [n, K], as [n, M]."""
        return (2 / len(self.shifts)) ** 0.5 * torch.cos(a @ self.root @ self.waves + self.shifts)

    def weights(self, surrogate: Surrogate) -> Tensor:
        """v [M], the ridge regression of the surrogate's values on the features: all that a client sends."""
        phi = self.of(surrogate.points)
        inner = phi @ phi.T + surrogate.noise * torch.eye(len(phi), dtype=torch.float64)
        return phi.T @ torch.linalg.solve(inner, surrogate._centred())[:, 0]

    def gradient(self, v: Tensor) -> Callable[[Tensor], Tensor]:
        """The coefficients of the gradient of sum_m v_m phi_m, a function of a."""

        def gradient(a: Tensor) -> Tensor:
            slopes = -v * (2 / len(self.shifts)) ** 0.5 * torch.sin(a @ self.root @ self.waves + self.shifts)
            in_u = self.waves @ slopes
            # A vector whose u is in_u has the coefficients in_u L^-1.
            return torch.linalg.solve_triangular(self.root, in_u[None], upper=False, left=False)[0]

        return gradient


def descend(a: Tensor, gradient: Tensor, span: Span, step: float) -> Tensor:
    """a after a step of the length ``step``, measured in the weights."""
    return a - step * gradient / span.norm(gradient).clamp(min=1e-12)


class Client:
    """One client's data, as a black box, and its surrogate."""

    def __init__(self, box: BlackBox, args: argparse.Namespace) -> None:
        self.box, self.args, self.span = box, args, box.span
        self.surrogate = Surrogate(self.span, length=args.length, keep=args.keep)

    def query(self, a: Tensor) -> None:
        self.surrogate.add(a, self.box(a))

    def near(self, a: Tensor, count: int) -> Tensor:
        """Points in the distance ``args.radius`` of a, [count, K]."""
        shape = (count, len(self.span))
        directions = torch.randn(shape, generator=self.args.generator, dtype=torch.float64)
        return a + self.args.radius * directions / self.span.norm(directions)[:, None]

    def surrogate_round(self, a: Tensor, correction: Callable[[Tensor], Tensor] | None) -> Tensor:
        """``args.queries`` queries and half as many local steps: FZooS."""
        if not len(self.surrogate.points):
            for point in self.near(a, self.args.queries):  # what a first surrogate is made of
                self.query(point)
            return a
        walk = self.args.queries // 2
        for t in range(walk):
            gradient = self.surrogate.gradient(a, self.surrogate.fit())
            if correction is not None:
                gradient = gradient + correction(a) / (t + 1)
            a = descend(a, gradient, self.span, self.args.step / walk)
            self.query(a)
            near = self.near(a, self.args.explored)
            self.query(near[self.surrogate.uncertainty(near).argmax()])
        self.surrogate.refit_length()
        return a

    def difference_round(self, a: Tensor, _: object) -> Tensor:
        """A round of FedZO, with as many queries: two-sided differences, each along a random direction."""
        local = self.args.local
        for _step in range(local):
            total = self.span.zeros()
            for point in self.near(a, self.args.queries // 2 // local):
                way = point - a
                total += (self.box(a + way) - self.box(a - way)) * way
            a = descend(a, total, self.span, self.args.step / local)
        return a


def corrections(clients: list[Client], features: Features | None) -> list[Callable[[Tensor], Tensor]]:
    """grad mu - grad mu_i of each client, as the surrogates are now; mu is the mean of them all."""
    if features is not None:
        sent = [features.weights(client.surrogate) for client in clients]
        mean = torch.stack(sent).mean(0)
        return [features.gradient(mean - own) for own in sent]
    shared = [client.surrogate.shared() for client in clients]
    mean_of = lambda a: torch.stack([own(a) for own in shared]).mean(0)
    return [lambda a, own=own: mean_of(a) - own(a) for own in shared]


def train(method: str = "fzoos", *, seeds: int = 48, rounds: int = 30, count: int = 3, **options) -> dict:
    """The losses of a run on all clients' data together.

    ``method``: "fzoos"; "uncorrected", which is FZooS without the correction; or "fedzo".
    """
    defaults = {
        "queries": 8, "radius": 0.5, "step": 0.8, "length": 3.0, "keep": 200, "explored": 8,
        "local": 1, "features": 0, "seed": 3, "sorted": False,
    }  # fmt: skip
    args = argparse.Namespace(**{**defaults, **options})
    args.generator = torch.Generator().manual_seed(args.seed)
    training, _ = digits.load()
    model = digits.network()
    warm_up(model, training)
    span = Span(list(model.named_parameters()), range(1000 * args.seed, 1000 * args.seed + seeds))
    shares = sorted_clients(training, count) if args.sorted else digits.clients(training, count)
    clients = [Client(BlackBox(model, span, share), args) for share in shares]
    whole, a = BlackBox(model, span, training), span.zeros()
    curve, none = [(0, whole(a))], [None] * count
    for number in range(rounds):
        corrected: list = none
        if method == "fzoos" and number:
            # One length for all, since the features are the same for all.
            features = Features(span, clients[0].surrogate.length, args.features) if args.features else None
            corrected = corrections(clients, features)
        rounds_of = [c.difference_round if method == "fedzo" else c.surrogate_round for c in clients]
        a = torch.stack([of(a, own) for of, own in zip(rounds_of, corrected, strict=True)]).mean(0)
        curve.append((sum(c.box.queries for c in clients), whole(a)))
    points = sum(len(c.surrogate.points) for c in clients)
    history = sum(c.surrogate.points.nbytes for c in clients)
    return {"curve": curve, "history_bytes": history, "vector_bytes": 4 * sum(span.sizes) * points}


def sorted_clients(data: digits.Data, count: int) -> list[digits.Data]:
    """Shares of the data sorted by digit: each client knows a few digits only."""
    order = data[1].argsort(stable=True)
    return [(data[0][rows], data[1][rows]) for rows in order.chunk(count)]


def warm_up(model: nn.Module, data: digits.Data, steps: int = 30) -> None:
    """Takes a few steps of Adam, so that the clients start from a model and not from noise."""
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = digits.batch(data, 64, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


METHODS = {"fzoos": "FZooS", "uncorrected": "FZooS without its correction", "fedzo": "FedZO"}


def draw(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Mean and range over the seeds of each method's loss by the number of queries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, runs in results.items():
        queries = [q for q, _ in runs[0]["curve"]]
        losses = torch.tensor([[loss for _, loss in run["curve"]] for run in runs])
        axes.plot(queries, losses.mean(0), label=METHODS[name])
        axes.fill_between(queries, losses.amin(0), losses.amax(0), alpha=0.2)
    axes.set(xlabel="queries of all clients", ylabel="loss on all data")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=48, help="K, the directions of the span")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--runs", type=int, default=3, help="runs of each method, each with other draws")
    parser.add_argument("--features", type=int, default=0, help="M, random Fourier features that are shared")
    parser.add_argument("--sorted", action="store_true", help="each client has a few digits only")
    parser.add_argument("--plot", type=pathlib.Path, help="a PNG file")
    args = parser.parse_args(argv)
    options = {"seeds": args.seeds, "rounds": args.rounds, "features": args.features, "sorted": args.sorted}
    results: dict[str, list[dict]] = {}
    for name in METHODS:
        results[name] = [train(name, seed=3 + run, **options) for run in range(args.runs)]
        ends = " ".join(f"{run['curve'][-1][1]:.3f}" for run in results[name])
        (_, first), (queries, _) = results[name][0]["curve"][0], results[name][0]["curve"][-1]
        print(f"{name:11} loss {first:.3f} to {ends} in {queries} queries")
    result = results["fzoos"][0]
    print(
        f"history: {result['history_bytes']:,} bytes as coefficients, {result['vector_bytes']:,} as vectors"
    )
    if args.plot:
        draw(results, args.plot)
        print(f"wrote {args.plot}")
    return results


if __name__ == "__main__":
    main()
