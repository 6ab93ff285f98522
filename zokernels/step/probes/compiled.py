"""Functions of torch.compile, whose graphs take parameters by themselves: the blocks of these are open
for them.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from .guard import running

#: How far :func:`_held_by` follows references: enough for a compiled method of an object that has the model.
_DEPTH = 5


class Compiled:
    """The compiled functions that can take parameters of a step, as far as they exist."""

    def __init__(self) -> None:
        self._params: dict[int, Tensor] | None = None
        self._compiled = -1
        #: All contexts, each with the ids of the tensors that its functions refer to.
        self._found: list[tuple[Any, set[int]]] = []
        #: A context of torch.compile, with the parameters that its functions refer to, by id.
        self.regions: list[tuple[Any, dict[int, Tensor]]] = []

    def renew(self, params: dict[int, Tensor]) -> None:
        """Looks for compiled functions, if torch has compiled something since the last time.

        ``params``: by id; the same object means the same parameters.
        """
        frames = sys.modules.get("torch._dynamo.convert_frame")
        if frames is None:
            return
        if self._compiled != frames.FRAME_COUNTER:  # a search takes a tenth of a second
            if not _torch_compile_was_called():
                return
            _skip_ours()
            self._compiled, self._params = frames.FRAME_COUNTER, None
            found: dict[int, tuple[Any, set[int]]] = {}
            for context, function in _functions():
                found.setdefault(id(context), (context, set()))[1].update(_held_by(function))
            self._found = list(found.values())
        if self._params is not params:
            self._params = params
            regions = [
                (context, {i: p for i, p in params.items() if i in held}) for context, held in self._found
            ]
            self.regions = [(context, taken) for context, taken in regions if taken]

    def watched(self) -> AbstractContextManager[None]:
        """Inside, the forward of a thread is told when it enters a compiled function."""
        return self._hooked() if self.regions else nullcontext()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = [(context.enter_exit_hooks, _hook(params)) for context, params in self.regions]
        try:
            for installed, hook in hooks:
                installed.append(hook)
            yield
        finally:
            for installed, hook in hooks:
                if hook in installed:
                    installed.remove(hook)


def _hook(params: dict[int, Tensor]) -> Callable[[], Callable[[], object]]:
    def enter() -> Callable[[], object]:
        forward = running.get(get_ident())
        return (lambda: None) if forward is None else forward.enter_compiled(params)

    return enter


@functools.cache
def _skip_ours() -> None:
    """Lets torch.compile break a graph at a function that takes a guarded parameter, as it must not trace
    guards.
    """
    from torch._dynamo import trace_rules

    trace_rules.add(__package__ or "")


def _torch_compile_was_called() -> bool:
    """Whether there can be functions of torch.compile: most processes have none, and need no search.

    Before the first of them torch patches functions of its own, once in a process: the cache of that function
    is empty until then.  A torch without that function is taken to have compiled something."""
    patcher = getattr(sys.modules["torch._dynamo.eval_frame"], "TorchPatcher", None)
    cache_info = getattr(getattr(patcher, "patch", None), "cache_info", None)
    return cache_info is None or cache_info().currsize > 0


#: All functions of torch.compile that have been found, and how many objects were frozen then.
_known: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
_frozen = 0


def _functions() -> Iterator[tuple[Any, Any]]:
    """All functions that torch.compile has made, each with its context, and what it is made of as second."""
    source = sys.modules["torch._dynamo.eval_frame"].__file__
    _known.update(
        [o for o in _objects() if type(o) is types.FunctionType and o.__code__.co_filename == source]
    )
    for wrapper in list(_known):
        made_of = getattr(wrapper, "_torchdynamo_orig_callable", None)
        names = wrapper.__code__.co_freevars
        if made_of is not None and "self" in names and wrapper.__closure__:
            context = wrapper.__closure__[names.index("self")].cell_contents
            if getattr(context, "enter_exit_hooks", None) is not None and callable(context.callback):
                yield context, made_of


def _objects() -> list[Any]:
    """What Python's garbage collector knows of, and what ``gc.freeze()`` has hidden from it since the last
    call, as engines do when they are ready.

    Python lists frozen objects for nobody, so they are let go for a moment, and frozen again together with
    what is there now.
    """
    global _frozen
    if gc.get_freeze_count() <= _frozen:
        _frozen = gc.get_freeze_count()
        return gc.get_objects()
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        gc.freeze()
        _frozen = gc.get_freeze_count()


def _held_by(value: Any) -> set[int]:
    """The ids of all tensors that a function refers to: by its object, closure, defaults and globals."""
    found: set[int] = set()
    seen: set[int] = set()
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        following: list[Any] = []
        for one in level:
            if id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, Tensor):
                found.add(id(one))
            elif isinstance(one, nn.Module):
                found.update(map(id, one.parameters()))
            else:
                following += _references(one)
        level = following
    return found


def _references(value: Any) -> Iterable[Any]:
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
        names = [value.__globals__[n] for n in value.__code__.co_names if n in value.__globals__]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [x for x in (*cells, *names, *defaults) if not isinstance(x, types.ModuleType)]
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, dict):
        return value.values()
    return () if isinstance(value, type) else getattr(value, "__dict__", {}).values()


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def freezes() -> bool:
    """Whether inductor makes constants of parameters."""
    return bool(getattr(sys.modules.get("torch._inductor.config"), "freezing", False))
