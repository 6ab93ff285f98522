"""Linear layers with integer weights, and what of them can be trained: the scales (QZO), the integers
(QuZO).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import DTYPES, fail


def limit_of(bits: int) -> int:
    """Integers of ``bits`` bits lie in [-limit, limit]: 127 or 7.

    The range is symmetric, -128 and -8 are not used.
    """
    return (1 << bits - 1) - 1


def pack_int4(integers: Tensor) -> Tensor:
    """int8 [..., n] with values in [-8, 7] as uint8 [..., (n + 1) / 2], two a byte, the first in the low
    half.
    """
    even, odd = integers[..., ::2] & 15, F.pad(integers, (0, integers.shape[-1] & 1))[..., 1::2] & 15
    return even.view(torch.uint8) | odd.view(torch.uint8) << 4


def unpack_int4(packed: Tensor, n: int) -> Tensor:
    """The int8 [..., n] of :func:`pack_int4`."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :n]
    return (halves.view(torch.int8) ^ 8) - 8  # bit 3 is the sign


class QuantizedLinear(nn.Module):
    """y = x W^T + b,   W[o, i] = scale[o, i // group_size] * weight[o, i].

    ``weight`` is a buffer of integers in [-127, 127] (8 bits) or [-7, 7] (4 bits): int8 [out, in], or,
    ``packed``, uint8 [out, (in + 1) / 2] (:func:`pack_int4`).  ``scale`` is a parameter [out, in /
    group_size] of fp32, bf16 or fp16; so is ``bias`` [out].  The forward multiplies out W in the scale's
    dtype, rounds it to x's and calls ``F.linear``: beside the integers, memory for one layer's W at a time.

    Args:
        bits: 8 or 4.
        group_size: inputs that share a scale, a divisor of ``in_features``; None: one scale for each output.
        packed: two integers a byte; default: where ``bits`` is 4.  :class:`~zokernels.optim.QuZO` trains
            unpacked ones.
        dtype: of scale and bias.

    A layer made so has zeros for weights: it is for loading a ``state_dict``; see :meth:`from_linear`.

    Raises: ValueError, TypeError: naming argument, what was expected and what came.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        group_size: int | None = None,
        packed: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bits not in (4, 8):
            fail("QuantizedLinear", "bits", "8 or 4", repr(bits))
        group_size = in_features if group_size is None else group_size
        if not isinstance(group_size, int) or group_size < 1 or in_features % group_size:
            fail("QuantizedLinear", "group_size", f"a divisor of {in_features} inputs", repr(group_size))
        packed = bits == 4 if packed is None else packed
        if packed and bits != 4:
            fail("QuantizedLinear", "packed", "False with 8 bits", packed)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            fail("QuantizedLinear", "dtype", "float32, bfloat16 or float16", dtype, TypeError)
        self.in_features, self.out_features, self.bits, self.group_size = (
            in_features,
            out_features,
            bits,
            group_size,
        )
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", pack_int4(weight) if packed else weight)
        self.scale = nn.Parameter(
            torch.ones(out_features, in_features // group_size, dtype=dtype, device=device)
        )
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def packed(self) -> bool:
        return self.weight.dtype is torch.uint8

    @property
    def integers(self) -> Tensor:
        """int8 [out, in]: the weight itself, or unpacked."""
        return unpack_int4(self.weight, self.in_features) if self.packed else self.weight

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 8,
        group_size: int | None = None,
        *,
        packed: bool | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """``linear`` rounded: scale = max \\|W\\| / limit of each group, to nearest; weight = W / scale, ties
        to even.

        A group of zeros has scale 1.  ``scale_dtype``: default that of ``linear``.  The bias is taken over as
        it is."""
        weight = linear.weight.detach()
        dtype = weight.dtype if scale_dtype is None else scale_dtype
        out, inputs = weight.shape
        layer = cls(
            *(inputs, out, False),
            bits=bits,
            group_size=group_size,
            packed=packed,
            device=weight.device,
            dtype=dtype,
        )
        limit, groups = limit_of(bits), weight.float().view(out, -1, layer.group_size)
        scale = (groups.abs().amax(-1) / limit).to(dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        integers = (
            (groups / scale.float()[..., None]).round().clamp(-limit, limit).to(torch.int8).view(out, inputs)
        )
        layer.weight.copy_(pack_int4(integers) if layer.packed else integers)
        layer.scale.copy_(scale)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.integers.to(self.scale.dtype).unflatten(1, (-1, self.group_size))
        weight = (groups * self.scale.unsqueeze(-1)).flatten(1)
        return F.linear(x, weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        sizes = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}, packed={self.packed}"


def quantize_(
    module: nn.Module,
    bits: int = 8,
    group_size: int | None = None,
    *,
    skip: Collection[str] = (),
    packed: bool | None = None,
    scale_dtype: torch.dtype | None = None,
) -> list[str]:
    """Replace each ``nn.Linear`` inside ``module`` by a :class:`QuantizedLinear`, in place; returns their
    names.

    Subclasses of ``nn.Linear`` stay: who owns them reads their weight (attention's output projection).

    Args:
        skip: names of modules that stay as they are, with all that is in them ("lm_head",
            "encoder.layers.0").
        bits, group_size, packed, scale_dtype: as :meth:`QuantizedLinear.from_linear`.

    Raises: ValueError, before anything is replaced, where another module holds a layer's weight (a tied
        head), where ``module`` itself is the layer, or where ``skip`` names nothing.
    """
    modules = dict(module.named_modules())
    skipped = lambda name: any(name == s or name.startswith(f"{s}.") for s in skip)
    if type(module) is nn.Linear:
        fail(
            "quantize_",
            "module",
            "a module that holds layers",
            "an nn.Linear: use QuantizedLinear.from_linear",
        )
    for name in skip:
        if name not in modules:
            fail("quantize_", "skip", "names of modules", repr(name))
    found = {name: m for name, m in modules.items() if type(m) is nn.Linear and not skipped(name)}
    for name, linear in found.items():
        for other, m in modules.items():
            if m is not linear and any(p is linear.weight for p in m.parameters(recurse=False)):
                fail("quantize_", "skip", f"{name!r}, whose weight {other!r} holds as well", list(skip))
    made = {
        linear: QuantizedLinear.from_linear(linear, bits, group_size, packed=packed, scale_dtype=scale_dtype)
        for linear in found.values()
    }
    for parent in modules.values():
        for name, child in list(parent._modules.items()):  # named_children leaves out second names
            if child in made:
                setattr(parent, name, made[child])
    return list(found)


def named_scales(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and scales of the :class:`QuantizedLinear` layers, which :class:`~zokernels.optim.QZO` trains.

    Source: QZO, Shang et al. 2025 (arXiv 2505.13430).
    """
    for name, layer in _layers(module):
        yield f"{name}.scale".lstrip("."), layer.scale


def named_integers(module: nn.Module) -> list[dict[str, Any]]:
    """The integers of the :class:`QuantizedLinear` layers, as parameter groups of
    :class:`~zokernels.optim.QuZO`: one for each number of bits.

    Raises: ValueError where they are packed.
    """
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, layer in _layers(module):
        if layer.packed:
            fail("named_integers", name, "integers of a byte each (packed=False)", "packed ones")
        groups.setdefault(layer.bits, []).append((f"{name}.weight".lstrip("."), layer.weight))
    return [{"params": params, "bits": bits} for bits, params in groups.items()]


def _layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    return ((name, m) for name, m in module.named_modules() if isinstance(m, QuantizedLinear))
