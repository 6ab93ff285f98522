"""What a closure may return, and how a step reads it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import accepts, fail
from ..transfer import has_values, to_device
from .shard import is_sharded

#: What torch says of ``loss.backward()`` where no gradients are recorded.
NO_GRAD = "does not require grad and does not have a grad_fn"
#: What a closure is that no batched step has.
WITHOUT_ARGUMENTS = "a function that takes nothing (of a Cohort: step(closure, batched=True))"


def call(op: str, closure: Callable[..., Any], args: Sequence[Any], expected: str) -> Any:
    """Calls the closure, and gives its result.

    Raises TypeError with what was ``expected`` where the closure does not take so many arguments.
    """
    try:
        return closure(*args)
    except TypeError as error:
        # A call that Python itself refuses has no line of the closure in its traceback.
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if inside or accepts(closure, args):
            raise
        fail(op, "closure", expected, f"one that does not: {error}", TypeError)


def run_closure(op: str, closure: Callable[[], Any]) -> Any:
    """The closure's result.  Some errors of it are told as what they mean in a step."""
    try:
        return call(op, closure, (), WITHOUT_ARGUMENTS)
    except StopIteration:
        expected = "a forward on the step's batch, which is drawn before the step: it runs several times"
        got = "StopIteration: an iterator that it draws from is at its end"
        fail(op, "closure", expected, got, RuntimeError)
    except RuntimeError as error:
        if NO_GRAD not in str(error):
            raise
        expected = "a forward that returns the loss, without loss.backward(): there are no gradients"
        fail(op, "closure", expected, f"{type(error).__name__}: {error}", RuntimeError)


def type_of(value: object) -> str:
    """What a message says of a value that may be a whole batch: a short text, or its type."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def as_loss(op: str, value: object, device: torch.device, capturing: bool = False) -> Tensor:
    """The closure's result as a 0-dim tensor: float64 where it was float64 or a Python number, else fp32.

    It is always a copy, because a closure may return one buffer twice.
    """
    if capturing and not (isinstance(value, Tensor) and value.device.type == "cuda"):
        got = f"a tensor on {value.device}" if isinstance(value, Tensor) else repr(value)
        fail(op, "closure", "a loss on the GPU where a CUDA graph is captured", got)
    if isinstance(value, Tensor):
        if type(value) is not Tensor and is_sharded(value):
            value = value.full_tensor()
        if value.layout is not torch.strided:
            fail(op, "closure", "a dense tensor with a value", f"one in the layout {value.layout}")
        if not (value.is_cpu or has_values(value)):
            fail(op, "closure", "a dense tensor with a value", "one on meta, which has none")
        if value.numel() != 1 or value.is_complex():
            each = value.dim() == 1 and not value.is_complex()  # as the closure of a population has it
            way = " (losses of several members: step(closure, batched=True))" if each else ""
            fail(op, "closure", f"a real scalar loss{way}", f"{value.dtype} of shape {tuple(value.shape)}")
        narrow = value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        dtype = torch.float32 if narrow else torch.float64
        value = value.detach()
        if value.dim():
            value = value.reshape(())
        return value.clone() if value.dtype is dtype else value.to(dtype)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # an array of numpy without dimensions
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(op, "closure", "a scalar loss (a tensor or a number)", _no_loss(value), TypeError)
    try:
        number = float(value)
    except OverflowError:
        bits = operator.index(math.trunc(value)).bit_length()
        fail(op, "closure", "a loss in the range of float64", f"a number of {bits} bits")
    return torch.full((), number, dtype=torch.float64, device=device)


def _no_loss(value: object) -> str:
    """What a closure has returned, and which part of it is perhaps the loss."""
    if value is None:
        return "None: does it end with `return loss`?"
    loss = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", None)
    if isinstance(loss, Tensor):
        part = '["loss"]' if type(value) is dict else ".loss"
        return f"a {type(value).__name__}: return its {part}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: return the loss alone"
    return type_of(value)


class LossReader:
    """Reads what the closure returns: here each result is a scalar loss."""

    def read(self, op: str, result: Any, device: torch.device, capturing: bool) -> Any:
        """What is kept of one result.  It is read at once, before the next forward."""
        return as_loss(op, result, device, capturing)

    def losses(self, results: list[Any]) -> Tensor:
        """One value for each of the estimator's points, [n], from all that was kept."""
        device = results[0].device
        return torch.stack([loss if loss.device == device else loss.to(device) for loss in results])


class DerivativeReader(LossReader):
    """Each result is a dual tensor, read as [2]: the loss and its derivative along the direction."""

    def read(self, op: str, result: Any, device: torch.device, capturing: bool) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(result) if isinstance(result, Tensor) else (result, None)
        if tangent is None:
            is_tensor = isinstance(result, Tensor)
            got = f"a tensor of shape {tuple(result.shape)} without one" if is_tensor else _no_loss(result)
            fail(op, "closure", "a loss with a forward-mode derivative along the parameters", got, TypeError)
        return torch.stack([as_loss(op, value, device, capturing) for value in (primal, tangent)])


class RankReader(LossReader):
    """Results are any objects, which ``rank`` puts in order.

    The losses are their places, 0 for the :attr:`best`.

    ``rank`` takes the list of results and returns indices into it, best first, at least ``top`` of them.
    """

    def __init__(self, rank: Callable[[list[Any]], Iterable[int]], top: int) -> None:
        self.rank, self.top = rank, top

    def read(self, op: str, result: Any, device: torch.device, capturing: bool) -> Any:
        self.op, self.device = op, device
        return result

    def losses(self, results: list[Any]) -> Tensor:
        order, count = [operator.index(i) for i in self.rank(results)], len(results)
        if len(order) < self.top or len(set(order)) < len(order) or not set(order) <= set(range(count)):
            fail(self.op, "rank", f"{self.top} or more different indices in [0, {count}), best first", order)
        places = [count] * count
        for place, index in enumerate(order):
            places[index] = place
        self.best = results[order[0]]
        return to_device(torch.tensor(places, dtype=torch.float64), self.device)
