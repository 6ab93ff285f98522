"""What the kernels are compared against: the eager loops that zeroth-order trainers run today.

``mezo_*`` restates the operations of MeZO's published trainer (Malladi et al., 2023, arXiv 2305.17333):
a z of the parameter's size and dtype from torch's global generator, then out-of-place arithmetic into ``param.data``.
``foreach_*`` and ``inplace_*`` are that loop as a careful user of eager torch would write it.
Parameters are anything with ``.data``: tensors or ``nn.Parameter``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw(like: Tensor, dist: str) -> Tensor:
    """z as eager trainers draw it: in the parameter's own dtype, from torch's global generator."""
    if dist == "normal":
        return torch.normal(mean=0, std=1, size=like.size(), device=like.device, dtype=like.dtype)
    return torch.randint(0, 2, size=like.size(), device=like.device, dtype=like.dtype) * 2 - 1


def mezo_perturb(params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal") -> None:
    """theta + scaling * eps * z, tensor after tensor: three passes of arithmetic, a z and two temporaries each."""
    torch.manual_seed(seed)
    for param in params:
        z = draw(param.data, dist)
        param.data = param.data + scaling * z * eps


def mezo_update(
    params: Sequence[Tensor],
    lr: float,
    projected_grad: float,
    seed: int,
    weight_decay: float = 0.0,
    dist: str = "normal",
) -> None:
    """theta - lr * (g z + wd theta).  The published loop computes the decay term also at wd = 0, for all but biases and
    norms; here it stands for every tensor, which on MiniLM-L6 adds 0.05% of the elements.
    """
    torch.manual_seed(seed)
    for param in params:
        z = draw(param.data, dist)
        param.data = param.data - lr * (projected_grad * z + weight_decay * param.data)


def mezo_step(params: Sequence[Tensor], eps: float, lr: float, projected_grad: float, seed: int) -> None:
    """The hot path of one step: +eps, -2 eps, +eps, update.  18 kernels and 37 element accesses a tensor."""
    for scaling in (1, -2, 1):
        mezo_perturb(params, scaling, eps, seed)
    mezo_update(params, lr, projected_grad, seed)


def foreach_perturb(params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal") -> None:
    """The same sum with one multi-tensor add: every z is alive at once."""
    torch.manual_seed(seed)
    tensors = [p.data for p in params]
    torch._foreach_add_(tensors, [draw(t, dist) for t in tensors], alpha=scaling * eps)


def inplace_perturb(params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal") -> None:
    """The same sum with ``add_`` in place: one z at a time and no other temporary."""
    torch.manual_seed(seed)
    for param in params:
        z = draw(param.data, dist)
        param.data.add_(z, alpha=scaling * eps)


#: One perturbation pass, by the name that a result row carries.
PERTURB: dict[str, Callable[..., None]] = {
    "mezo": mezo_perturb,
    "foreach": foreach_perturb,
    "inplace": inplace_perturb,
}


def copy_in_place(tensor: Tensor) -> None:
    """Read and write every byte of ``tensor`` where it lies: the floor of an in-place pass.

    Bits are flipped as int64, so that the pass costs the same in every dtype: ``mul_`` in half precision converts on
    the CPU, and on arbitrary bits meets subnormals.  ``x.copy_(x)`` would be skipped by torch.
    """
    tensor.view(torch.int64).bitwise_not_()
