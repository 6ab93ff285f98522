"""Scaled directions: z times a number of each tensor or of each weight, or scaled to a sphere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, check_number, fail
from ...contract import canonical_name
from ...functional import squared_norm
from ...transfer import to_device
from ..noise import DENSE, Members, Noise
from ..roles import OptimizerView
from ..shard import whole_of
from ..subset import LAYERS
from ..types import Bucket, Seeds
from .direction import Direction, check_refresh


class PerTensor(Noise):
    """s_t z in the moves and u_t z in the update, for every tensor t, which has a row of coefficients."""

    def __init__(self, moves: dict[int, Tensor], updates: dict[int, Tensor]) -> None:
        self._moves, self._updates, self.same_scale = moves, updates, moves is updates
        self._now = moves

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        rows = torch.stack([self._now[id(p)] for p in members.params])[:, None] * coeffs
        return super().kernel_args(members, seeds, rows)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        self._now = self._updates
        try:
            super().update(members, seeds, coeffs, **rounding)
        finally:
            self._now = self._moves


#: What a d is measured of: each tensor, or what is in one layer together.
_SHARED = ("tensor", "layer")


@dataclass(frozen=True)
class TensorScale(Direction):
    """theta_t + eps s_t z, with s_t the size d_t of the tensor's weights, or its inverse.

    "rms" moves every tensor in proportion to its size: s = d.  MeZO's variants divide by d.  "variance"
    perturbs along z / d and updates along d z, which leaves the gradient estimate unbiased and changes its
    variance.  "expectation" updates along z, which divides each tensor's estimate by d.

    d is measured before anything moves, kept in ``optimizer.state[p]["scale"]`` and renewed every
    ``refresh`` steps (None: never).  Where it would be 0 it is 1.  Its last bits depend on the device's order
    of summation.

    ``norm``, ``per``: by default d is the root mean square ("rms") of each tensor.  MeZO's code has the
    length ("l2") of all weights of a layer together ("layer"): of weights and biases, with all embeddings
    (names with "embed") as one layer and the head ("lm_head") as another.  Names that are in none of these
    have d = 1 there.  ``TensorScale("variance", norm="l2", per="layer")`` is that code's
    ``zo_variant="param_norm"``, and "expectation" its ``change_grad_estimate``.

    ``sizes``: d of your own, by name; those that have none have d = 1, and nothing is measured.  (MeZO's
    ``grad_norm`` gives each layer the length of its gradient.)

    Source: MeZO, Malladi et al. 2023 (arXiv 2305.17333), appendix on variance- and expectation-modified SPSA.
    """

    kind: str = "rms"
    refresh: int | None = None
    norm: str = "rms"
    per: str = "tensor"
    #: Hashed in logs, whose replay needs the direction itself.
    sizes: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_choice("TensorScale", "kind", self.kind, ("rms", "variance", "expectation"))
        check_choice("TensorScale", "norm", self.norm, ("rms", "l2"))
        check_choice("TensorScale", "per", self.per, _SHARED)
        check_refresh("TensorScale", self.refresh)
        object.__setattr__(self, "separate", self.per == "tensor")
        if self.sizes is None:
            return
        if self.refresh is not None:
            fail(
                "TensorScale", "refresh", "None with sizes of your own, which nothing measures", self.refresh
            )
        for name, size in self.sizes.items():
            check_number("TensorScale", f"sizes[{name!r}]", size, positive=True)

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        params = [p for b in buckets for p in b.params]
        if self.begins_window(optimizer) or any("scale" not in optimizer.state[p] for p in params):
            fresh = self.begins_window(optimizer)
            for p, size in self._measured(optimizer, params):
                if fresh or "scale" not in optimizer.state[p]:
                    optimizer.state[p]["scale"] = size
        for bucket in buckets:
            sizes = {id(p): optimizer.state[p]["scale"] for p in bucket.params}
            if self.kind == "rms":
                moves = updates = sizes
            else:
                moves = {key: 1 / size for key, size in sizes.items()}
                updates = (
                    sizes if self.kind == "variance" else {k: torch.ones_like(s) for k, s in sizes.items()}
                )
            bucket.noise = PerTensor(moves, updates)

    def _measured(self, optimizer: OptimizerView, params: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its d, fp32, 0-dim, on its device."""
        number = lambda p, d: torch.full((), d, device=p.device)
        if self.sizes is None and self.per == "tensor":
            for p in params:
                weights = whole_of(p).detach().float().square()
                size = (weights.mean() if self.norm == "rms" else weights.sum()).sqrt()
                yield p, torch.where(size > 0, size, torch.ones_like(size))
            return
        names = {
            id(p): canonical_name(name)
            for group in optimizer.param_groups
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
        }
        if any(id(p) not in names for p in params):
            argument = "per" if self.sizes is None else "sizes"
            fail("TensorScale", argument, "named parameters (model.named_parameters())", "unnamed ones")
        if self.sizes is not None:
            own = {canonical_name(name): size for name, size in self.sizes.items()}
            if unknown := [name for name in own if name not in names.values()]:
                fail("TensorScale", "sizes", "names of the optimizer's parameters", repr(unknown[0]))
            yield from ((p, number(p, own.get(names[id(p)], 1.0))) for p in params)
            return
        # The whole layer is measured, with those of its weights that a subset leaves out of this step.
        sums: dict[str | None, Tensor] = {}
        counts: dict[str | None, int] = {}
        for p in (
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()
        ):
            layer, square = _layer_of(names[id(p)]), whole_of(p).detach().double().square().sum()
            sums[layer] = sums[layer] + to_device(square, sums[layer].device) if layer in sums else square
            counts[layer] = counts.get(layer, 0) + p.numel()
        for p in params:
            layer = _layer_of(names[id(p)])
            size = (sums[layer] / (counts[layer] if self.norm == "rms" else 1)).sqrt().float()
            size = torch.where(size > 0, size, torch.ones_like(size))
            yield p, number(p, 1.0) if layer is None else to_device(size, p.device)


