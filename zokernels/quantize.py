"""Layers with integer weights, and what of them can be trained: the scales (QZO), the integers (QuZO)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .checks import DTYPES, fail
from .ops.quantized_linear import MAX_GROUP, quantized_linear
from .ops.requantize import pack_int4, unpack_int4

__all__ = [
    "QuantizedConv", "QuantizedEmbedding", "QuantizedLayer", "QuantizedLinear", "limit_of", "named_integers",
    "named_scales", "pack_int4", "quantize_", "unpack_int4",
]  # fmt: skip


def limit_of(bits: int) -> int:
    """Integers of ``bits`` bits lie in [-limit, limit]: 127 or 7.

    The range is symmetric, -128 and -8 are not used.
    """
    return (1 << bits - 1) - 1


#: Bytes of the rows of W that a product multiplies out at a time.  On the CPU they stay in a core's cache.
_TILE = {"cpu": 1 << 20, "cuda": 16 << 20}
#: Rows of x up to which W is multiplied in integers.  With more, tiles are faster on most machines, and the
#: number is one for all, so that the same product has the same bits on each of them.
_FEW_ROWS = 64


class QuantizedLayer(nn.Module):
    """What quantised layers share: W[o, i] = scale[o, i // group_size] * weight[o, i], a matrix [out, in].

    ``weight`` is a buffer of integers in [-127, 127] (8 bits) or [-7, 7] (4 bits): int8 [out, in], or,
    ``packed``, uint8 [out, (in + 1) / 2] (:func:`pack_int4`).  ``scale`` is a parameter [out, in /
    group_size] of fp32, bf16 or fp16; so is ``bias`` [out].  What out and in are, a subclass says.

    Args:
        out, inputs: the shape of W.
        bits: 8 or 4.
        group_size: how many neighbours in a row share a scale, a divisor of ``inputs``; None: all of a row.
        packed: two integers a byte; default: where ``bits`` is 4.
        dtype: of scale and bias.

    Raises: ValueError, TypeError: naming argument, what was expected and what came.
    """

    weight: Tensor
    #: How linear layers and convolutions multiply by W, of a layer or, set on the class, of all.
    #:
    #: "tiled": without a copy of W in floats.  Up to 64 rows of x are multiplied by the integers themselves
    #: (:func:`zokernels.quantized_linear`), with the same bits on every device and for any number of threads.
    #: For more, some rows of W are multiplied out at a time, and so they are for a convolution that is more
    #: than a product at each place.  "whole": W is multiplied out, and then used.  The outputs of these three
    #: differ in last bits: a product sums in another order, and tiles of W are rounded to the dtype of x.
    #:
    #: "int8": activations are rounded, too.  Each row of a linear layer's x has one scale, max |x| / 127, and
    #: products are of integers, which are summed exactly; so the outputs have the same bits on every device
    #: and for any number of threads.  Convolutions and embeddings are as with "tiled".
    #:
    #: Forwards for a backward, of dual numbers, under autocast, in a transform of torch.func or in a graph
    #: that torch.compile makes are "whole".
    product = "tiled"

    def __init__(
        self,
        out: int,
        inputs: int,
        bias: bool,
        *,
        bits: int,
        group_size: int | None,
        packed: bool | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if bits not in (4, 8):
            fail(op, "bits", "8 or 4", repr(bits))
        group_size = inputs if group_size is None else group_size
        if not isinstance(group_size, int) or group_size < 1 or inputs % group_size:
            fail(op, "group_size", f"a divisor of {inputs} inputs", repr(group_size))
        packed = bits == 4 if packed is None else packed
        if packed and bits != 4:
            fail(op, "packed", "False with 8 bits", packed)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            fail(op, "dtype", "float32, bfloat16 or float16", dtype, TypeError)
        self.bits, self.group_size, self._inputs = bits, group_size, inputs
        weight = torch.zeros(out, inputs, dtype=torch.int8, device=device)
        self.register_buffer("weight", pack_int4(weight) if packed else weight)
        self.scale = nn.Parameter(torch.ones(out, inputs // group_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out, dtype=dtype, device=device)) if bias else None

    @property
    def packed(self) -> bool:
        return self.weight.dtype is torch.uint8

    @property
    def integers(self) -> Tensor:
        """int8 [out, in]: the weight itself, or unpacked."""
        return unpack_int4(self.weight, self._inputs) if self.packed else self.weight

    @torch.no_grad()
    def _round(self, weight: Tensor) -> None:
        """Takes over W [out, in]: scale = max |W| / limit of each group, to nearest; weight = W / scale,
        ties to even.  A group of zeros has scale 1.
        """
        limit, groups = limit_of(self.bits), weight.detach().float().unflatten(1, (-1, self.group_size))
        scale = (groups.abs().amax(-1) / limit).to(self.scale.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        integers = (groups / scale.float()[..., None]).round().clamp(-limit, limit).to(torch.int8).flatten(1)
        self.weight.copy_(pack_int4(integers) if self.packed else integers)
        self.scale.copy_(scale)

    def _is_whole(self, x: Tensor) -> bool:
        """Whether a forward multiplies out W at once."""
        if self.product not in ("tiled", "whole", "int8"):
            fail(type(self).__name__, "product", "'tiled', 'whole' or 'int8'", repr(self.product))
        tensors = (x, self.scale, *(() if self.bias is None else (self.bias,)))
        return (
            self.product == "whole"
            or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            or forward_ad._current_level >= 0
            or torch.is_autocast_enabled(x.device.type)
            or torch._C._functorch.maybe_current_level() is not None
            or torch.compiler.is_compiling()
        )

    def _operation(self, x: Tensor, x_bits: int = 24) -> Tensor:
        """x W^T + b of x [rows, in], by the integers themselves."""
        weight, scale = self.weight[:].contiguous(), self.scale[:].contiguous()
        bias = None if self.bias is None else self.bias[:].contiguous()
        return quantized_linear(x.contiguous(), weight, scale, bias, x_bits=x_bits)

    def _takes_operation(self, x: Tensor) -> bool:
        few = len(x) <= _FEW_ROWS and self.group_size <= MAX_GROUP
        return few and x.dtype in DTYPES and x.device.type in ("cpu", "cuda")

    def _integer_tiles(self, itemsize: int, multiple: int = 1) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The numbers of some rows, their integers and their scales.

        They are as many rows at a time as a tile holds of numbers of ``itemsize`` bytes, and a ``multiple``.
        """
        weight, scale = self.weight[:], self.scale[:]
        held = _TILE.get(weight.device.type, _TILE["cuda"]) // (itemsize * self._inputs)
        count = max(1, held // multiple) * multiple
        for first in range(0, len(weight), count):
            rows = slice(first, min(first + count, len(weight)))
            integers = unpack_int4(weight[rows], self._inputs) if self.packed else weight[rows]
            yield rows, integers, scale[rows]

    def _tiles(self, dtype: torch.dtype, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """The numbers of some rows and these rows of W in ``dtype``, as many at a time as a tile holds."""
        of_scale = self.scale.dtype
        for rows, integers, scale in self._integer_tiles(max(of_scale.itemsize, dtype.itemsize), multiple):
            tile = integers.to(of_scale)
            tile.unflatten(-1, (-1, self.group_size)).mul_(scale.unsqueeze(-1))
            yield rows, tile.to(dtype)

    def _multiplied(self, integers: Tensor, scale: Tensor) -> Tensor:
        """Rows of W, in the scale's dtype, from rows of the integers and of the scale."""
        groups = integers.to(scale.dtype).unflatten(-1, (-1, self.group_size))
        multiplied: Tensor = (groups * scale.unsqueeze(-1)).flatten(-2)
        return multiplied

    def _extra(self, sizes: str) -> str:
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}, packed={self.packed}"


class QuantizedLinear(QuantizedLayer):
    """y = x W^T + b,   W[o, i] = scale[o, i // group_size] * weight[o, i].

    out are the outputs and in the inputs of the layer (:class:`QuantizedLayer`).  The forward multiplies few
    rows of x by the integers themselves.  For more it multiplies out rows of W in the scale's dtype, rounds
    them to x's and calls ``F.linear``: beside the integers, memory for some rows at a time (:attr:`product`).

    Args:
        bits, group_size, packed, dtype: as for :class:`QuantizedLayer`.

    A layer made so has zeros for weights: it is for loading a ``state_dict``; see :meth:`from_linear`.

    Raises: ValueError, TypeError: naming argument, what was expected and what came.
    """

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
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "packed": packed}
        super().__init__(out_features, in_features, bias, **options, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 8,
        group_size: int | None = None,
        *,
        packed: bool | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """``linear`` rounded: scale = max |W| / limit of each group, to nearest; weight = W / scale, ties
        to even.

        A group of zeros has scale 1.  ``scale_dtype``: default that of ``linear``.  The bias is taken over as
        it is."""
        weight = linear.weight
        layer = cls(
            *(linear.in_features, linear.out_features, False),
            bits=bits,
            group_size=group_size,
            packed=packed,
            device=weight.device,
            dtype=weight.dtype if scale_dtype is None else scale_dtype,
        )
        layer._round(weight)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_whole(x):
            return F.linear(x, self._multiplied(self.integers, self.scale).to(x.dtype), self.bias)
        rows = x.reshape(-1, self.in_features)
        if self.product == "int8":
            # cuBLAS, whose product of integers is the fastest of many rows, wants multiples of 8.
            fits = x.is_cuda and len(rows) > _FEW_ROWS and not (self.group_size | self.out_features) % 8
            y = self._product_of_integers(rows) if fits else self._operation(rows, 8)
        elif self._takes_operation(rows):
            y = self._operation(rows)
        else:
            bias = None if self.bias is None else self.bias[:]
            y = rows.new_empty(len(rows), self.out_features)
            for at, tile in self._tiles(x.dtype):
                y[:, at] = F.linear(rows, tile, None if bias is None else bias[at])
        shaped: Tensor = y.view(*x.shape[:-1], self.out_features)
        return shaped

    def _product_of_integers(self, rows: Tensor) -> Tensor:
        """What :meth:`_operation` gives for 8 bits, by products of matrices, which take many rows at once."""
        x = rows.float()
        step = x.abs().amax(1, keepdim=True) / 127
        step = torch.where(step == 0, 1.0, step)
        q, size = (x / step).round_().clamp_(-127, 127).to(torch.int8), self.group_size
        y = torch.zeros(len(x), self.out_features, dtype=torch.float32, device=x.device)
        for at, integers, scale in self._integer_tiles(1, 8):
            part = y[:, at]
            for g, (a, b) in enumerate(zip(q.split(size, 1), integers.split(size, 1), strict=True)):
                sums = torch._int_mm(a.contiguous(), b.contiguous().t())
                part += sums.float().mul_(scale[:, g].float())
        y.mul_(step)
        return (y if self.bias is None else y.add_(self.bias[:].float())).to(rows.dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return self._extra(f"{sizes}, bias={self.bias is not None}")


class QuantizedConv(QuantizedLayer):
    """y = conv(x, W) + b, a convolution in one, two or three dimensions (``nn.Conv1d``, ``2d``, ``3d``).

    out are the output channels.  in are the input channels of a group of the convolution times the elements
    of its kernel, in the order of the convolution's own weight (:class:`QuantizedLayer`).  The forward
    multiplies out some output channels' weights at a time in the scale's dtype, rounds them to x's and runs
    the convolution (:attr:`product`); of a convolution in groups, those of some groups.  A convolution of one
    element in the kernel (stride 1, no padding, one group) multiplies few places as a linear layer its rows.

    Args:
        like: the convolution whose sizes, stride, padding, dilation, groups and padding mode this one has.
            Its weights are not taken: :meth:`from_conv` takes them.
        bits, group_size, packed, dtype: as for :class:`QuantizedLayer`; dtype is by default that of ``like``.

    Raises: ValueError, TypeError: naming argument, what was expected and what came.
    """

    def __init__(
        self,
        like: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        *,
        bits: int = 8,
        group_size: int | None = None,
        packed: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if type(like) not in _CONVS:
            fail(
                "QuantizedConv",
                "like",
                "an nn.Conv1d, nn.Conv2d or nn.Conv3d",
                type(like).__name__,
                TypeError,
            )
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "packed": packed}
        out, *kernel = like.weight.shape
        super().__init__(
            *(out, math.prod(kernel), like.bias is not None),
            **options,
            device=like.weight.device if device is None else device,
            dtype=like.weight.dtype if dtype is None else dtype,
        )
        #: [in channels of a group, *kernel], the shape of one output channel's weights.
        self.kernel = tuple(kernel)
        # The convolution runs as its class does, with W in the place of its own weight, which it has no more.
        # In a tuple it is no submodule, so that nobody finds a convolution to quantise in it.
        with torch.device("meta"):
            conv = type(like)(
                *(like.in_channels, like.out_channels, like.kernel_size, like.stride),  # type: ignore[arg-type]
                *(like.padding, like.dilation, like.groups, False, like.padding_mode),  # type: ignore[arg-type]
            )
        del conv.weight
        self._like = (conv,)
        # Whether it is a product of the channels at each place by itself.
        sizes = (conv.kernel_size, conv.stride, (conv.groups,))
        padded = conv.padding not in ("valid", "same") and any(conv.padding)
        self._is_product = not padded and {n for size in sizes for n in size} == {1}

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        bits: int = 8,
        group_size: int | None = None,
        *,
        packed: bool | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> QuantizedConv:
        """``conv`` rounded, as :meth:`QuantizedLinear.from_linear`."""
        layer = cls(conv, bits=bits, group_size=group_size, packed=packed, dtype=scale_dtype)
        layer._round(conv.weight.detach().flatten(1))
        layer.bias = conv.bias  # type: ignore[assignment]  # a parameter, says torch, or a tensor
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        conv = self._like[0]
        if self._is_whole(x):
            weight = self._multiplied(self.integers, self.scale).unflatten(1, self.kernel)
            whole: Tensor = conv._conv_forward(x, weight.to(x.dtype), self.bias)
            return whole
        y: Tensor | None = None
        channels = -len(self.kernel)  # the dimension, for x may have none for a batch
        places = x.movedim(channels, -1)
        if self._is_product and self._takes_operation(rows := places.flatten(0, -2)):
            made = self._operation(rows).view(*places.shape[:-1], len(self.weight))
            return made.movedim(-1, channels).contiguous()
        of_group, part_of = len(self.weight) // conv.groups, copy.copy(conv)
        for at, tile in self._tiles(x.dtype, of_group if conv.groups > 1 else 1):
            bias = None if self.bias is None else self.bias[at]
            if conv.groups > 1:  # a part of the groups has a part of the input channels
                part_of.groups = (at.stop - at.start) // of_group
                inputs = at.start // of_group * self.kernel[0], part_of.groups * self.kernel[0]
            read = x.narrow(channels, *inputs) if conv.groups > 1 else x
            part: Tensor = part_of._conv_forward(read, tile.unflatten(1, self.kernel), bias)
            if at == slice(0, len(self.weight)):
                return part
            if y is None:
                sizes = list(part.shape)
                sizes[channels] = len(self.weight)
                y = part.new_empty(sizes)
            y.narrow(channels, at.start, at.stop - at.start).copy_(part)
        assert y is not None  # a layer has output channels
        return y

    def extra_repr(self) -> str:
        return self._extra(f"bias={self.bias is not None}")


class QuantizedEmbedding(QuantizedLayer):
    """y = W[ids]: out are the rows of the table, and in is the length of a vector (:class:`QuantizedLayer`).

    Only the rows that are looked up are multiplied out, in the scale's dtype.

    Args:
        padding_idx: as of ``nn.Embedding``: which row stands for padding.  It matters for gradients alone,
            of which the integers have none; so it is only kept.
        bits, group_size, packed, dtype: as for :class:`QuantizedLayer`.

    Raises: ValueError, TypeError: naming argument, what was expected and what came.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bits: int = 8,
        group_size: int | None = None,
        packed: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "packed": packed}
        super().__init__(num_embeddings, embedding_dim, False, **options, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        bits: int = 8,
        group_size: int | None = None,
        *,
        packed: bool | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> QuantizedEmbedding:
        """``embedding`` rounded, as :meth:`QuantizedLinear.from_linear`."""
        weight = embedding.weight
        if embedding.max_norm is not None:
            got = embedding.max_norm
            fail("QuantizedEmbedding", "max_norm", "None: a forward that writes its weights", got)
        layer = cls(
            *(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx),
            bits=bits,
            group_size=group_size,
            packed=packed,
            device=weight.device,
            dtype=weight.dtype if scale_dtype is None else scale_dtype,
        )
        layer._round(weight)
        return layer.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        return self._multiplied(
            unpack_int4(rows, self._inputs) if self.packed else rows, F.embedding(ids, self.scale)
        )

    def extra_repr(self) -> str:
        return self._extra(f"{self.num_embeddings}, {self.embedding_dim}")


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: How a layer of each kind is rounded.
_KINDS: dict[type[nn.Module], Callable[..., QuantizedLayer]] = {
    nn.Linear: QuantizedLinear.from_linear,
    **dict.fromkeys(_CONVS, QuantizedConv.from_conv),
    nn.Embedding: QuantizedEmbedding.from_embedding,
}


def quantize_(
    module: nn.Module,
    bits: int = 8,
    group_size: int | None = None,
    *,
    skip: Collection[str] = (),
    packed: bool | None = None,
    scale_dtype: torch.dtype | None = None,
    layers: Collection[type[nn.Module]] = (nn.Linear,),
) -> list[str]:
    """Replace the layers of some kinds inside ``module`` by quantised ones, in place; returns their names.

    ``nn.Linear`` becomes :class:`QuantizedLinear`, a convolution :class:`QuantizedConv`, ``nn.Embedding``
    :class:`QuantizedEmbedding`.  Subclasses stay: who owns them reads their weight (attention's output
    projection).

    Args:
        layers: which kinds: some of ``nn.Linear`` (the default), ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``
            and ``nn.Embedding``.
        skip: names of modules that stay as they are, with all that is in them ("lm_head",
            "encoder.layers.0").
        bits, group_size, packed, scale_dtype: as :meth:`QuantizedLinear.from_linear`.

    Raises: ValueError, before anything is replaced, where another module holds a layer's weight (a tied
        head), where ``module`` itself is the layer, where a group size does not fit, or where ``skip`` names
        nothing.
    """
    for kind in layers:
        if kind not in _KINDS:
            kinds = ", ".join(k.__name__ for k in _KINDS)
            fail("quantize_", "layers", f"kinds of layers among {kinds}", repr(kind), TypeError)
    modules = dict(module.named_modules())
    skipped = lambda name: any(name == s or name.startswith(f"{s}.") for s in skip)
    if type(module) in layers:
        made_by = _KINDS[type(module)].__qualname__
        got = f"an nn.{type(module).__name__}: use {made_by}"
        fail("quantize_", "module", "a module that holds layers", got)
    for name in skip:
        if name not in modules:
            fail("quantize_", "skip", "names of modules", repr(name))
    found = {name: m for name, m in modules.items() if type(m) in layers and not skipped(name)}
    for name, layer in found.items():
        for other, m in modules.items():
            if m is not layer and any(p is layer.weight for p in m.parameters(recurse=False)):
                fail("quantize_", "skip", f"{name!r}, whose weight {other!r} holds as well", list(skip))
    made = {
        layer: _KINDS[type(layer)](layer, bits, group_size, packed=packed, scale_dtype=scale_dtype)
        for layer in found.values()
    }
    for parent in modules.values():
        for name, child in list(parent._modules.items()):  # named_children leaves out second names
            if child in made:
                setattr(parent, name, made[child])
    return list(found)


def named_scales(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and scales of the quantised layers, which :class:`~zokernels.optim.QZO` trains.

    Source: QZO, Shang et al. 2025 (arXiv 2505.13430).
    """
    for name, layer in _layers(module):
        yield f"{name}.scale".lstrip("."), layer.scale


def named_integers(module: nn.Module) -> list[dict[str, Any]]:
    """The integers of the quantised layers, as parameter groups of
    :class:`~zokernels.optim.QuZO` and :class:`~zokernels.optim.QES`: one for each number of bits.

    Packed integers are trained as they are, with the bits that they would have in a byte each.

    Raises: ValueError where a packed row ends in half a byte, which belongs to no weight.
    """
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, layer in _layers(module):
        if layer.packed and layer._inputs % 2:
            expected = "an even number of inputs, or packed=False"
            fail("named_integers", name, expected, f"packed rows of {layer._inputs}")
        groups.setdefault(layer.bits, []).append((f"{name}.weight".lstrip("."), layer.weight))
    return [{"params": params, "bits": bits} for bits, params in groups.items()]


def _layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    return ((name, m) for name, m in module.named_modules() if isinstance(m, QuantizedLayer))
