"""theta += c * tl.randn(seed, index): the kernel that Triton's own generator invites one to write.

It is imported only if triton is installed.  Its random numbers are a function of the index, as ours are, but
it has neither a stream for each parameter nor 64-bit indices.  ``tl.randn`` takes one Philox block for every
normal, which it computes with a logarithm and a cosine.  ``randn4x`` uses all four words of the block, as a
careful author would."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def randn_kernel(theta, c, seed, numel, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    x = tl.load(theta + index, mask=inside).to(tl.float32)
    x += c * tl.randn(seed, index)
    tl.store(theta + index, x.to(theta.dtype.element_ty), mask=inside)


@triton.jit
def randn4x_kernel(theta, c, seed, numel, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    z0, z1, z2, z3 = tl.randn4x(seed, block)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BLOCK)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    x = tl.load(theta + index, mask=inside).to(tl.float32) + c * z
    tl.store(theta + index, x.to(theta.dtype.element_ty), mask=inside)


def perturb_(theta: Tensor, c: float, seed: int, kernel=randn_kernel) -> None:
    grid = (triton.cdiv(theta.numel(), BLOCK),)
    with torch.cuda.device(theta.device):
        kernel[grid](theta, float(c), seed, theta.numel(), BLOCK=BLOCK, num_warps=4)