def _layer_of(name: str) -> str | None:
    """The layer of a parameter as MeZO has them: embeddings, head, or a numbered layer; None: in none."""
    for part in ("embed", "lm_head"):
        if part in name:
            return part
    found = re.search(LAYERS, name)
    return found.group(1) if found else None


class _OnSphere(Noise):
    """Each direction times its own factor, which is found by the direction's seed."""

    def __init__(self, seeds: Tensor, factors: Tensor) -> None:
        self._seeds, self._factors = seeds, factors

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        if len(seeds) > len(self._seeds):
            fail("Sphere", "rule", "one that uses the step's own directions", f"{len(seeds)} seeds")
        factors = torch.where(
            seeds[:, None] == self._seeds, self._factors, torch.zeros_like(self._factors)
        ).amax(1)
        return super().kernel_args(members, seeds, factors * coeffs)


class Sphere(Direction):
    """z sqrt(d) / |z| over the d weights of the step together: uniform on the sphere of z's mean length.

    |z| costs one more draw of z, and no access of a weight; for rademacher it is known.  A rule that
    draws the directions of earlier steps again (a window) is refused, because their factors are gone.

    Source: Flaxman, Kalai and McMahan 2005; Gao, Jiang and Zhang 2018.
    """

    separate = False

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        home = buckets[0].device
        total = torch.zeros(len(seeds[home]), dtype=torch.float64, device=home)
        for b in buckets:
            sizes = [p.numel() for p in b.params]
            total += to_device(squared_norm(seeds[b.device], sizes, streams=b.streams, dist=b.dist), home)
        count = sum(p.numel() for b in buckets for p in b.params)
        factors = (count / total).sqrt().float()
        for b in buckets:
            b.noise = _OnSphere(seeds[b.device], to_device(factors, b.device))


class _Curved(Noise):
    """z / sqrt(h) in the moves; the update's kernel divides by its new h itself."""

    same_scale = False

    def __init__(self, curvature: dict[int, Tensor]) -> None:
        self._curvature = curvature

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        curvature = [self._curvature[id(p)] for p in members.params]
        return super().kernel_args(members, seeds, coeffs) | {"curvature": curvature}

    def bound(self, views: Mapping[int, Tensor]) -> Noise:
        return _Curved({id(views[key]): views[id(h)] for key, h in self._curvature.items() if key in views})

    def step(self, members: Members, *args: Any, **options: Any) -> None:
        DENSE.step(members, *args, **options)


class CurvedDirection(Direction):
    """z / sqrt(h), h = ``optimizer.state[p]["curvature"]`` of the rule :class:`Curvature`."""

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        for bucket in buckets:
            states = optimizer.rule.state(optimizer, bucket, "curvature")
            bucket.noise = _Curved({id(p): h for p, h in zip(bucket.params, states, strict=True)})
