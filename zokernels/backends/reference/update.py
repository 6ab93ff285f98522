"""update: theta and the state of a rule from G = sum_k c_k z_k, in pure PyTorch.

The docstring of :func:`zokernels.update_` has the formulas.  A rule gets theta, decay * theta, its states and
its hyper-parameters, all fp32 [n], and gives the new theta and states before they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...contract import DOMAIN_STATE
from ..registry import implements
from ..terms import Terms
from .combine import Chunk, accumulate, chunks, divide, fma, sqrt

States = tuple[Tensor, ...]
Changed = tuple[Tensor, States]  #: the new theta and the new states


def _gradient(chunk: Chunk) -> Tensor:
    return accumulate(chunk, torch.zeros(chunk.n, device=chunk.coeffs.device))


def _momentum(chunk: Chunk, theta: Tensor, decayed: Tensor, states: States, hyper: States) -> Changed:
    l2, beta, gain, lr = hyper
    g = fma(l2, theta, _gradient(chunk))
    m = fma(beta, states[0], gain * g)
    return fma(-lr, m, decayed), (m,)


def _adam(chunk: Chunk, theta: Tensor, decayed: Tensor, states: States, hyper: States) -> Changed:
    l2, beta1, gain1, beta2, gain2, lr, root_scale, eps = hyper
    g = fma(l2, theta, _gradient(chunk))
    m = fma(beta1, states[0], gain1 * g)
    v = fma(beta2, states[1], gain2 * g * g)
    return fma(-lr, divide(m, fma(sqrt(v), root_scale, eps)), decayed), (m, v)


def _adam_window(chunk: Chunk, theta: Tensor, decayed: Tensor, states: States, hyper: States) -> Changed:
    lr, eps, *square_coeffs = hyper
    m = v = torch.zeros(chunk.n, device=chunk.coeffs.device)
    for k, square in enumerate(square_coeffs):
        z = chunk.noise(k)
        m, v = fma(chunk.coeffs[k].expand(chunk.n), z, m), fma(square, z * z, v)
    return fma(-lr, divide(m, sqrt(v) + eps), decayed), ()


def _sign(chunk: Chunk, theta: Tensor, decayed: Tensor, states: States, hyper: States) -> Changed:
    l2, lr = hyper
    g = fma(l2, theta, _gradient(chunk))
    return fma(-lr, (g > 0).float() - (g < 0).float(), decayed), ()


def _hizoo(chunk: Chunk, theta: Tensor, decayed: Tensor, states: States, hyper: States) -> Changed:
    keep, gain = hyper
    z = chunk.noise(0)
    h = fma(gain, states[0] * (z * z), keep * states[0])
    return fma(chunk.coeffs[0].expand(chunk.n), divide(z, sqrt(h)), decayed), (h,)


RULES: dict[str, Callable[[Chunk, Tensor, Tensor, States, States], Changed]] = {
    "momentum": _momentum,
    "adam": _adam,
    "adam_window": _adam_window,
    "sign": _sign,
    "hizoo": _hizoo,
}


@implements
def update(
    params: list[Tensor], first: list[Tensor], second: list[Tensor], rule: str, hyper: Tensor, terms: Terms
) -> None:
    for chunk in chunks(params, terms):
        theta = params[chunk.index]
        stored = [states[chunk.index] for states in (first, second) if states]
        decayed, values = chunk.decayed(theta), tuple(chunk.of(s).float() for s in stored)
        hypers = tuple(h.expand(chunk.n) for h in hyper)
        new, new_values = RULES[rule](chunk, chunk.of(theta).float(), decayed, values, hypers)
        kept = chunk.kept()
        if kept is not None:
            new = torch.where(kept, new, decayed)
        chunk.of(theta).copy_(chunk.rounded(new, theta.dtype))
        for i, (state, value) in enumerate(zip(stored, new_values, strict=True)):
            rounded = chunk.rounded(value, state.dtype, DOMAIN_STATE + i)
            chunk.of(state).copy_(rounded if kept is None else torch.where(kept, rounded, chunk.of(state)))
