"""The scalars of an update: g, learning rate and decay of each group, from the losses, all on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..transfer import to_device
from .types import Group


def projected_gradient(g: Tensor, clip: float | None) -> Tensor:
    """g (float64), rounded once to fp32 and then clipped: min(max(g, -clip), clip).

    A g that is not finite stays so, because clipping must not turn an overflow into a step.
    """
    g = g.float()
    return g if clip is None else torch.where(g.isfinite(), g.clamp(-clip, clip), g)


def learning_rate(group: Group, like: Tensor) -> float | Tensor:
    """The group's lr: a number, or a float64 0-dim tensor on the device of ``like``."""
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor):
        lr = to_device(lr.detach().reshape(()), like.device, torch.float64)
    return lr


def descent(group: Group, g: Tensor) -> Tensor:
    """-lr * g, computed in float64 and rounded once to fp32."""
    return -(learning_rate(group, g) * g.double()).float()


def decay_of(group: Group, like: Tensor) -> float | Tensor:
    """1 - lr * weight_decay: a number, or a tensor where lr is one (:func:`learning_rate`)."""
    decay: float | Tensor = 1 - learning_rate(group, like) * group["weight_decay"]
    return decay


#: What :func:`gate` says where the host may know: by identity, so that nobody reads a tensor to find out.
YES, NO = torch.tensor(True), torch.tensor(False)
#: From here on a number rounds to infinity in fp32.
_INFINITE = 2.0**128 - 2.0**103


def where(finite: Tensor, value: Callable[[], Tensor], other: Callable[[], Tensor]) -> Tensor:
    """``value()`` where ``finite`` (bool, 0-dim) holds, else ``other()``.

    Where the host knows the answer, only that one is computed.  Else both are, and the device chooses.
    """
    if finite is YES:
        return value()
    return other() if finite is NO else torch.where(finite, value(), other())


def gate(groups: list[Group], gradients: list[Tensor], *, reads: bool) -> tuple[list[Tensor], Tensor]:
    """``gradients`` (fp32 [q] of each group), set to 0 unless all of them are finite; and whether they are.

    Each lr * g must be finite in fp32, too.  The second result is bool, 0-dim; :data:`YES` or :data:`NO`
    where the losses are on the CPU and ``reads`` allows to look at them."""
    if reads and all([g.is_cpu for g in gradients]):
        finite = YES if all(map(_all_finite, groups, gradients)) else NO
    else:
        steps = [descent(group, g) for group, g in zip(groups, gradients, strict=True)]
        finite = torch.isfinite(torch.cat((*gradients, *steps))).all()
    if finite is YES:
        return gradients, finite
    return [torch.where(finite, g, torch.zeros_like(g)) for g in gradients], finite


def _all_finite(group: Group, g: Tensor) -> bool:
    lr = float(group["lr"])
    return all([math.isfinite(v) and abs(lr * v) < _INFINITE for v in g.tolist()])


def gated_decay(decay: float | Tensor, finite: Tensor, device: torch.device) -> Tensor:
    """``decay`` as fp32 [1] on ``device``; 1 unless ``finite``."""
    one = torch.ones(1, dtype=torch.float64, device=finite.device)
    return to_device(where(finite, lambda: decay * one, lambda: one).float(), device)


def scalars(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Numbers and 0-dim tensors as one float64 tensor [n] on ``device``.

    Numbers come by fills.  A list of them would be copied from the host, and waited for.
    """
    fill = lambda v: (
        v.reshape(1) if isinstance(v, Tensor) else torch.full((1,), v, dtype=torch.float64, device=device)
    )
    return torch.cat([fill(v) for v in values])


def is_zero(lr: float | Tensor) -> bool:
    """Whether the host knows that there is nothing to update."""
    return not isinstance(lr, Tensor) and lr == 0
