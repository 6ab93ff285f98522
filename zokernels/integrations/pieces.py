"""Where an engine keeps each weight of a checkpoint: found by watching it load one that has no memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..checks import fail
from ..contract import canonical_name
from ..files.safetensors import DTYPES as DTYPES_BY_NAME
from ..files.safetensors import Checkpoint

_COPY = torch.ops.aten.copy_.default
#: What may be done to a parameter besides copying to it: padding is filled with a number.
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


class Piece(NamedTuple):
    """Neighbouring elements of an engine's tensor, and what they are in the checkpoint."""

    name: str  #: the parameter in the checkpoint
    shape: tuple[int, ...]  #: its whole shape there
    parameter: str  #: the tensor of the engine
    begin: int  #: the first of its elements, of ``numel``
    numel: int
    offset: int  #: flat index in the checkpoint's parameter of the first element
    row: tuple[int, int] | None  #: ``rows`` of :func:`zokernels.combine_`; None where all lie in one piece

    def of(self, tensor: Tensor) -> Tensor:
        """These elements, flat, of the engine's tensor."""
        return tensor.view(-1)[self.begin : self.begin + self.numel]

    def source(self, whole: Tensor) -> Tensor:
        """These elements of the checkpoint's parameter: a view [rows, width]."""
        width, length = self.row or (self.numel, self.numel)
        return torch.as_strided(
            whole, (self.numel // width, width), (length, 1), whole.storage_offset() + self.offset
        )


class Shape(NamedTuple):
    """A parameter of a checkpoint, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _span(part: Tensor) -> tuple[int, tuple[int, int] | None] | None:
    """The first index and the ``rows`` of a view of a contiguous tensor.

    None where it is no sequence of equally long rows at equal distances, such as a transposed matrix."""
    sizes = [(n, s) for n, s in zip(part.shape, part.stride(), strict=True) if n != 1]
    width = 1
    while sizes and sizes[-1][1] == width:
        width *= sizes.pop()[0]
    if not sizes:
        return int(part.storage_offset()), None
    count, length = sizes.pop()
    while sizes and sizes[-1][1] == length * count:
        count *= sizes.pop()[0]
    return None if sizes or length < width else (int(part.storage_offset()), (width, length))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # also tells tensors apart that have no memory


class _Loading(TorchDispatchMode):
    """Notes what is copied from a checkpoint's tensors into a model's, and refuses what is not a copy."""

    def __init__(self, sources: Mapping[int, str], targets: Mapping[int, str]) -> None:
        super().__init__()
        self.sources, self.targets = sources, targets
        self.copies: list[tuple[str, Tensor, str, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not written or not isinstance(value, Tensor):
                continue
            parameter = self.targets.get(_key(value))
            if func is _COPY and (parameter is not None or _key(args[1]) in self.sources):
                name = self.sources.get(_key(args[1]))
                if parameter is None:
                    fail("trace", str(name), "a copy into a parameter of the engine", "one into other memory")
                if name is None:
                    fail("trace", parameter, "weights as they are in the checkpoint", "computed ones")
                self.copies.append((name, args[1].expand_as(value), parameter, value))
            elif parameter is not None and func not in _FILLS:
                fail("trace", parameter, "weights as they are in the checkpoint", f"{func} after loading")
        return func(*args, **(kwargs or {}))


def trace(
    model: nn.Module,
    checkpoint: Mapping[str, Shape],
    load: Callable[[Iterable[tuple[str, Tensor]]], object],
) -> list[Piece]:
    """Where a model keeps each part of a checkpoint.

    Args:
        model: the engine's model of one rank, on torch's "meta" device: its parameters have no memory.
        checkpoint: the parameters of the checkpoint, by name.
        load: the model's own way to load a checkpoint: takes (name, tensor) pairs and copies what this rank
            keeps.  vLLM: ``model.load_weights``.

    Nothing is read or written; what ``load`` would copy is noted.

    Raises: ValueError naming the parameter where one gets no part of the checkpoint, or gets it changed
    (transposed, scaled, converted), or where the checkpoint has the same memory twice.
    """
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in checkpoint.items()
    }
    params = dict(model.named_parameters())
    for name, p in params.items():
        if p.device.type != "meta" or not p.is_contiguous():
            fail("trace", name, "a contiguous tensor on the meta device", f"{p.device}, {p.stride()}")
    targets = {_key(p): name for name, p in params.items()}
    with torch.no_grad(), _Loading({_key(t): name for name, t in tensors.items()}, targets) as loading:
        load(list(tensors.items()))
    pieces = []
    for name, source, parameter, target in loading.copies:
        if not target.numel():
            continue  # of a rank whose part of the vocabulary is all padding
        to, from_ = _span(target), _span(source)
        if to is None or to[1] is not None or from_ is None:
            expected = f"rows of {name} in one piece of memory"
            fail("trace", parameter, expected, f"strides {source.stride()} to {target.stride()}")
        pieces.append(
            Piece(
                canonical_name(name), tuple(checkpoint[name].shape), parameter,
                to[0], target.numel(), from_[0], from_[1],
            )
        )  # fmt: skip
    missing = sorted(params.keys() - {parameter for _, _, parameter, _ in loading.copies})
    if missing:
        fail("trace", missing[0], "a part of the checkpoint", f"none (as {len(missing)} parameters in all)")
    _check_apart(pieces)
    return pieces


def _check_apart(pieces: list[Piece]) -> None:
    """Raises ValueError where two pieces of a model share memory."""
    ordered = sorted(pieces, key=lambda p: (p.parameter, p.begin))
    for a, b in itertools.pairwise(ordered):
        if a.parameter == b.parameter and b.begin < a.begin + a.numel:
            fail("trace", a.parameter, "each element from one parameter", f"{a.name!r} and {b.name!r}")


def whole(params: Mapping[str, Tensor]) -> list[Piece]:
    """The pieces of a model that keeps its parameters as the checkpoint has them: one of Hugging Face.

    Tensors of integers have no noise."""
    return [
        Piece(canonical_name(name), tuple(p.shape), name, 0, p.numel(), 0, None)
        for name, p in params.items()
        if p.is_floating_point()
    ]


def shapes_of(base: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Shape]:
    """The floating-point parameters of a checkpoint, for :func:`trace`; ``dtype``: that of the engine."""
    found = {}
    for name, file in base.where.items():
        entry = file.entries[name]
        own = DTYPES_BY_NAME.get(entry.dtype)
        if own is None:
            fail("shapes_of", name, "a dtype that torch has", entry.dtype, TypeError)
        found[name] = Shape(entry.shape, dtype if dtype is not None and own.is_floating_point else own)
    return found
