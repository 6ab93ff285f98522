"""Functions without gradients (a remote model, a numpy program, an integer network) inside a torch graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .checks import DTYPES, check_choice, check_dist, check_integer, check_number, fail
from .contract import seed_to_int64
from .difference import stepped
from .functional import Dist, combine_, derive_seed, spread

ESTIMATORS = ("rge", "cge")


class BlackBox(nn.Module):
    """y = f(x), with a gradient for x that is estimated from further values of f.

    Backward of grad_out = dL/dy needs the derivatives of phi_b(u) = <grad_out_b, f(u)>, for each sample b:

    ======  ====================================================================  ==========================
    "rge"   1/q sum_k (phi_b(x_b + mu z_kb) - phi_b(x_b)) / mu * z_kb             q B rows, q = ``queries``
    "cge"   (phi_b(x_b + h e_i) - phi_b(x_b)) / h  for each coordinate i          d B rows, d = x[0].numel()
    ======  ====================================================================  ==========================

    ``two_sided`` takes (phi(x + ..) - phi(x - ..)) / (2 mu), with twice the rows.  z is the noise of contract
    ``zk1`` with seed ``derive_seed(seed, call, k)``: each direction is regenerated where it is needed and
    never stored.  "rge" is unbiased for the gradient of f smoothed over mu z; "cge" has no variance.  h is mu
    as it becomes in x's dtype, never less.

    Memory, beyond x, y and the gradient: perturbed inputs of max(B, ``max_batch``) rows at most (twice B if
    ``two_sided``), and f's outputs for them.

    Args:
        function: ``f(x, *extras)``, x [N, ...] -> [N] or [N, ...], a tensor or whatever ``torch.as_tensor``
            takes, with floating-point values.  Row n depends on row n of the inputs alone.  Called without
            gradients.
        estimator: "rge" (random gradient estimation) or "cge" (coordinate-wise).
        queries: q, directions of "rge".
        mu: size of a step, in units of x.
        two_sided: central instead of forward differences.
        dist: of z, "normal" or "rademacher".
        sphere: "rge" along unit vectors u = z / |z|, of each sample: d/q sum_k (phi_b(x_b + mu u_kb) -
            phi_b(x_b)) / mu * u_kb.  mu is then the length of a step, as in the authors' code; without it, a
            step is mu |z| long, about mu sqrt(d).  The last bits of |z| depend on the device's order of
            summation.
        seed: run seed; the module counts the calls that may need a gradient.  Both are in its
            ``state_dict()``.
        max_batch: the most rows in one call of f.  It does not change which directions are drawn.

    Raises: TypeError, ValueError: naming argument, what was expected and what came.

    Example::

        classify = BlackBox(lambda x, y: loss_of_remote_model(x.numpy(), y.numpy()), queries=32)
        classify(denoiser(images), labels).mean().backward()   # gradients for the denoiser

    Source: ZO-AE-DS, Zhang et al. 2022 (arXiv 2203.14195), whose code is ``sphere=True`` with one side for
    "rge", and ``two_sided=True`` for "cge"."""

    function: Callable[..., Any]
    estimator: str
    queries: int
    mu: float
    two_sided: bool
    dist: Dist
    sphere: bool
    seed: int
    max_batch: int
    calls: int

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        estimator: str = "rge",
        queries: int = 16,
        mu: float = 5e-3,
        two_sided: bool = False,
        dist: Dist = "normal",
        sphere: bool = False,
        seed: int = 0,
        max_batch: int = 1024,
    ) -> None:
        super().__init__()
        if not callable(function):
            fail("BlackBox", "function", "a function of [N, ...]", repr(function), TypeError)
        check_choice("BlackBox", "estimator", estimator, ESTIMATORS)
        check_integer("BlackBox", "queries", queries)
        check_integer("BlackBox", "max_batch", max_batch)
        check_number("BlackBox", "mu", mu, positive=True)
        check_dist("BlackBox", dist)
        if sphere and estimator != "rge":
            fail("BlackBox", "sphere", "False but for 'rge', whose directions are random", True)
        seed_to_int64(seed)  # raises outside its range
        self.function, self.estimator, self.queries, self.mu = function, estimator, queries, mu
        self.two_sided, self.dist, self.sphere, self.seed, self.max_batch = (
            two_sided,
            dist,
            sphere,
            seed,
            max_batch,
        )
        self.calls = 0

    def forward(self, x: Tensor, *extras: Tensor) -> Tensor:
        """``f(x, *extras)``, [B] or [B, ...].

        Args:
            x: [B, ...] fp32, bf16 or fp16.
            extras: tensors [B, ...] that f takes beside x, such as labels: they get no gradient, and each
                query of a sample gets that sample's.
        """
        if x.dtype not in DTYPES:
            fail("BlackBox", "x", "dtype float32, bfloat16 or float16", x.dtype, TypeError)
        if x.dim() < 1 or not x.numel():
            fail("BlackBox", "x", "a batch [B, ...] with an element", f"shape {tuple(x.shape)}")
        for i, extra in enumerate(extras):
            if not isinstance(extra, Tensor) or extra.shape[:1] != x.shape[:1]:
                got = tuple(extra.shape) if isinstance(extra, Tensor) else repr(extra)
                fail("BlackBox", f"extras[{i}]", f"a tensor with {x.shape[0]} rows, as x", got)
        call = self.calls
        self.calls += torch.is_grad_enabled() and x.requires_grad
        y: Tensor = _Estimated.apply(x, self, call, *extras)
        return y

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seed, self.calls = state["seed"], state["calls"]

    def extra_repr(self) -> str:
        queries = f", queries={self.queries}" if self.estimator == "rge" else ""
        return f"estimator={self.estimator!r}{queries}, mu={self.mu}, two_sided={self.two_sided}"

    def _values(self, rows: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """f of ``rows`` [n * B, ...], of which each B are a batch with ``extras``; in calls of
        ``max_batch`` rows.
        """
        values = []
        for at in range(0, len(rows), self.max_batch):
            part = rows[at : at + self.max_batch]
            index = torch.arange(at, at + len(part), device=rows.device)
            y = self.function(part, *(extra[(index % len(extra)).to(extra.device)] for extra in extras))
            y = torch.as_tensor(y).detach().to(rows.device, copy=True)  # f may return one buffer twice
            if not y.is_floating_point():
                fail("BlackBox", "function", "floating-point values", y.dtype, TypeError)
            if y.dim() < 1 or len(y) != len(part):
                fail("BlackBox", "function", f"{len(part)} rows, as it was given", f"shape {tuple(y.shape)}")
            values.append(y)
        return torch.cat(values)

    def _chunks(self, total: int, batch: int) -> Iterator[tuple[int, int]]:
        """Ranges of directions, of which each costs ``batch`` rows and side: as many as ``max_batch``
        rows hold.
        """
        count = max(1, self.max_batch // (batch * (1 + self.two_sided)))
        for first in range(0, total, count):
            yield first, min(count, total - first)

    def _differences(self, rows: Tensor, y: Tensor, grad_out: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """phi at rows[0] less phi at rows[1] (at x, with y = f(x), where one-sided), float64 [n, B].

        ``rows``: [sides, n, B, ...].
        """
        values = self._values(rows.flatten(0, 2), extras).view(*rows.shape[:3], -1).double()
        other = values[1] if self.two_sided else y.reshape(1, len(y), -1).double()
        return torch.einsum("nbo,bo->nb", values[0] - other, grad_out.reshape(len(y), -1).double())

    def _random(
        self, call: int, x: Tensor, y: Tensor, grad_out: Tensor, extras: tuple[Tensor, ...]
    ) -> Tensor:
        seeds = derive_seed(self.seed, call, torch.arange(self.queries, device=x.device))
        sides, weights = 1 + self.two_sided, []
        for first, n in self._chunks(self.queries, len(x)):
            chunk = seeds[first : first + n]
            rows, scale = self._on_sphere(x, chunk) if self.sphere else self._along(x, chunk)
            weights.append(scale * self._differences(rows.view(sides, n, *x.shape), y, grad_out, extras))
        coeffs = torch.cat(weights).T / (sides * self.mu * self.queries)
        grad = torch.full_like(x, -0.0)  # the neutral element of addition
        combine_(
            list(grad),
            seeds,
            coeffs.float().contiguous(),
            streams=[0] * len(x),
            offsets=[b * x[0].numel() for b in range(len(x))],
            dist=self.dist,
        )
        return grad

    def _along(self, x: Tensor, seeds: Tensor) -> tuple[Tensor, float]:
        """The points x + mu z of all seeds, and then x - mu z where two-sided, [sides * n, B, ...].

        Also the factor by which a difference of losses is multiplied.
        """
        mu = torch.full((len(seeds) * (1 + self.two_sided),), self.mu, device=x.device, dtype=torch.float32)
        mu[len(seeds) :].neg_()
        rows = x.new_empty(len(mu), *x.shape)
        spread(rows, x, seeds.repeat(1 + self.two_sided), mu, dist=self.dist)
        return rows, 1.0

    def _on_sphere(self, x: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`_along` with z / |z| of each sample in the place of z.

        The factor is d / |z|, float64 [n, B].
        """
        z = torch.empty(len(seeds), *x.shape, device=x.device, dtype=torch.float32)
        spread(
            z,
            torch.full_like(x, -0.0, dtype=torch.float32),
            seeds,
            torch.ones_like(seeds).float(),
            dist=self.dist,
        )
        inverse = 1 / z.reshape(len(seeds), len(x), -1).double().norm(dim=2)
        z *= (self.mu * inverse).float().view(len(seeds), len(x), *(1 for _ in x.shape[1:]))
        sides = [x.float() + z, x.float() - z][: 1 + self.two_sided]
        return torch.cat(sides).to(x.dtype), x[0].numel() * inverse

    def _coordinates(
        self, call: int, x: Tensor, y: Tensor, grad_out: Tensor, extras: tuple[Tensor, ...]
    ) -> Tensor:
        flat = x.reshape(len(x), -1)
        grad, sides = torch.empty_like(flat), 1 + self.two_sided
        for first, n in self._chunks(flat.shape[1], len(x)):
            part = slice(first, first + n)
            rows = flat.repeat(sides, n, 1, 1)
            entries = rows[..., part].diagonal(dim1=1, dim2=3)  # [sides, B, n]: coordinate first + j in row j
            for side, mu in zip(entries, (self.mu, -self.mu), strict=False):
                side.copy_(stepped(flat[:, part], mu))
            steps = entries[0].double() - (entries[1] if self.two_sided else flat[:, part]).double()
            difference = self._differences(rows.view(sides, n, *x.shape), y, grad_out, extras)
            grad[:, part] = difference.T / steps
        return grad.view(x.shape)


class _Estimated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, box: BlackBox, call: int, *extras: Tensor) -> Tensor:
        ctx.box, ctx.call = box, call
        x = x.detach().contiguous()
        y = box._values(x, extras)
        ctx.save_for_backward(x, y, *extras)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *extras = ctx.saved_tensors
        estimate = ctx.box._random if ctx.box.estimator == "rge" else ctx.box._coordinates
        return estimate(ctx.call, x, y, grad_out, tuple(extras)), None, None, *(None for _ in extras)
