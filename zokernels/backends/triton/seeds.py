"""derive_seed in Triton: two words of Philox(key = run_seed, counter = (step_lo, step_hi, k, 0))."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import DOMAIN_SEED
from ..registry import implements
from .device import on_device
from .launch import options
from .philox import philox, words

_DOMAIN = tl.constexpr(DOMAIN_SEED)
_BLOCK = 128


@triton.jit(do_not_specialize=["numel"])
def derive_seed_kernel(out_ptr, run_seed_ptr, step_ptr, k_ptr, numel: tl.int64, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    step_lo, step_hi = words(tl.load(step_ptr + index, mask=inside, other=0))
    k = tl.load(k_ptr + index, mask=inside, other=0).to(tl.uint32)
    domain = tl.full((), _DOMAIN, tl.uint32)
    w0, w1, _, _ = philox(step_lo, step_hi, k, domain, tl.load(run_seed_ptr + index, mask=inside, other=0))
    seed = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
    tl.store(out_ptr + index, seed.to(tl.int64, bitcast=True), mask=inside)


@implements
def derive_seed(run_seed: Tensor, step: Tensor, k: Tensor) -> Tensor:
    out = torch.empty_like(run_seed)
    if (numel := out.numel()) == 0:
        return out
    with on_device(out.device):
        derive_seed_kernel[(triton.cdiv(numel, _BLOCK),)](
            out, run_seed, step, k, numel, BLOCK=_BLOCK, **options(out.device)
        )
    return out
