"""What takes parameters where no torch function is seen, and what depends on whether one is."""

from __future__ import annotations

import sys
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import fail
from ..guards import uninterrupted
from .functions import USE_INPLACE, HiddenParameters
from .guard import Guard, guard, held, release, running, watch_data

#: The names of the optimizers whose steps hold parameters, by id of their entry in :data:`held`.
_names: dict[int, str] = {}
#: Whether attention may take its fused path outside of steps; one value, while a step runs.
_fused: list[bool] = []
_TRANSFORMS = "torch._functorch.eager_transforms"
_lock = Lock()


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of any TorchScript module while a step runs, in whichever thread."""
    if get_ident() in running:
        with torch._C.DisableTorchFunction():
            addresses = {p.data_ptr() for p in module.parameters()}
            for params in tuple(held):
                if any(p.data_ptr() in addresses for p in params.values()):
                    raise HiddenParameters(
                        f"{_names[id(params)]}: closure: expected modules whose functions take the "
                        "parameters, got the TorchScript "
                        f"module {module.original_name!r}; {USE_INPLACE}"
                    )
    return nn.Module.__call__(module, *args, **kwargs)


def _wrap(tensor: Any, level: int) -> Any:
    """torch.func's wrapper of a tensor that it differentiates by: it holds a parameter as it is now."""
    if isinstance(tensor, Guard) and (forward := running.get(get_ident())) is not None:
        forward.uncover(tensor)  # type: ignore[arg-type]
    return torch._C._functorch._wrap_for_grad(tensor, level)


class guarded:
    """Inside, ``params`` (by id) are guarded, for one step, and a forward that calls a TorchScript module
    which holds one of them fails.

    A transform of torch.func finds parameters open.  Attention does not take its fused path: it would where
    parameters are open, and not where they are guarded, and with a padding mask the values are others, too.
    For this, two functions of torch and one setting are others meanwhile: hooks of all modules would cost
    each of them more than the step does.

    Args:
        at_once: False where the caller guards them, and releases what it has guarded.

    Raises: RuntimeError where another step, in whose closure or beside which this one runs, has one of them.
    """

    __slots__ = ("at_once", "op", "params")

    def __init__(self, op: str, params: dict[int, Tensor], at_once: bool = True) -> None:
        self.op, self.params, self.at_once = op, params, at_once

    def __enter__(self) -> guarded:
        params = self.params
        watch_data()
        with _lock:
            # of a step of the same optimizer that was left without its end, by an exception of another thread
            _leave(params)
            if not held:
                running.clear()
            if not all(map(params.keys().isdisjoint, held)):
                got = "one inside the closure of another step, or in another thread, with the same parameters"
                fail(self.op, "step", "one step at a time for a parameter", got, RuntimeError)
            held.append(params)
            _names[id(params)] = self.op
            if not _fused:
                _change()
        try:
            if self.at_once:
                guard(params.values())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """May be called again, where an exception of another thread has cut it short."""
        if self.at_once:
            with uninterrupted():
                release(self.params.values())
        leave(self.params)


def leave(params: dict[int, Tensor]) -> None:
    """Ends what :class:`guarded` has begun for all threads, if it has not ended."""
    with _lock:
        _leave(params)


def _leave(params: dict[int, Tensor]) -> None:
    held[:] = [other for other in held if other is not params]
    _names.pop(id(params), None)
    if _fused and not held:
        _change_back()


def _change() -> None:
    _fused.append(torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    torch.jit.ScriptModule.__call__ = _call  # type: ignore[method-assign]
    if (transforms := sys.modules.get(_TRANSFORMS)) is not None:
        transforms._wrap_for_grad = _wrap  # type: ignore[attr-defined]


def _change_back() -> None:
    if "__call__" in vars(torch.jit.ScriptModule):
        del torch.jit.ScriptModule.__call__
    if (transforms := sys.modules.get(_TRANSFORMS)) is not None:
        transforms._wrap_for_grad = torch._C._functorch._wrap_for_grad  # type: ignore[attr-defined]
    while _fused:
        torch.backends.mha.set_fastpath_enabled(_fused[-1])
        del _fused[-1]
