"""What the kernels are compared against: the eager loops that zeroth-order trainers run today.

``mezo_*`` restates the operations of MeZO's published trainer (Malladi et al., 2023, arXiv 2305.17333):
a z of the parameter's size and dtype from torch's global generator, then out-of-place arithmetic into ``param.data``.
``foreach_*`` and ``inplace_*`` are that loop as a careful user of eager torch would write it.
``compile_*`` is the loop under torch.compile, ``triton_*`` and ``curand_*`` are kernels that fuse somebody else's
generator: what can run where is found out by :func:`usable`.
Parameters are anything with ``.data``: tensors or ``nn.Parameter``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .registry import skip


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


def mezo_step(
    params: Sequence[Tensor], eps: float, lr: float, projected_grad: float, seed: int, dist: str = "normal"
) -> None:
    """The hot path of one step: +eps, -2 eps, +eps, update.  18 kernels and 37 element accesses a tensor."""
    for scaling in (1, -2, 1):
        mezo_perturb(params, scaling, eps, seed, dist)
    mezo_update(params, lr, projected_grad, seed, dist=dist)


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


@functools.cache
def _compiled(dist: str) -> Callable[[Tensor, float], None]:
    """The body of the loop, compiled.  The body and not the loop: unrolled over a model's 400 parameters it would
    compile for minutes, and its noise is drawn by ``randn_like``, which the compiler fuses with the sum.
    """

    def normal(theta: Tensor, c: float) -> None:
        theta.add_(torch.randn_like(theta), alpha=c)

    def rademacher(theta: Tensor, c: float) -> None:
        theta.add_(torch.randint_like(theta, 0, 2) * 2 - 1, alpha=c)

    return torch.compile(normal if dist == "normal" else rademacher, dynamic=True)


def compile_perturb(params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal") -> None:
    torch.manual_seed(seed)
    for param in params:
        _compiled(dist)(param.data.view(-1), scaling * eps)


def triton_perturb(params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal") -> None:
    from .triton_randn import perturb_

    for i, param in enumerate(params):
        perturb_(param.data, scaling * eps, seed + i)


def triton4x_perturb(params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal") -> None:
    from .triton_randn import perturb_, randn4x_kernel

    for i, param in enumerate(params):
        perturb_(param.data, scaling * eps, seed + i, randn4x_kernel)


def curand_perturb(params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal") -> None:
    from .curand.call import perturb_

    for i, param in enumerate(params):
        perturb_(param.data, scaling * eps, seed + i)


#: One perturbation pass, by the name that a result row carries.  These run wherever torch does.
PERTURB: dict[str, Callable[..., None]] = {
    "mezo": mezo_perturb,
    "foreach": foreach_perturb,
    "inplace": inplace_perturb,
}

#: These need a compiler, a GPU or both.
OPTIONAL: dict[str, Callable[..., None]] = {
    "compile": compile_perturb,
    "tl.randn": triton_perturb,
    "tl.randn4x": triton4x_perturb,
    "curand": curand_perturb,
}


def _reason(name: str, device: str, dist: str, tiny: bool) -> str | None:
    if name != "compile":
        if device != "cuda":
            return "needs an NVIDIA GPU"
        return "draws normals only" if dist != "normal" else None
    return "takes longer to compile than a tiny run may last" if tiny else None


def usable(device: str, dtype: torch.dtype, dist: str, tiny: bool) -> dict[str, Callable[..., None]]:
    """``PERTURB`` and those of ``OPTIONAL`` that run here, each tried once; why the others do not is recorded.

    The trial compiles, so that no compilation is timed.
    """
    found = dict(PERTURB)
    for name, perturb in OPTIONAL.items():
        reason = _reason(name, device, dist, tiny)
        if reason is None:
            try:
                with torch.no_grad():
                    perturb([torch.zeros(4096, dtype=dtype, device=device)], 1, 1e-3, 0, dist)
                if device == "cuda":
                    torch.cuda.synchronize()
                found[name] = perturb
                continue
            except Exception as error:  # whatever a compiler raises: the comparison is lost, the run is not
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        skip(f"baseline {name}, {dist}", reason)
    return found


def copy_in_place(tensor: Tensor) -> None:
    """Read and write every byte of ``tensor`` where it lies: the floor of an in-place pass.

    Bits are flipped as int64, so that the pass costs the same in every dtype: ``mul_`` in half precision converts on
    the CPU, and on arbitrary bits meets subnormals.  ``x.copy_(x)`` would be skipped by torch.
    """
    tensor.view(torch.int64).bitwise_not_()
