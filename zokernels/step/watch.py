"""What goes wrong without an error: told once each, with the way out."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .directions.scaling import TensorScale
from .estimators import ForwardMode
from .groups import label_of
from .roles import OptimizerView, home_of
from .shard import is_sharded

HALF = (torch.bfloat16, torch.float16)
#: A warning comes after so many steps in a row whose losses do not differ.
_ZEROS = 5
#: How many steps of a process are looked at for random numbers of the closure.
_LOOKS = 4
#: The eps from which on fp32 weights of any usual size move.
_FINE = 1e-5
#: Elements of a tensor of which the moved share is computed.
_SAMPLE = 1024


def tell(op: str, warned: set[str], key: str, message: str) -> None:
    """Warns once for each ``key`` of ``warned``, at the line of the user's that led here."""
    if key in warned:
        return
    warned.add(key)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{op}: {message}", stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.split(".")[0] in (__name__.split(".")[0], "torch", "contextlib")


class Watch:
    """Looks at the first steps of a process, and at every g that the host knows.

    It reads nothing from a device: what lies there is looked at when the user asks for the skipped steps or
    a ``state_dict``, which wait for the device anyway.
    """

    def __init__(self, op: str, warned: set[str]) -> None:
        self.op, self.warned = op, warned
        self.looks = 0
        self._last: deque[list[Tensor]] = deque(maxlen=_ZEROS)
        self._zeros = 0
        self._begin: Tensor | None = None
        self._drew, self._forwards = False, 0

    def tell(self, key: str, message: str) -> None:
        tell(self.op, self.warned, key, message)

    # Losses ---------------------------------------------------------------------------------------------

    def result(self, value: object) -> None:
        """Looks at what one forward returned, and warns of a loss in half precision."""
        if isinstance(value, Tensor) and value.dtype in HALF:
            name = _plain(value.dtype)
            steps = torch.finfo(value.dtype).eps
            self.tell(
                "half loss",
                f"the loss is in {name}, whose numbers lie {steps:.2g} of their size apart: more than the "
                "losses of a step usually differ. Compute it in fp32 (F.cross_entropy(logits.float(), y), or "
                "autocast with fp32 weights)",
            )

    def gradients(self, raw: Iterable[Tensor]) -> None:
        """The g of one step, before any choice of a rule."""
        if "zero g" in self.warned:
            return
        values = list(raw)
        if not values:
            return
        if not all([g.is_cpu for g in values]):
            self._last.append(values)
            return
        self._zeros = self._zeros + 1 if all(map(_is_zero, values)) else 0
        if self._zeros == _ZEROS:
            self._tell_zero()

    def read(self) -> None:
        """Where the device is waited for anyway: the last g that lie there."""
        if len(self._last) == _ZEROS and all(_is_zero(g) for values in self._last for g in values):
            self._tell_zero()
        self._last.clear()

    def _tell_zero(self) -> None:
        self.tell(
            "zero g",
            f"g was exactly 0 in {_ZEROS} steps in a row: the losses of a step do not differ, and no weight "
            "moves. The loss is perhaps in half precision, eps is too small, or the loss does not depend on "
            "these parameters; optimizer.diagnose(closure) measures which",
        )

    # Random numbers -------------------------------------------------------------------------------------

    def begin(self, before: Tensor) -> None:
        """``before``: torch's RNG state on the CPU when the step begins."""
        if self._begin is not None and self._drew and torch.equal(before, self._begin):
            self._tell_same()
        self._begin, self._forwards = before, 0

    def end(self) -> None:
        assert self._begin is not None  # begin's
        self.looks += 1
        # All forwards begin with one state, so the last one's end tells whether each of them draws, and not
        # only the first one of a process.
        now, drew_before = torch.get_rng_state(), self._drew
        self._drew = not torch.equal(now, self._begin)
        if drew_before and not self._drew and self._forwards > 1:
            self._tell_same()  # the closure seeds: it ends where the last step's did

    def _tell_same(self) -> None:
        self.tell(
            "same numbers",
            "two steps drew the same of torch's random numbers: what the closure draws (a batch, dropout) "
            "repeats in every step. Call torch.manual_seed once, before the training, and not in the closure",
        )

    def forward(self, run: Callable[[], Any]) -> Any:
        """The result of one forward of the first steps."""
        self._forwards += 1
        before = _other_states()
        result = run()
        if _differ(before, _other_states()):
            self.tell(
                "other numbers",
                "the closure draws from Python's or NumPy's random numbers, which are not set back between "
                "the forwards of a step as torch's are: if it samples its data, the losses of a step are of "
                "different data, and their differences noise. Draw the batch before the step",
            )
        return result

    @property
    def is_looking(self) -> bool:
        return self.looks < _LOOKS


