"""The compiled libraries: finding, loading, and calling what they register.

A library registers its kernels as ``torch.ops.zokernels_<name>.*``, each with a schema.  The schema says what
becomes of the arguments that a kernel gets (``registry.Kernel``), so nothing in Python names a single kernel:

* where the schema ends with the fields of ``Terms``, the last argument is a ``Terms``, which is taken apart;
* where it has ``dist`` or ``wire``, which are names in Python, the name becomes its number;
* where it has ``isa``, the backend gives the instruction set.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..contract import DISTS
from ..wire import FORMATS
from .journal import call
from .registry import BackendUnavailable, Kernel
from .terms import Terms

FOLDER = pathlib.Path(__file__).parent.parent / "lib"

#: What builds each library.
BUILD = {
    "cpu": "pip install --no-build-isolation .",
    "cuda": "ZOKERNELS_CUDA=1 pip install --no-build-isolation . (needs nvcc)",
}


def path_of(name: str) -> pathlib.Path:
    return FOLDER / f"libzokernels_{name}.so"


def load(name: str) -> None:
    """Loads ``libzokernels_<name>.so``, which registers ``torch.ops.zokernels_<name>``."""
    path = path_of(name)
    if not path.exists():
        raise BackendUnavailable(f"backend {name!r} is not built; build it with: {BUILD[name]}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BackendUnavailable(
            f"backend {name!r} does not load with torch {torch.__version__} ({error}); rebuild it "
            f"with: {BUILD[name]}"
        ) from error


#: Names that cross as numbers (csrc/op_args.h).
CODES: Mapping[str, Mapping[str, int]] = {"dist": DISTS, "wire": {wire: i for i, wire in enumerate(FORMATS)}}


def finder(name: str, isa: Callable[[], str] | None = None) -> Callable[[str], Kernel | None]:
    """``Backend.find`` of a library that is loaded.  ``isa``: the instruction set, asked for at each call."""
    namespace = getattr(torch.ops, f"zokernels_{name}")

    def find(kernel: str) -> Kernel | None:
        packet = getattr(namespace, kernel, None)
        return None if packet is None else _bind(packet.default, isa)

    return find


def _bind(operation: Any, isa: Callable[[], str] | None) -> Kernel:
    """``operation``, of a library, as a kernel: its arguments as the schema wants them."""
    names = [argument.name for argument in operation._schema.arguments]
    takes_isa = names[-1:] == ["isa"]
    if takes_isa:
        names.pop()
    fields = len(Terms._fields)
    takes_terms = tuple(names[-fields:]) == Terms._fields
    if takes_terms:
        names = names[:-fields]
    coded = [(i, CODES[name]) for i, name in enumerate(names) if name in CODES]

    def kernel(*given: Any) -> Any:
        args = list(given)
        for i, numbers in coded:
            args[i] = numbers[args[i]]
        if takes_terms:
            args += args.pop().packed
        if takes_isa and isa is not None:
            args.append(isa())
        return call(operation, args)

    def kernel_of_terms(*given: Any) -> Any:  # the same for most, where a call costs least
        *args, terms = given
        return call(operation, (*args, *terms.packed, *(() if isa is None else (isa(),))))

    return kernel_of_terms if takes_terms and not coded and takes_isa == (isa is not None) else kernel
