"""A torch function mode that hands every function perturbed copies in place of the parameters it is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name

from ..noise import Members
from ..scratch import ScratchPool
from ..types import Bucket, Point, Seeds, terms

_GETTERS = """shape dtype device layout requires_grad is_leaf grad grad_fn ndim itemsize nbytes name output_nr
    retains_grad is_cuda is_cpu is_sparse is_sparse_csr is_quantized is_meta is_mps is_xpu is_nested is_mkldnn is_mtia
    is_xla is_vulkan is_ipu is_maia names _version _backward_hooks _grad""".split()  # noqa: SIM905
_METHODS = """size dim ndimension numel nelement stride storage_offset is_contiguous is_floating_point is_complex
    is_signed is_inference is_conj is_neg is_pinned is_shared is_coalesced is_same_size element_size get_device
    requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad _is_view has_names
    __len__ __hash__""".split()  # noqa: SIM905


def _setter(name: str) -> Any:
    return getattr(Tensor, name).__set__  # a descriptor, which torch's stubs call by the type of its value


def _metadata() -> frozenset[Any]:
    """Functions that read no element.  They see the parameter itself, and no copy is made for them."""
    functions: list[Any] = [getattr(Tensor, n).__get__ for n in _GETTERS if hasattr(Tensor, n)]
    functions += [getattr(Tensor, n) for n in _METHODS if hasattr(Tensor, n)]
    functions += [_setter("requires_grad"), _setter("grad"), torch.numel, torch.is_floating_point]
    functions += [torch.is_complex, torch.is_signed, torch.is_inference, torch.is_same_size, torch.result_type]
    functions += [torch.empty_like, torch.zeros_like, torch.ones_like]
    functions += [torch.rand_like, torch.randn_like, torch.full_like]
    functions += [Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor]
    return frozenset(functions)


_METADATA = _metadata()
#: Functions that give out an address without a reference to its memory.  The copy then lives to the end of
#: the forward.
_ADDRESS = frozenset((Tensor.data_ptr, Tensor.__cuda_array_interface__.__get__))
_SET_DATA = _setter("data")
#: Writes whose name does not end in a single underscore.
_OPERATORS = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor setitem".split()  # noqa: SIM905
_WRITES = frozenset(f"__{name}__" for name in _OPERATORS)

USE_INPLACE = "use restore='inplace', which perturbs the parameters themselves"


class HiddenParameters(RuntimeError):
    """The closure reads parameters where the exact probe cannot perturb them; they have not changed."""


def _members(value: Any) -> Iterable[Any] | None:
    if isinstance(value, (list, tuple)):
        return value
    return value.values() if isinstance(value, dict) else None


def _find(values: Iterable[Any], wanted: dict[int, Any], found: dict[int, Any]) -> None:
    """Puts the entries of ``wanted`` (by id) into ``found`` that occur in ``values``, or in containers."""
    for value in values:
        if (entry := wanted.get(id(value))) is not None:
            found[id(value)] = entry
        elif (inner := _members(value)) is not None:
            _find(inner, wanted, found)


def _swap(value: Any, copies: dict[int, Tensor]) -> Any:
    """``value`` with a copy in the place of each parameter.  Containers without one are left as they are."""
    if (copy := copies.get(id(value))) is not None:
        return copy
    if isinstance(value, dict):
        swapped = {k: _swap(v, copies) for k, v in value.items()}
        return swapped if any(swapped[k] is not value[k] for k in value) else value
    if isinstance(value, (list, tuple)):
        items = [_swap(v, copies) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _storage(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage, for comparison only; None for tensors that have none."""
    try:
        identity: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
    return identity