def _is_zero(g: Tensor) -> bool:
    values = g.tolist() if g.dim() == 1 else g.reshape(-1).tolist()
    return not any(values)


def _other_states() -> list[Any]:
    numpy = sys.modules.get("numpy.random")
    return [random.getstate(), *([numpy.get_state()] if numpy is not None else [])]


def _differ(before: list[Any], after: list[Any]) -> bool:
    """NumPy's states have an array, of which the words and the position count."""
    plain = lambda state: [w.tobytes() if hasattr(w, "tobytes") else w for w in state]
    return any(plain(a) != plain(b) for a, b in zip(before, after, strict=False))


def moved_share(values: Tensor, eps: float, dist: str) -> Tensor:
    """For each weight the probability that round(w + eps z) differs from w; fp32, of the shape of ``values``.

    w has two neighbours, ``up`` above and ``down`` below its absolute value, and rounding to nearest leaves
    it unless eps z reaches half of the way to one of them.
    """
    info = torch.finfo(values.dtype)
    size = values.detach().float().abs()
    mantissa, exponent = torch.frexp(size)
    up = torch.ldexp(torch.full_like(size, info.eps), exponent - 1)
    # around 0, whose exponent is that of 1 to frexp, numbers lie as near as they do anywhere
    up = torch.where(size > 0, up, 0).clamp(min=info.smallest_normal * info.eps)
    down = torch.where(mantissa == 0.5, up / 2, up)
    if dist == "rademacher":
        return ((eps > up / 2).float() + (eps > down / 2).float()) / 2
    tail = lambda way: torch.erfc(way / (2 * eps * math.sqrt(2))) / 2
    return tail(up) + tail(down)


def moved_shares(params: Iterable[Tensor], eps: float, dist: str) -> list[float]:
    """The share of each tensor's weights that a perturbation of size eps moves, from a sample of them."""
    samples = [p.detach().reshape(-1)[:: max(1, p.numel() // _SAMPLE)] for p in params]
    if not samples:
        return []
    shares = moved_share(torch.cat(samples), eps, dist).split([len(s) for s in samples])
    return [float(value) for value in torch.stack([s.mean() for s in shares]).tolist()]


def warn_of_resolution(optimizer: OptimizerView, warned: set[str]) -> None:
    """Where eps is below half of the distance between neighbouring weights, most of them never move.

    Told of tensors less than half of whose weights move, if they have a hundredth of all trained weights.
    """
    if isinstance(optimizer.direction, TensorScale) or isinstance(optimizer.estimator, ForwardMode):
        return  # a scale of its own for each tensor; no perturbation
    total, stuck, names = 0, 0, []
    least, dtype, eps = 1.0, torch.float32, 0.0
    for group in optimizer.param_groups:
        for kind in (*HALF, torch.float32):
            found = [(i, p) for i, p in enumerate(group["params"]) if _is_sampled(p, kind)]
            total += sum(p.numel() for _, p in found)
            if kind is torch.float32 and group["eps"] >= _FINE:
                continue  # only far larger weights than any network's would stand still
            shares = moved_shares([p for _, p in found], group["eps"], group["dist"])
            for (i, _), share in zip(found, shares, strict=True):
                if share < 0.5:
                    stuck += group["params"][i].numel()
                    names.append(label_of(group, i))
                    if share <= least:
                        least, dtype, eps = share, kind, group["eps"]
    if total and stuck >= total / 100:
        text = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        wider = "" if dtype is torch.float32 else "keep them in fp32, "
        message = (
            f"eps={eps:g} is below the distance of {_plain(dtype)} numbers at the weights of {text}: "
            f"a perturbation moves as few as {100 * least:.2g} % of the weights of a tensor, and the rest "
            "stand still. Take a larger eps (of all, or of a group of these tensors), "
            f"{wider}or leave them out by requires_grad_(False)"
        )
        tell(optimizer.op, warned, "resolution", message)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_sampled(param: Tensor, dtype: torch.dtype) -> bool:
    plain = param.device.type in ("cpu", "cuda") and not is_sharded(param) and home_of(param).in_memory
    return plain and param.requires_grad and param.dtype is dtype and param.numel() > 0
