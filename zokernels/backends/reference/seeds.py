"""derive_seed on tensors, in pure PyTorch."""

from __future__ import annotations

from torch import Tensor

from ...contract import DOMAIN_SEED
from ..registry import implements
from .philox import MASK32, philox


@implements
def derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> Tensor:
    w0, w1, _, _ = philox(step & MASK32, (step >> 32) & MASK32, k & MASK32, k * 0 + DOMAIN_SEED, run_seed)
    return w0 | w1 << 32
