"""What an installed wheel must do, in one process and with nothing but torch: ``python packaging/use.py
FOLDER``.

FOLDER is where the package has to come from. Prints what it ran as its last line, and fails otherwise.
"""

from __future__ import annotations

import importlib
import pathlib
import re
import sys

import golden
import torch

import zokernels
from zokernels.optim import ZOSGD

ROOT = pathlib.Path(__file__).resolve().parent.parent


def instruction_sets() -> list[str]:
    """Those of the host module; without one (another Python's), what this machine's kernel is called by
    "auto".
    """
    try:
        from zokernels import _host
    except ImportError:
        return ["auto"]
    return _host.instruction_sets()


def steps(backend: str) -> list[torch.Tensor]:
    """Weights after three steps with momentum, in bf16 with stochastic rounding."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 37), torch.nn.ReLU(), torch.nn.Linear(37, 2)).bfloat16()
    x, y = torch.randn(16, 20).bfloat16(), torch.randint(2, (16,))
    with zokernels.backend(backend):
        optimizer = ZOSGD(model.named_parameters(), lr=1e-2, eps=1e-3, seed=3, directions=2, momentum=0.9)
        for _ in range(3):
            optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x).float(), y))
    return [p.detach() for p in model.parameters()]


def error_arrives() -> None:
    """An exception that our C++ throws has to come out of torch as a RuntimeError with its message."""
    isa = importlib.import_module("zokernels.backends.cpu.isa")
    before, isa.isa = isa.isa, "sse9"
    try:
        zokernels.noise(3, seed=1)
    except RuntimeError as error:
        message = str(error)
    else:
        message = "no error"
    finally:
        isa.isa = before
    assert "expected auto or an instruction set" in message, message


def readme() -> int:
    """Every block of Python in README.md, each by itself; returns how many."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    return len(blocks)


def main(folder: str) -> None:
    assert pathlib.Path(zokernels.__file__).is_relative_to(folder), zokernels.__file__
    isa = importlib.import_module("zokernels.backends.cpu.isa")
    sets = instruction_sets()
    with zokernels.backend("cpu"):
        for name in sets:
            isa.isa = name
            values = golden.check(zokernels)
        isa.isa = "auto"
        error_arrives()
    want = steps("reference")
    for name in sets:
        isa.isa = name
        assert all(torch.equal(a, b) for a, b in zip(steps("cpu"), want, strict=True)), name
    isa.isa = "auto"
    blocks = readme()
    print(f"{values} values of the contract and 3 steps on {', '.join(sets)}; {blocks} blocks of the README")


if __name__ == "__main__":
    main(sys.argv[1])
