"""TorchScript modules, whose functions take parameters where nothing can replace them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .guard import running
from .substitute import USE_INPLACE, HiddenParameters

#: What the running steps refuse: the optimizer's name, and the parameters by id.
_refused: list[tuple[str, dict[int, Tensor]]] = []
_lock = Lock()


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of any TorchScript module while a step runs, in whichever thread."""
    if get_ident() in running:
        with torch._C.DisableTorchFunction():
            held = {p.data_ptr() for p in module.parameters()}
            for op, params in _refused:
                if any(p.data_ptr() in held for p in params.values()):
                    raise HiddenParameters(
                        f"{op}: closure: expected modules whose functions take the parameters, got the TorchScript "
                        f"module {module.original_name!r}; {USE_INPLACE}"
                    )
    return nn.Module.__call__(module, *args, **kwargs)


@contextmanager
def scripts_refused(op: str, params: dict[int, Tensor]) -> Iterator[None]:
    """Inside, a forward that calls a TorchScript module which holds one of ``params`` fails.

    The class of such modules has a ``__call__`` of its own meanwhile.  A hook of all modules would cost each
    of them more than the step does.
    """
    entry = (op, params)
    try:
        with _lock:
            _refused.append(entry)
            torch.jit.ScriptModule.__call__ = _call  # type: ignore[method-assign]
        yield
    finally:
        with _lock:
            _refused[:] = [other for other in _refused if other is not entry]
            if not _refused and "__call__" in vars(torch.jit.ScriptModule):
                del torch.jit.ScriptModule.__call__