class Substitution(TorchFunctionMode):
    """While active, every torch function sees the point theta + sum_k c_k z_k in place of a parameter theta.

    One combine per bucket writes the copies for a call into scratch.  The next call uses it again, so the
    extra memory is that of the call with the most weights.  torch turns the mode off inside
    ``__torch_function__``, so a function written in Python, such as ``F.multi_head_attention_forward``, gets
    copies once and runs on them.
    """

    def __init__(self, op: str, buckets: list[Bucket], seeds: Seeds, pool: ScratchPool, points: list[Point]) -> None:
        super().__init__()
        self.op, self.pool = op, pool
        self.entries = {id(p): (p, s, b) for b in buckets for p, s in zip(b.params, b.streams, strict=True)}
        self.seen: set[int] = set()
        self._terms = {id(b): terms(point, seeds[b.device]) for b, point in zip(buckets, points, strict=True)}
        self._held: list[Tensor] = []
        self._views: dict[int, StorageWeakRef] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            name = getattr(func, "__name__", func)
            raise HiddenParameters(
                f"{self.op}: closure: expected plain torch functions, got the higher-order operator {name!r}, whose "
                f"inner functions can hold parameters; {USE_INPLACE}"
            )
        found: dict[int, tuple[Any, ...]] = {}
        _find(args, self.entries, found)
        if kwargs:
            _find(kwargs.values(), self.entries, found)
        if not found:
            if self._views:
                self._check_view_write(func, args, kwargs)
            return func(*args, **kwargs)
        if func in _METADATA:
            return func(*args, **kwargs)
        if func == _SET_DATA and id(args[0]) in found:  # method wrappers are made anew at each look-up
            self._refuse_write(func)
        copies, arenas = self._perturb(found)
        versions = [a._version for a in arenas]
        out = func(*_swap(args, copies), **_swap(kwargs, copies))
        if [a._version for a in arenas] != versions:
            self._refuse_write(func)
        self.seen.update(found)
        if func in _ADDRESS:
            self._held.extend(arenas)
        self._note_views(out, arenas)
        return out

    def _perturb(self, found: dict[int, tuple[Any, ...]]) -> tuple[dict[int, Tensor], list[Tensor]]:
        """The copies, by id of the parameter, and one tensor of each arena that they lie in."""
        by_bucket: dict[int, list[Any]] = {}
        for param, stream, bucket in found.values():
            by_bucket.setdefault(id(bucket), []).append((param, stream, bucket))
        copies: dict[int, Tensor] = {}
        arenas = []
        for members in by_bucket.values():
            params, streams, (bucket, *_) = zip(*members, strict=True)
            made, arena = self._copy(bucket, params, streams)
            copies.update(zip(map(id, params), made, strict=True))
            arenas.append(arena)
        return copies, arenas

    def _copy(self, bucket: Bucket, params: tuple[Tensor], streams: tuple[int]) -> tuple[list[Tensor], Tensor]:
        """Copies of some parameters of a bucket, and one tensor of the arena that they lie in."""
        out = self.pool.like(params)
        bucket.noise.perturb(out, Members(params, streams, bucket.dist), *self._terms[id(bucket)])
        # They require grad where the parameters do, because matmul picks its kernel by that.
        return [c.detach().requires_grad_(p.requires_grad) for c, p in zip(out, params, strict=True)], out[0]

    def _note_views(self, out: Any, arenas: list[Tensor]) -> None:
        """Remembers scratch that ``out`` still refers to: writing to that would be writing to a weight."""
        if isinstance(out, Tensor):
            for arena in arenas:
                storage = arena.untyped_storage()
                if _storage(out) == storage._cdata:
                    self._views[storage._cdata] = StorageWeakRef(storage)
        elif isinstance(out, (list, tuple)):
            for item in out:
                self._note_views(item, arenas)

    def _check_view_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = getattr(func, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or name in _WRITES:
            target = args[0] if args else None
        else:
            target = kwargs.get("out")
        if isinstance(target, Tensor) and _storage(target) in self._views:
            self._refuse_write(func)

    def _refuse_write(self, func: Any) -> None:
        raise RuntimeError(
            f"{self.op}: closure: expected a forward that does not write to its parameters, got "
            f"{resolve_name(func) or func}, whose effect would be lost with the perturbed copy; do it outside step()"
        )


class Tangents(Substitution):
    """Every torch function sees a dual tensor in place of each parameter.

    It is a copy of theta, with the point's sum_k c_k z_k as its tangent; both are scratch of the one call.
    The tangent has the parameter's dtype, to which z, which is fp32, is rounded to nearest.
    """

    def _copy(self, bucket: Bucket, params: tuple[Tensor], streams: tuple[int]) -> tuple[list[Tensor], Tensor]:
        (seeds, coeffs), members = self._terms[id(bucket)], Members(params, streams, bucket.dist)
        scratch, count = self.pool.like((*params, *params)), len(params)
        out, tangents = scratch[:count], scratch[count:]
        bucket.noise.perturb(out, members, seeds[:0], coeffs[:0])
        bucket.noise.perturb(tangents, members, seeds, coeffs, decay=0.0)
        return [forward_ad.make_dual(copy, t) for copy, t in zip(out, tangents, strict=True)], out[0]
