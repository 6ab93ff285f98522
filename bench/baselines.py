"""What the kernels are compared against: the eager loops that zeroth-order trainers run today.

``mezo_*`` repeats the operations of MeZO's published trainer (Malladi et al., 2023, arXiv 2305.17333).  It
draws a z of the parameter's size and dtype from torch's global generator, and computes out of place into
``param.data``. ``foreach_*`` and ``inplace_*`` are the same loop as a careful user of eager torch would write
it.  ``compile_*`` is the loop under torch.compile.  ``triton_*`` and ``curand_*`` are kernels in which
another generator is fused. :func:`usable` finds out which of these run on the machine at hand.  Parameters
may be tensors or ``nn.Parameter``."""

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


def mezo_perturb(
    params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal"
) -> None:
    """theta + scaling * eps * z, one tensor after the other.

    Each tensor takes three passes of arithmetic, and memory for z and two temporaries.
    """
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
    """theta - lr * (g z + wd theta), one tensor after the other.

    The published loop computes the decay term even if wd is 0, but not for biases and norms.  Here every
    tensor has it, which on MiniLM-L6 adds 0.05 % of the elements."""
    torch.manual_seed(seed)
    for param in params:
        z = draw(param.data, dist)
        param.data = param.data - lr * (projected_grad * z + weight_decay * param.data)


def mezo_step(
    params: Sequence[Tensor], eps: float, lr: float, projected_grad: float, seed: int, dist: str = "normal"
) -> None:
    """The hot path of one step: +eps, -2 eps, +eps and the update.

    It takes 18 kernels for each tensor, and 37 memory accesses for each element.
    """
    for scaling in (1, -2, 1):
        mezo_perturb(params, scaling, eps, seed, dist)
    mezo_update(params, lr, projected_grad, seed, dist=dist)


def foreach_perturb(
    params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal"
) -> None:
    """theta + scaling * eps * z by one multi-tensor addition, for which all z exist at the same time."""
    torch.manual_seed(seed)
    tensors = [p.data for p in params]
    torch._foreach_add_(tensors, [draw(t, dist) for t in tensors], alpha=scaling * eps)


def inplace_perturb(
    params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal"
) -> None:
    """theta + scaling * eps * z by ``add_`` for each tensor: only one z exists at a time."""
    torch.manual_seed(seed)
    for param in params:
        z = draw(param.data, dist)
        param.data.add_(z, alpha=scaling * eps)


@functools.cache
def _compiled(dist: str) -> Callable[[Tensor, float], None]:
    """The body of the loop, compiled.

    The whole loop would be unrolled over the 400 parameters of a model, and compiling it would take minutes.
    The noise comes from ``randn_like``, which the compiler fuses with the sum."""

    def normal(theta: Tensor, c: float) -> None:
        theta.add_(torch.randn_like(theta), alpha=c)

    def rademacher(theta: Tensor, c: float) -> None:
        theta.add_(torch.randint_like(theta, 0, 2) * 2 - 1, alpha=c)

    return torch.compile(normal if dist == "normal" else rademacher, dynamic=True)


def compile_perturb(
    params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal"
) -> None:
    torch.manual_seed(seed)
    for param in params:
        _compiled(dist)(param.data.view(-1), scaling * eps)


def triton_perturb(
    params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal"
) -> None:
    from .triton_randn import perturb_

    for i, param in enumerate(params):
        perturb_(param.data, scaling * eps, seed + i)


def triton4x_perturb(
    params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal"
) -> None:
    from .triton_randn import perturb_, randn4x_kernel

    for i, param in enumerate(params):
        perturb_(param.data, scaling * eps, seed + i, randn4x_kernel)


def curand_perturb(
    params: Sequence[Tensor], scaling: float, eps: float, seed: int, dist: str = "normal"
) -> None:
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
    """``PERTURB``, and those of ``OPTIONAL`` that run here.

    Each of them is tried once, which also compiles it, so that no compilation is timed.  Why one does not run
    is written to the results."""
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
                first = str(error).strip().splitlines()[0][:200] if str(error) else ""
                reason = f"{type(error).__name__}: {first}"
        skip(f"baseline {name}, {dist}", reason)
    return found


def copy_in_place(tensor: Tensor) -> None:
    """Reads and writes every byte of ``tensor`` where it lies.  No pass in place can be faster.

    The bits are flipped as int64, so that the pass costs the same in every dtype.  ``mul_`` would convert
    half precision on the CPU, and would meet subnormals.  torch skips ``x.copy_(x)``."""
    tensor.view(torch.int64).bitwise_not_()
