"""What a build for the Hub must do, in one process: ``python packaging/use_hub.py PROJECT``.

PROJECT is what ``make hub`` wrote.  The library ``kernels`` loads it where any connection is an error, and
where the installed package is not imported.  It must have the contract's bits on each of its backends and
instruction sets, and its operations under its own name.  Afterwards the installed package is loaded beside it
and must have the same bits.  Prints what it ran as its last line, and fails otherwise.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import socket
import sys
from typing import Any


def refuse(*_args: object, **_named: object) -> None:
    raise AssertionError("expected no connection")


os.environ["HF_HUB_OFFLINE"] = "1"
socket.socket.connect = socket.create_connection = refuse  # type: ignore[assignment, method-assign]

import golden  # noqa: E402
import torch  # noqa: E402
from kernels import get_loaded_kernels, get_local_kernel  # noqa: E402


def instruction_sets(hub: Any, isa: Any) -> list[str]:
    """Those that this machine has; the others raise."""
    found = []
    for name in ("portable", "avx2", "avx512", "neon"):
        isa.isa = name
        try:
            hub.noise(3, seed=1)
        except RuntimeError:
            continue
        found.append(name)
    return found


def main(project: str) -> None:
    hub = get_local_kernel(pathlib.Path(project), backend="cpu")
    (loaded,) = get_loaded_kernels()
    name = loaded.metadata.id
    folder = pathlib.Path(hub.__file__).parent
    isa = importlib.import_module(f"{hub.__name__}.backends.cpu.isa")
    ran = []
    with hub.backend("reference"):
        values = golden.check(hub)
    if (folder / "lib").exists():  # stage two
        with hub.backend("cpu"):
            for chosen in instruction_sets(hub, isa):
                isa.isa = chosen
                assert golden.check(hub) == values
                ran.append(chosen)
        isa.isa = "auto"
    weights = torch.randn(50, generator=torch.Generator().manual_seed(1)).bfloat16()
    settings = {"decay": 0.9, "rounding": "stochastic", "rounding_seed": 3}
    theirs = weights.clone()
    # As a plan: this is the call that looks for compiled modules, and must not find the installed package's.
    hub.combine_(hub.plan([theirs], 5), 7, -0.3, **settings)
    assert getattr(torch.ops, name).combine_.default._schema.name == f"{name}::combine_"
    assert not hasattr(torch.ops.zokernels, "combine_"), "the installed package's namespace was used"
    assert "zokernels" not in sys.modules, "the installed package was imported"
    import zokernels

    ours = weights.clone()
    zokernels.combine_(ours, 7, -0.3, streams=5, **settings)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, weights)
    print(f"{folder.name}: {values} values of the contract on {', '.join(['reference', *ran])}; {name}")


if __name__ == "__main__":
    main(sys.argv[1])
