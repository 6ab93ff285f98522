"""Which backend runs an operation: loading, selection, and the report of what is built and present.

A backend is a folder with a ``load()`` that returns a :class:`Backend` or raises :class:`BackendUnavailable`.
Nothing is imported, loaded or probed before an operation, or the report, needs it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch

from .journal import in_python

#: The backends that can serve a type of device, best first: the first that is usable here is chosen.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

NAMES = ("reference", "cpu", "triton", "cuda")


class BackendUnavailable(RuntimeError):
    """A backend that cannot be used here; the message says why and what mends it."""


#: What a backend does for an operation.  Its arguments have been checked, and ``out`` may be the same list as
#: ``params``.  It computes what the function of the same name in ``reference`` computes, to the bit.
Kernel = Callable[..., Any]
_AnyKernel = TypeVar("_AnyKernel", bound=Kernel)

#: For the package of each backend, the kernels that :func:`implements` has marked in its modules, by name.
_MARKED: dict[str, dict[str, Kernel]] = defaultdict(dict)


def implements(function: _AnyKernel) -> _AnyKernel:
    """Decorator: the function is its backend's kernel of that name."""
    _MARKED[function.__module__.rpartition(".")[0]][function.__name__] = function
    return function


def kernels_of(package: str) -> dict[str, Kernel]:
    """The kernels of a backend, by name.

    This imports all modules of the backend, and with them Triton for example, so only ``load()`` calls it.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    return _MARKED[package]


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend: ``select(device).combine(out, params, terms)``."""

    name: str
    devices: frozenset[str]
    #: Looks a kernel up by its name; gives None where the backend has none.
    find: Callable[[str], Kernel | None]
    #: Devices of the types above that it cannot run on all the same.  The reason completes the sentence
    #: "backend 'cuda' ...".
    refused: Mapping[torch.device, str] = field(default_factory=dict)
    #: True if every kernel is one call of a compiled function (``journal`` says why this matters).
    compiled: bool = False
    #: A remark for the report of ``zokernels info``; empty where there is nothing to say.
    note: str = ""

    def __getattr__(self, name: str) -> Kernel:
        """The kernel ``name``.

        Python calls this for the first access only: the kernel is then stored in the instance, so that later
        accesses cost a look into a dictionary.
        """
        kernel = None if name.startswith("_") else self.find(name)
        if kernel is None:
            raise AttributeError(f"backend {self.name!r} has no kernel {name!r}", name=name, obj=self)
        kernel = kernel if self.compiled else in_python(kernel)
        object.__setattr__(self, name, kernel)
        return kernel


#: The dictionary behind ``os.environ``, whose keys are encoded.  ``os.environ.get`` takes four calls of
#: Python functions, and every call of an operation asks; a look into the dictionary takes none.
_environment: Mapping[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_BACKEND = os.environ.encodekey("ZOKERNELS_BACKEND")

_forced: ContextVar[str | None] = ContextVar("zokernels_backend", default=None)


#: What has been loaded, and what cannot be, by name.
LOADED: dict[str, Backend | BackendUnavailable] = {}


def _load(name: str) -> Backend | BackendUnavailable:
    """Called for a name that is not in ``LOADED`` yet."""
    module = importlib.import_module(f".{name}", __package__)
    try:
        LOADED[name] = module.load()
    except BackendUnavailable as error:
        LOADED[name] = error
    return LOADED[name]


def _unknown(name: str, where: str) -> NoReturn:
    raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")


def get(name: str) -> Backend:
    """The backend ``name``.

    Raises :class:`BackendUnavailable` where it cannot be used, with the reason and the command that mends it.
    """
    if name not in NAMES:
        _unknown(name, "backend")
    loaded = LOADED.get(name) or _load(name)
    if isinstance(loaded, BackendUnavailable):
        raise loaded
    return loaded


def forced() -> str | None:
    """The backend asked for by :func:`backend` or ``ZOKERNELS_BACKEND``, if any."""
    name = _forced.get()
    if name is None:
        if _environment.get(_BACKEND) is None:
            return None
        name = os.environ.get("ZOKERNELS_BACKEND") or "auto"
        if name not in (*NAMES, "auto"):
            _unknown(name, "ZOKERNELS_BACKEND")
    return None if name == "auto" else name


def select(device: torch.device | str) -> Backend:
    """The backend for tensors on ``device``: the forced one, or the first of ``PREFERENCE`` that can.

    Raises :class:`BackendUnavailable` where none does.
    """
    device = torch.device(device) if isinstance(device, str) else device
    name = forced()
    if name is not None:
        chosen = get(name)
        if device.type not in chosen.devices:
            raise BackendUnavailable(
                f"backend {name!r}: expected tensors on {' or '.join(sorted(chosen.devices))}, got "
                f"{device.type}"
                + (
                    "; set TRITON_INTERPRET=1 before Python starts to run Triton on CPU"
                    if name == "triton"
                    else ""
                )
            )
        if device in chosen.refused:
            raise BackendUnavailable(f"backend {name!r} {chosen.refused[device]}")
        return chosen
    kind = device.type
    for name in PREFERENCE.get(kind, ("reference",)):
        loaded = LOADED.get(name) or _load(name)
        if isinstance(loaded, Backend) and kind in loaded.devices and device not in loaded.refused:
            return loaded
    raise BackendUnavailable(f"no backend for device type {kind!r}: expected cpu or cuda")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block, run every operation on backend ``name`` (``None`` or ``"auto"``: choose
    automatically).

    Raises :class:`BackendUnavailable` at once where that backend cannot be used.
    """
    if name not in (None, "auto"):
        get(name)
    token = _forced.set(name or "auto")
    try:
        yield
    finally:
        _forced.reset(token)
