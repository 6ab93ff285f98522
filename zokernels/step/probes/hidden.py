"""What takes parameters where no torch function is seen, and what depends on whether one is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .functions import USE_INPLACE, HiddenParameters
from .guard import Guard, running

#: What the running steps refuse: the optimizer's name, and the parameters by id.
_refused: list[tuple[str, dict[int, Tensor]]] = []
#: Whether attention may take its fused path outside of steps; one value, while a step runs.
_fused: list[bool] = []
_TRANSFORMS = "torch._functorch.eager_transforms"
_lock = Lock()


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of any TorchScript module while a step runs, in whichever thread."""
    if get_ident() in running:
        with torch._C.DisableTorchFunction():
            held = {p.data_ptr() for p in module.parameters()}
            for op, params in _refused:
                if any(p.data_ptr() in held for p in params.values()):
                    raise HiddenParameters(
                        f"{op}: closure: expected modules whose functions take the parameters, got "
                        "the TorchScript "
                        f"module {module.original_name!r}; {USE_INPLACE}"
                    )
    return nn.Module.__call__(module, *args, **kwargs)


def _wrap(tensor: Any, level: int) -> Any:
    """torch.func's wrapper of a tensor that it differentiates by: it holds a parameter as it is now."""
    if isinstance(tensor, Guard) and (forward := running.get(get_ident())) is not None:
        forward.uncover(tensor)  # type: ignore[arg-type]
    return torch._C._functorch._wrap_for_grad(tensor, level)


@contextmanager
def hidden_uses(op: str, params: dict[int, Tensor]) -> Iterator[None]:
    """Inside, a forward that calls a TorchScript module which holds one of ``params`` fails.

    A transform of torch.func finds parameters open.  Attention does not take its fused path: it would where
    parameters are open, and not where they are guarded, and with a padding mask the values are others, too.

    For this, two functions of torch and one setting are others meanwhile: hooks of all modules would cost
    each of them more than the step does.
    """
    entry = (op, params)
    try:
        with _lock:
            if not _refused:
                _change()
            _refused.append(entry)
        yield
    finally:
        with _lock:
            _refused[:] = [other for other in _refused if other is not entry]
            if not _refused:
                _change_back()


def _change() -> None:
    _fused.append(torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    torch.jit.ScriptModule.__call__ = _call  # type: ignore[method-assign]
    if (transforms := sys.modules.get(_TRANSFORMS)) is not None:
        transforms._wrap_for_grad = _wrap  # type: ignore[attr-defined]


def _change_back() -> None:
    while _fused:
        torch.backends.mha.set_fastpath_enabled(_fused.pop())
    if "__call__" in vars(torch.jit.ScriptModule):
        del torch.jit.ScriptModule.__call__
    if (transforms := sys.modules.get(_TRANSFORMS)) is not None:
        transforms._wrap_for_grad = torch._C._functorch._wrap_for_grad  # type: ignore[attr-defined]
