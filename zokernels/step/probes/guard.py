"""Guarded parameters: parameters whose class tells the running forward of every torch function that takes
them.

While the forwards of an exact step run, each of its parameters has a class that differs from its own in
``__torch_function__`` alone.  torch calls that for functions with such an argument, and for no others, so the
rest of a forward costs nothing.  The object, its memory and its metadata stay what they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

#: Types whose members may be parameters.
CONTAINERS = (list, tuple, dict)


class Listener(Protocol):
    """What is told of the functions that take guarded parameters, in one thread."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of ``func`` for arguments some of which are guarded parameters."""

    def uncover(self, param: Tensor) -> None:
        """Called before something takes a parameter as it is."""

    def enter_compiled(self, params: dict[int, Tensor]) -> Callable[[], object]:
        """Called before a compiled function that may take ``params`` (by id); what is returned, after it."""


#: By thread: the forward that runs in it.
running: dict[int, Listener] = {}


def plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``func`` on the parameters themselves."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class Guard:
    """The part of a guarded parameter's class that its own class does not have."""

    __slots__ = ()
    #: The class of the parameter when it is not guarded.
    kind: ClassVar[type[Tensor]]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        forward = running.get(get_ident())
        if forward is None:  # a thread that is none of the closure's
            return plainly(func, args, kwargs or {})
        return forward.call(func, args, kwargs or {})

    # torch.compile breaks a graph at a function that takes a guarded parameter, and does not trace the guard.
    __torch_function__.__func__._torchdynamo_disable = True  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of what the forward sees; it is an ordinary parameter."""
        result = super().__deepcopy__(memo)  # type: ignore[misc]
        release([result])
        return result


#: The class of guarded parameters of a class.
_guarded: dict[type, type[Tensor]] = {}


def guarded_kind(kind: type) -> type[Tensor]:
    if kind not in _guarded:
        names = {
            "kind": kind,
            "__slots__": (),
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
        }
        _guarded[kind] = types.new_class(
            kind.__name__, (Guard, kind), exec_body=lambda body: body.update(names)
        )
    return _guarded[kind]


def own_kind(param: Any) -> type[Tensor]:
    """The class of a parameter, guarded or not, when it is not guarded."""
    kind = type(param)
    return kind.kind if issubclass(kind, Guard) else kind


def guard(params: Iterable[Any]) -> None:
    """Guards parameters."""
    for p in params:
        kind = type(p)
        if not issubclass(kind, Guard):
            p.__class__ = guarded_kind(kind)


def release(params: Iterable[Any]) -> None:
    """Gives guarded parameters their own class back."""
    for p in params:
        kind = type(p)
        if issubclass(kind, Guard):
            p.__class__ = kind.kind


#: The parameters, by id, of all steps whose forwards run now.
held: list[dict[int, Any]] = []

_get_data: Callable[[Any], Tensor] = Tensor.data.__get__  # type: ignore[attr-defined]
#: ``param.data = value``, past :class:`_Data`.
set_data: Callable[[Any, Tensor], None] = Tensor.data.__set__  # type: ignore[attr-defined]


class _Data:
    """``data`` of ``nn.Parameter``.

    torch's own gives a tensor that counts its versions by itself, so that a write to it is seen by nobody.
    While a step's forwards run, and a parameter has the memory of its copy, such a write would be lost with
    the copy.  So that it is noticed, ``data`` then is a tensor that counts together with the parameter.
    """

    def __get__(self, param: Any, owner: type) -> Any:
        if param is None:
            return Tensor.data
        if held and is_held(param) and not isinstance(param, Guard):
            return Tensor.detach(param)
        return _get_data(param)

    def __set__(self, param: Any, value: Tensor) -> None:
        set_data(param, value)


def watch_data() -> None:
    """Puts :class:`_Data` into ``nn.Parameter``, where it stays.

    A class that changed in each step would lose the caches that Python keeps of its attributes.
    """
    if "data" not in vars(nn.Parameter):
        nn.Parameter.data = _Data()  # type: ignore[assignment]


def is_held(param: Any) -> bool:
    """Whether a running step guards ``param``.  A copy that was made of its class is nobody's."""
    return any(id(param) in entries for entries in held)
