"""A user's script as mypy --strict reads it: `make lint` fails where a comment marks no error.

It is not run.  Each ``type: ignore`` is a fault that a type checker has to find, and one that it does not
find is an error itself (warn_unused_ignores).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import zokernels
from zokernels.optim import FZOO, LOZO, ZOSGD, LeZO, Sweep, ZOAdamW, find_lr


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    named = model.named_parameters
    ZOSGD(named(), 1e-3, 1e-3, momentum=0.9, seed=3, dist="rademacher", restore="inplace", clip=1.0)
    ZOSGD(named(), lr=1e-3, zo_eps=1e-3)  # type: ignore[call-arg]
    ZOSGD(named(), lr=1e-3, dist="gauss")  # type: ignore[arg-type]
    ZOSGD(named(), lr=1e-3, restore="in place")  # type: ignore[arg-type]
    ZOSGD(named(), lr="1e-3")  # type: ignore[arg-type]
    FZOO(named(), lr=1e-3, directions=8, sigma="sample", weight_decay=0.1)
    FZOO(named(), lr=1e-3, directons=8)  # type: ignore[call-arg]
    ZOAdamW(named(), lr=1e-3, betas=(0.9, 0.99), state_dtype=torch.bfloat16, directions=2)
    ZOAdamW(named(), lr=1e-3, betas=0.9)  # type: ignore[arg-type]
    LOZO(named(), lr=1e-3, rank=4, momentum=0.7, subset=None)
    LOZO(named(), lr=1e-3, direction=None)  # type: ignore[call-arg]
    LeZO(named(), lr=1e-3, direction=None, skipped=0.5)
    LeZO(named(), lr=1e-3, subset=None)  # type: ignore[call-arg]
    optimizer = zokernels.optim.ZOSGD(named(), lr=1e-3)
    zokernels.optimm.ZOSGD(named(), lr=1e-3)  # type: ignore[attr-defined]
    closure = lambda: F.cross_entropy(model(x), y)
    sweep: Sweep = find_lr(optimizer, closure, [1e-4, 1e-3], steps=5)
    find_lr(optimizer, closure, lr=1e-3)  # type: ignore[call-arg]
    print(sweep, optimizer.diagnose(closure).advice, sweep.lr)
    return float(optimizer.step(closure))
