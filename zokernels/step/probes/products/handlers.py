"""The functions that need no perturbed copy of a parameter: products, indices, norms, and what works element
by element.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....functional import low_rank, low_rank_
from ..guard import Guard
from .forward import NotInOneForward, Products, Transposed, Varied, handles, name_of


@handles(Tensor.__getitem__)
def _entry(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One entry of the first dimension, as a forward takes experts that lie in one tensor: a perturbed copy
    of that entry, and of no other.

    The factors are those of the [E, m n] matrix of all entries.  So what an entry gets is a row of that,
    which is no [m, n] matrix of low rank: it has no form as a product of factors.
    """
    param, at = args
    if isinstance(at, Tensor) and at.dim() == 0 and at.dtype in (torch.int32, torch.int64):
        at = int(at)
    if not forward.is_one or type(at) is not int or not forward.has_factors(param, flat=True):
        return NotImplemented
    if not -param.shape[0] <= at < param.shape[0] or param.numel() == 0:
        return NotImplemented  # torch says what is wrong
    forward.say(
        "entry",
        f"entries of {forward.named(param)} are taken by their numbers: each gets a perturbed copy (the "
        "dense form)",
    )
    bucket, stream = forward.place(param)
    at %= param.shape[0]
    theta = param.detach()[at].reshape(1, -1)
    if not (terms := forward.terms(bucket)):
        return theta.view(param.shape[1:])
    lefts, rights = zip(*(forward.factors(param, t) for t in range(len(terms))), strict=True)
    left = torch.cat([each[:, at : at + 1] for each in lefts])
    right = rights[0] if len(rights) == 1 else torch.cat(rights)
    out = torch.empty_like(theta)
    low_rank([out], [theta], [left], [right], torch.cat([t.coeffs for t in terms]), streams=[stream])
    return out.view(param.shape[1:])


_CONVOLUTIONS = frozenset((F.conv1d, F.conv2d, F.conv3d))


def _product(forward: Products, func: Any, x: Any, weight: Any, bias: Any, swapped: bool) -> Any:
    """A product of ``x`` with ``weight``, W^T or (``swapped``) W, and a bias."""
    if isinstance(x, (Guard, Varied)) or isinstance(bias, Varied):
        return NotImplemented
    if not forward.has_factors(weight, flat=func in _CONVOLUTIONS):
        return NotImplemented
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        return NotImplemented
    if x.dtype is not weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return NotImplemented  # torch says what is wrong
    counts = forward.rows(x, forward.key(func, weight, 0))
    if counts is None:
        return NotImplemented
    own = id(bias) in forward.owners.params
    apart = own and (not forward.same_bucket(bias, weight) or not forward.noise_of(bias).is_dense(bias))
    plain = None if apart else bias
    y = forward.product(x, weight, plain, counts, swapped=swapped, noisy=own)
    if not apart:
        return y
    copies = forward.copies(bias)
    return y + copies[0] if forward.is_one else forward.by_rows(torch.add, y, copies, counts)


