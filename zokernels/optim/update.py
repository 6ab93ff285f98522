"""The scalars of an update, from the losses to g, learning rate and decay of each group, all on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..transfer import to_device


def projected_gradient(g: Tensor, clip: float | None) -> Tensor:
    """g (float64) rounded once to fp32; then each min(max(g, -clip), clip).

    A g that is not finite stays so: clipping must not turn an overflow into a step.
    """
    g = g.float()
    return g if clip is None else torch.where(g.isfinite(), g.clamp(-clip, clip), g)


def learning_rate(group: dict[str, Any], like: Tensor) -> float | Tensor:
    """The group's lr; where it is a tensor, 0-dim, in float64 and on the device of ``like``."""
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor):
        lr = to_device(lr.detach().reshape(()), like.device, torch.float64)
    return lr


def descent(group: dict[str, Any], g: Tensor) -> Tensor:
    """-lr * g in float64, rounded once to fp32."""
    return -(learning_rate(group, g) * g.double()).float()


def decay_of(group: dict[str, Any], like: Tensor) -> float | Tensor:
    """1 - lr * weight_decay; where lr is a tensor, as :func:`learning_rate`."""
    kept: float | Tensor = 1 - learning_rate(group, like) * group["weight_decay"]
    return kept


def gate(groups: list[dict[str, Any]], gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``gradients`` (fp32 [q] of each group), all 0 unless each of them and each lr * g is finite in fp32; and whether
    that is so (bool, 0-dim)."""
    steps = [descent(group, g) for group, g in zip(groups, gradients, strict=True)]
    finite = torch.isfinite(torch.cat((*gradients, *steps))).all()
    return [torch.where(finite, g, torch.zeros_like(g)) for g in gradients], finite


def gated_decay(decay: float | Tensor, finite: Tensor, device: torch.device) -> Tensor:
    """``decay`` as fp32 [1] on ``device``; 1 unless ``finite``."""
    one = torch.ones(1, dtype=torch.float64, device=finite.device)
    return to_device(torch.where(finite, decay * one, one).float(), device)


def scalars(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Numbers and 0-dim tensors as float64 [n] on ``device``, by fills: a list would be copied from the host."""
    fill = lambda v: v.reshape(1) if isinstance(v, Tensor) else torch.full((1,), v, dtype=torch.float64, device=device)
    return torch.cat([fill(v) for v in values])


def is_zero(lr: float | Tensor) -> bool:
    """Whether the host knows that there is nothing to update."""
    return not isinstance(lr, Tensor) and lr == 0


def known_on_host(value: Tensor) -> bool:
    """Whether the host can read ``value`` without waiting for a device."""
    return value.device.type == "cpu"
