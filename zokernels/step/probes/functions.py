"""Torch functions as a forward sees them: which read no element, and parameters among their arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import resolve_name

from .guard import CONTAINERS, Guard

_GETTERS = """
    shape dtype device layout requires_grad is_leaf grad grad_fn ndim itemsize nbytes name output_nr
    retains_grad is_cuda is_cpu is_sparse is_sparse_csr is_quantized is_meta is_mps is_xpu is_nested is_mkldnn
    is_mtia is_xla is_vulkan is_ipu is_maia names _version _backward_hooks _grad
""".split()  # noqa: SIM905
_METHODS = """
    size dim ndimension numel nelement stride storage_offset is_contiguous is_floating_point is_complex
    is_signed is_inference is_conj is_neg is_pinned is_shared is_coalesced is_same_size element_size
    get_device requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad _is_view has_names
    __len__ __hash__
""".split()  # noqa: SIM905


def _setter(name: str) -> Any:
    return getattr(Tensor, name).__set__  # a descriptor, which torch's stubs call by the type of its value


def _metadata() -> frozenset[Any]:
    """Functions that read no element.  They see the parameter itself, and no copy is made for them."""
    functions: list[Any] = [getattr(Tensor, n).__get__ for n in _GETTERS if hasattr(Tensor, n)]
    functions += [getattr(Tensor, n) for n in _METHODS if hasattr(Tensor, n)]
    functions += [_setter("requires_grad"), _setter("grad"), torch.numel, torch.is_floating_point]
    functions += [
        torch.is_complex,
        torch.is_signed,
        torch.is_inference,
        torch.is_same_size,
        torch.result_type,
    ]
    functions += [torch.empty_like, torch.zeros_like, torch.ones_like]
    functions += [torch.rand_like, torch.randn_like, torch.full_like]
    functions += [Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor]
    return frozenset(functions)


#: Functions that give out an address without a reference to its memory.  The copy then lives to the end of
#: the forward.
_ADDRESS = frozenset((Tensor.data_ptr, Tensor.__cuda_array_interface__.__get__))
_SET_DATA = _setter("data")
#: ``p.data`` of a copy counts versions of its own, so that writes to it would go unnoticed; ``detach`` does
#: not.
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

USE_INPLACE = "use restore='inplace', which perturbs the parameters themselves"


class HiddenParameters(RuntimeError):
    """The closure reads parameters where the exact probe cannot perturb them; they have not changed."""


def refuse_write(op: str, func: Any = "an operation on a view of one") -> NoReturn:
    name = func if isinstance(func, str) else resolve_name(func) or func
    raise RuntimeError(
        f"{op}: closure: expected a forward that does not write to its parameters, got {name}, whose effect "
        "would be lost with the perturbed copy; do it outside step()"
    )


def members(value: Any) -> Iterable[Any] | None:
    if isinstance(value, (list, tuple)):
        return value
    return value.values() if isinstance(value, dict) else None


def find(values: Iterable[Any], params: dict[int, Tensor], found: list[Tensor]) -> None:
    """Puts those of ``params`` (by id) and all guarded parameters into ``found`` that occur in ``values``."""
    for value in values:
        if isinstance(value, CONTAINERS):
            find(members(value) or (), params, found)
        elif isinstance(value, Guard) or id(value) in params:
            found.append(value)


def swap(value: Any, copies: dict[int, Tensor]) -> Any:
    """``value`` with a copy in the place of each parameter.  Containers without one are left as they are."""
    if (copy := copies.get(id(value))) is not None:
        return copy
    if isinstance(value, dict):
        swapped = {k: swap(v, copies) for k, v in value.items()}
        return swapped if any(swapped[k] is not value[k] for k in value) else value
    if isinstance(value, (list, tuple)):
        items = [swap(v, copies) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


#: What is done with functions that are not simply given copies.
METADATA, GIVES_ADDRESS, GIVES_DATA, SETS_DATA = "metadata", "address", "data", "sets data"
SPECIAL: dict[Any, str] = {
    **dict.fromkeys(_metadata(), METADATA),
    **dict.fromkeys(_ADDRESS, GIVES_ADDRESS),
    _GET_DATA: GIVES_DATA,
    _SET_DATA: SETS_DATA,
}