@handles(F.linear)
def _linear(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        args = tuple(inspect.getcallargs(_linear_arguments, *args, **kwargs).values())
    x, weight, bias = args if len(args) > 2 else (*args, None)
    out = _product(forward, func, x, weight, bias, False)
    if bias is None and forward.look is None and out is not NotImplemented:
        forward.learned.linears[id(weight), forward.is_one] = weight
    return out


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> None: ...


@handles(torch.addmm, Tensor.addmm)
def _addmm(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3:  # scaled by alpha or beta
        return NotImplemented
    bias, x, weight = args
    if bias.dim() != 1:
        return NotImplemented
    return _product(forward, func, x, weight, bias, True)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    x, weight = args
    if isinstance(weight, Transposed):
        return _product(forward, func, x, weight.param, None, False)
    return _product(forward, func, x, weight, None, True)


@handles(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transpose(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (weight,) = args
    if not forward.has_factors(weight):
        return NotImplemented
    out = weight.detach().t().as_subclass(Transposed)
    out.param = weight
    return out


@handles(*_CONVOLUTIONS)
def _convolution(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A convolution whose windows lie side by side, as those of patches and of 1 x 1: a product of each."""
    given = inspect.getcallargs(_convolution_arguments, *args, **kwargs)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if not forward.has_factors(weight, flat=True) or isinstance(x, (Guard, Varied)):
        return NotImplemented
    size = weight.shape[2:]
    each = lambda value: (value,) * len(size) if isinstance(value, int) else tuple(value)
    padding = given["padding"]
    unpadded = padding == "valid" or (not isinstance(padding, str) and not any(each(padding)))
    side_by_side = each(given["stride"]) == tuple(size) and given["groups"] == 1 and unpadded
    if not side_by_side or x.dim() != 2 + len(size) or any(d != 1 for d in each(given["dilation"])):
        return NotImplemented
    if x.shape[1] != weight.shape[1] or x.dtype is not weight.dtype:
        return NotImplemented  # torch says what is wrong, or casts
    places = [n // k for n, k in zip(x.shape[2:], size, strict=True)]
    if 0 in places:
        return NotImplemented
    for i, (n, k) in enumerate(zip(places, size, strict=True)):
        x = x.narrow(2 + i, 0, n * k)
    windows = x.reshape(*x.shape[:2], *(s for pair in zip(places, size, strict=True) for s in pair))
    count = len(size)
    order = (0, *range(2, 2 + 2 * count, 2), 1, *range(3, 3 + 2 * count, 2))
    rows = windows.permute(order).reshape(x.shape[0], *places, -1)
    out = _product(forward, func, rows, weight, bias, False)
    return out if out is NotImplemented else out.movedim(-1, 1).contiguous()


def _convolution_arguments(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> None: ...


@handles(F.embedding)
def _embedding(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = inspect.getcallargs(_embedding_arguments, *args, **kwargs)
    index, weight = given["input"], given["weight"]
    if (
        given["max_norm"] is not None
        or given["sparse"]
        or not forward.has_factors(weight)
        or index.dim() == 0
    ):
        return NotImplemented
    counts = forward.rows(index, forward.key(func, weight, 0))
    if counts is None and index.shape[0] == 1 and forward.cohort is not None and forward.cohort.counts:
        counts = forward.cohort.counts  # positions, which are the same for all rows
        index = index.expand(sum(counts), *index.shape[1:])
    if counts is None:
        return NotImplemented
    y = F.embedding(index, weight.detach(), given["padding_idx"]).contiguous()
    each = index.numel() // max(1, index.shape[0])
    sizes = [each * n for n in counts]
    flat = index.reshape(-1)
    for t, (_, coeffs, _) in enumerate(forward.terms(forward.place(weight)[0])):
        left, right = forward.factors(weight, t)
        if len(left) > 1:
            members = torch.arange(len(sizes), device=flat.device)
            begins = members * len(left) // len(sizes) * left.shape[1]
            flat_left = flat + begins.repeat_interleave(torch.tensor(sizes, device=flat.device))
        else:
            flat_left = flat
        rows = left.view(-1, left.shape[-1]).index_select(0, flat_left).split(sizes)
        pieces = y.view(-1, y.shape[-1]).split(sizes)
        picked = [p for p, n in enumerate(sizes) if n]
        low_rank_(
            [pieces[p] for p in picked],
            [rows[p][None] for p in picked],
            [right[p * len(right) // len(sizes)][None] for p in picked],
            coeffs[picked].view(-1, 1) if len(picked) < len(sizes) else coeffs.view(-1, 1),
            streams=[0] * len(picked),
        )
    return y


def _embedding_arguments(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> None: ...


@handles(F.layer_norm, F.rms_norm)
def _norm(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if forward.is_one:
        return NotImplemented
    layer = func is F.layer_norm
    given = inspect.getcallargs(_layer_norm_arguments if layer else _rms_norm_arguments, *args, **kwargs)
    x, shape, eps, scale, shift = (
        given[key] for key in ("input", "normalized_shape", "eps", "weight", "bias")
    )
    if len(shape) != 1 or any(isinstance(w, Varied) for w in (scale, shift)):
        return NotImplemented
    param = scale if id(scale) in forward.owners.params else shift
    counts = forward.rows(x, forward.key(func, param, 0))
    if counts is None:
        return NotImplemented
    # As the library does it, in fp32 up to the end.
    wide = x.float()
    if layer:
        y = F.layer_norm(wide, shape, None, None, eps)
    else:
        y = F.rms_norm(wide, shape, None, torch.finfo(x.dtype).eps if eps is None else eps)
    for function, value in ((torch.mul, scale), (torch.add, shift)):
        if value is None:
            continue
        if id(value) in forward.owners.params:
            y = forward.by_rows(function, y, forward.copies(value).float(), counts)
        else:
            y = function(y, value.float())
    return y if torch.is_autocast_enabled(x.device.type) and layer else y.to(x.dtype)


def _layer_norm_arguments(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> None: ...


def _rms_norm_arguments(
    input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None, bias: Any = None
) -> None: ...


_BINARY = "add sub mul div rsub true_divide multiply subtract maximum minimum"
_DUNDERS = "add sub mul truediv radd rsub rmul rtruediv"
_UNARY = """
    float half bfloat16 to type_as clone contiguous neg exp log abs sqrt rsqrt square sigmoid tanh relu silu
    softplus pow
"""


@handles(*_BINARY.split(), *(f"__{name}__" for name in _DUNDERS.split()))
def _elementwise(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions of two values, element by element: a parameter's own value goes with each member's rows."""
    if forward.is_one or kwargs or len(args) != 2:
        return NotImplemented
    own = [forward.owners.params.get(id(a), a if isinstance(a, Varied) else None) for a in args]
    if any(isinstance(a, Transposed) for a in args):
        return NotImplemented
    stacked = [
        _stacked(forward, func, a) if mine is not None else None for a, mine in zip(args, own, strict=True)
    ]
    plain = [a for a, mine in zip(args, own, strict=True) if mine is None]
    if not plain or not isinstance(plain[0], Tensor) or plain[0].dim() == 0:
        given = [a if s is None else s for a, s in zip(args, stacked, strict=True)]
        if not plain and args[0].shape != args[1].shape:
            return NotImplemented
        return _varied(func(*map(_plain, args)), func(*given))
    (x,), place = plain, 0 if own[0] is None else 1
    (mine,) = (o for o in own if o is not None)
    key = forward.key(func, mine if id(mine) in forward.owners.params else None, place)
    if (counts := forward.rows(x, key)) is None:
        return NotImplemented
    (values,) = (s for s in stacked if s is not None)
    return forward.by_rows(
        (lambda x, w: func(x, w)) if place == 0 else (lambda x, w: func(w, x)), x, values, counts
    )


@handles(*_UNARY.split(), "__neg__", "__pow__")
def _unary(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions of one value, element by element, the rest of whose arguments are no tensors but types."""
    first, *rest = args
    if forward.is_one or isinstance(first, Transposed):
        return NotImplemented
    if not isinstance(first, (Guard, Varied)) or any(isinstance(a, (Guard, Varied)) for a in rest):
        return NotImplemented
    return _varied(
        func(_plain(first), *rest, **kwargs), func(_stacked(forward, func, first), *rest, **kwargs)
    )


@handles(Tensor.expand)
def _expand(forward: Products, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter [1, ...] as the same rows for every member's batch, as vision models take their tokens."""
    param, *sizes = args
    sizes = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if forward.is_one or id(param) not in forward.owners.params or kwargs or param.shape[0] != 1:
        return NotImplemented
    if forward.cohort is None or forward.cohort.counts is None or len(sizes) != param.dim():
        return NotImplemented
    counts = forward.cohort.counts_of(sizes[0])
    if counts is None:
        return NotImplemented
    forward.say(
        f"dense {name_of(func)}", f"{forward.named(param)} is taken row by row: it gets perturbed copies"
    )
    member = torch.repeat_interleave(torch.tensor(counts)).to(param.device)
    out = forward.copies(param)[:, 0].index_select(0, member)
    out = out.expand(sizes[0], *sizes[1:])
    if forward.look is not None:
        forward.look.mark(out)
    return out


def _plain(value: Any) -> Any:
    own = isinstance(value, (Guard, Varied))
    return Tensor.detach(value).as_subclass(Tensor) if own else value


def _stacked(forward: Products, func: Any, value: Any) -> Tensor:
    if isinstance(value, Varied):
        return value.stacked
    if not forward.noise_of(value).is_dense(value):
        forward.say_dense(func, value)
    return forward.copies(value)


def _varied(value: Tensor, stacked: Tensor) -> Tensor:
    if stacked.shape[1:] != value.shape:
        raise NotInOneForward("a function that mixes members")
    out = value.as_subclass(Varied)
    out.stacked = stacked
    return out
