"""Sparse directions: z is 0 where a mask drops the element.

A mask is one stored bit a weight, or only a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import fail
from ...functional import pack_mask
from ..noise import Members, Noise, Tensors
from ..roles import OptimizerView, home_of
from ..shard import part_of, placed, whole_of
from ..types import Bucket, Seeds
from .direction import Direction, check_refresh, derived_seed

#: k of the seed of a random mask: far above any direction's.
_MASK_K = 0x80000000

#: Measures the mask of some weights, and keeps it in the tensors of that dictionary.
Measure = Callable[[Tensor, dict[str, Tensor]], None]


class _PackedMask(Noise):
    """Noise where a packed mask has a 1.

    Args:
        kept: what is kept of each parameter, by its id; ``["mask"]`` is the mask.
        due: what measures the masks that are still to be measured, by the parameter's id.  It is called with
            the weights and with what is kept of them.
    """

    def __init__(self, kept: dict[int, dict[str, Tensor]], due: dict[int, Measure]) -> None:
        self._kept, self._due = kept, due

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        masks = [self._kept[id(p)]["mask"] for p in members.params]
        return super().kernel_args(members, seeds, coeffs) | {"masks": masks}

    @property
    def measures(self) -> bool:
        return bool(self._due)

    def measure(self, params: Tensors) -> None:
        for p in params:
            if id(p) in self._due:
                self._due[id(p)](p, self._kept[id(p)])

    def bound(self, views: Mapping[int, Tensor]) -> Noise:
        kept = {
            id(views[key]): {name: views[id(t)] for name, t in tensors.items()}
            for key, tensors in self._kept.items()
            if key in views
        }
        return _PackedMask(kept, {id(views[key]): f for key, f in self._due.items() if key in views})


class _DrawnMask(Noise):
    """Noise where the kernel, which draws the mask itself, keeps an element."""

    def __init__(self, seed: Tensor, density: float) -> None:
        self._mask = {"mask_seed": seed, "density": density}

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        return super().kernel_args(members, seeds, coeffs) | self._mask


def _check_density(name: str, density: float) -> None:
    if not 0 < density <= 1:
        fail(name, "density", "a number in (0, 1]", density)


class KeptMask(Direction):
    """Packed masks in ``optimizer.state[p]["mask"]``.

    They are saved with it, and stay until the next refresh, or the next step where the mask :attr:`changes`.
    """

    #: The names of the tensors that are kept of a parameter.
    kept_names: ClassVar[tuple[str, ...]] = ("mask",)

    def kept_of(self, param: Tensor) -> list[tuple[str, tuple[int, ...], torch.dtype, float]]:
        return [("mask", (-(-param.numel() // 8),), torch.uint8, 0)]

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        window = self.begins_window(optimizer)
        for bucket in buckets:
            kept, due = {}, dict[int, Measure]()
            for p in bucket.params:
                state, home = optimizer.state[p], home_of(p)
                fresh = window or any(name not in state for name in self.kept_names)
                if fresh or self.changes:
                    measure = functools.partial(self._pack, optimizer, p, fresh)
                    if home.in_memory:
                        measure(p, state)
                    else:
                        due[id(p)] = measure
                elsewhere = {name: home.state(optimizer, p, name) for name in self.kept_names}
                kept[id(p)] = {name: state[name] if t is None else t for name, t in elsewhere.items()}
            bucket.noise = _PackedMask(kept, due)

    def _pack(
        self, optimizer: OptimizerView, param: Tensor, fresh: bool, theta: Tensor, state: dict[str, Tensor]
    ) -> None:
        """Measures the mask of ``param``, whose values are ``theta``, into what is kept of it."""
        place = placed([param]) or {"offsets": [0], "rows": [None]}
        keep = part_of(self.keep(optimizer, param, fresh, theta, state), param)
        mask = pack_mask(keep, place["offsets"][0], place["rows"][0])
        if "mask" in state and state["mask"].shape == mask.shape:
            state["mask"].copy_(mask)  # a CUDA graph holds its address
        else:
            state["mask"] = mask

    def keep(
        self, optimizer: OptimizerView, param: Tensor, fresh: bool, theta: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        """The mask: bool, of the parameter's logical shape.

        Args:
            fresh: a window begins, or the parameter had no mask.
            theta: the unperturbed weights; ``param`` itself, unless its values are elsewhere.
            state: what is kept of the parameter.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class MagnitudeMask(KeptMask):
    """The ``density`` smallest weights of each tensor move: |theta| <= the tensor's own quantile.

    The mask is measured before anything moves, so that no perturbed weight changes it.  It is kept as bits
    until the next ``refresh`` (a number of steps; None: for the whole run).

    ``dynamic``: the quantile alone is kept until the next refresh (``optimizer.state[p]["threshold"]``), and
    every step compares the weights with it.  A weight that grows beyond the threshold then stands still, and
    with ``weight_decay`` one may come back below it.  The comparison reads the weights once more a step.

    Source: Sparse-MeZO, Liu et al. 2024 (arXiv 2402.15751), whose mask is dynamic.
    """

    density: float = 0.25
    refresh: int | None = None
    dynamic: bool = False

    @property
    def changes(self) -> bool:
        return self.dynamic

    def __post_init__(self) -> None:
        _check_density("MagnitudeMask", self.density)
        check_refresh("MagnitudeMask", self.refresh)

    @property
    def kept_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("mask", "threshold") if self.dynamic else ("mask",)

    def kept_of(self, param: Tensor) -> list[tuple[str, tuple[int, ...], torch.dtype, float]]:
        threshold = [("threshold", (), torch.float32, 0.0)] if self.dynamic else []
        return super().kept_of(param) + threshold

    def keep(
        self, optimizer: OptimizerView, param: Tensor, fresh: bool, theta: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        size = whole_of(theta).detach().abs()
        if not self.dynamic:
            return size <= self._quantile(size)
        if fresh:
            quantile = self._quantile(size)
            if "threshold" in state:
                state["threshold"].copy_(quantile)
            else:
                state["threshold"] = quantile
        keep: Tensor = size <= state["threshold"]
        return keep

    def _quantile(self, size: Tensor) -> Tensor:
        """The largest of the ``density`` smallest of ``size``: fp32, 0-dim."""
        rank = max(1, round(self.density * size.numel()))
        found: Tensor = size.view(-1).float().kthvalue(rank).values
        return found


@dataclass(frozen=True)
class RandomMask(Direction):
    """Each weight moves with probability ``density``.  The kernel draws the mask, and nothing is stored.

    The same weights move for ``refresh`` steps (None: for the whole run).  The density is rounded to 1 /
    65536.
    """

    density: float = 0.25
    refresh: int | None = None

    def __post_init__(self) -> None:
        _check_density("RandomMask", self.density)
        check_refresh("RandomMask", self.refresh)

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        window = self.window(optimizer)
        for bucket in buckets:
            bucket.noise = _DrawnMask(derived_seed(optimizer, window, _MASK_K, bucket.device), self.density)


@dataclass(frozen=True)
class GivenMask(KeptMask):
    """Masks of your own, by parameter or by its name.

    A mask is bool, of the parameter's shape, or the int64 flat indices of the weights that move.  A parameter
    without an entry moves as a whole.
    """

    masks: Mapping[Any, Tensor] = field(default_factory=dict)

    def prepare(self, optimizer: OptimizerView, buckets: list[Bucket], seeds: Seeds) -> None:
        known = {n for g in optimizer.param_groups for n in g.get("param_names", ())}
        known |= {p for g in optimizer.param_groups for p in g["params"]}
        if unknown := [key for key in self.masks if key not in known]:
            name = (
                unknown[0] if isinstance(unknown[0], str) else f"a tensor of shape {tuple(unknown[0].shape)}"
            )
            fail("GivenMask", "masks", "names or parameters of the optimizer", repr(name))
        super().prepare(optimizer, buckets, seeds)

    def keep(
        self, optimizer: OptimizerView, param: Tensor, fresh: bool, theta: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        mask = self.masks.get(param)
        for group in optimizer.param_groups:
            for name, other in zip(group.get("param_names", ()), group["params"], strict=False):
                if other is param and name in self.masks:
                    mask = self.masks[name]
        if mask is None:
            return torch.ones(param.shape, dtype=torch.bool, device=theta.device)
        mask = mask.to(theta.device)
        if mask.dtype is torch.bool and mask.shape == param.shape:
            return mask
        if mask.dtype is not torch.int64 or mask.dim() != 1:
            expected = f"bool of shape {tuple(param.shape)} or int64 flat indices"
            fail("GivenMask", "masks", expected, f"{mask.dtype} of shape {tuple(mask.shape)}", TypeError)
        if mask.numel() and not (mask.min() >= 0 and mask.max() < param.numel()):
            got = f"{mask.min().item()} to {mask.max().item()}"
            fail("GivenMask", "masks", f"indices in [0, {param.numel()})", got)
        keep = torch.zeros(param.numel(), dtype=torch.bool, device=theta.device)
        keep[mask] = True
        return keep.view(param.shape)
