"""A hook ahead of every module's forward, for weights that a module must not see as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as modules

#: An entry of ``warnings.filters`` for what torch says of every compiled module while a global hook is there:
#: that the hook fires once more for it.  Ours may fire as often as they like.
_FILTER = (
    "ignore",
    re.compile(r"Using `torch\.compile\(module\)` when there are global hooks"),
    UserWarning,
    None,
    0,
)


class ForwardHook:
    """Calls ``before(module, inputs)`` ahead of the forward of any module, until :meth:`remove`.

    torch warns of compiled modules while such a hook is there.  The user has set none, so the warning is not
    shown, unless other global hooks were there before: then it is about those.
    """

    def __init__(self, before: Callable[[nn.Module, Any], None]) -> None:
        self._quiet = not modules._has_any_global_hook() or _FILTER in warnings.filters
        if self._quiet:
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
        self._handle = modules.register_module_forward_pre_hook(before)

    def remove(self) -> None:
        self._handle.remove()
        # The list is another one inside a `catch_warnings` that began since, and after one that has ended.
        if self._quiet and _FILTER in warnings.filters:
            warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]
